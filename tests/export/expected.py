"""What a GGUF file must hold, worked out from a safetensors model without the code under test."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from tests.helpers import load_tensors

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.gate": "ffn_gate_inp", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip
GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
WHOLE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
}  # fmt: skip
EXPERTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_LAYER = re.compile(r"(?:model|gpt_neox)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r".+\.experts\.(\d+)\.(\w+)")


def expected_tensors(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """GGUF name -> values, in the stored dtype (norms of Gemma in float32). `tensors` replaces what the files hold."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = config["architectures"][0]
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, values in (tensors or load_tensors(folder)).items():
        whole, _, suffix = name.rpartition(".")
        if whole in WHOLE:
            place = f"{WHOLE[whole]}.{suffix}"
        else:
            layer, part, suffix = _LAYER.fullmatch(name).groups()  # type: ignore[union-attr]
            if expert := _EXPERT.fullmatch(part):
                stacks.setdefault(f"blk.{layer}.ffn_{EXPERTS[expert[2]]}_exps.weight", {})[int(expert[1])] = values
                continue
            parts = {**PARTS, **(GEMMA_PARTS if architecture.startswith("Gemma") else {})}
            place = f"blk.{layer}.{parts[part]}.{suffix}"
        found[place] = _stored(place, values, config, architecture)
    for name, experts in stacks.items():
        mixed = len({values.dtype for values in experts.values()}) > 1
        found[name] = np.stack([experts[n].astype(np.float32) if mixed else experts[n] for n in sorted(experts)])
    return found


def _stored(place: str, values: np.ndarray, config: dict, architecture: str) -> np.ndarray:
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM") and re.search("attn_[qk][.]", place):
        order = [
            head + half * size // 2 + pair
            for head in range(0, len(values), size)
            for pair in range(size // 2)
            for half in (0, 1)
        ]
        return values[order]
    if architecture == "GPTNeoXForCausalLM" and "attn_qkv" in place:
        order = [3 * size * head + size * part + row for part in range(3) for head in range(heads) for row in range(size)]
        return values[order]
    if architecture.startswith("Gemma") and place.endswith("norm.weight"):
        return values.astype(np.float32) + np.float32(1)
    return values


def is_float32(place: str, values: np.ndarray) -> bool:
    """Whether llama.cpp wants this tensor in F32 whatever the type of the file."""
    return values.ndim == 1 or place.endswith("_norm.weight") or "ffn_gate_inp" in place
