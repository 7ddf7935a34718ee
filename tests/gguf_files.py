"""Small GGUF models made of safetensors models with the `gguf` package alone, for tests of what reads GGUF files."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import TokenType

from nestpatch.formats.gguf.names import gguf_architecture, gguf_name, gguf_spans
from nestpatch.formats.gguf.quants import codec
from tests.helpers import load_tensors

needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


@cache
def _silent() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def silence_llama() -> None:
    """Makes llama.cpp log nothing. It calls the callback as long as the process lives, so that is kept."""
    import llama_cpp

    llama_cpp.llama_log_set(_silent(), None)


def write_gguf(model: Path, file: Path, kind: str = "F32") -> Path:
    """Writes a model directory with a byte-level BPE tokenizer as a GGUF file; matrices are stored in type `kind`."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    architecture = gguf_architecture(config["architectures"][0])
    writer = gguf.GGUFWriter(file, architecture)
    _add_sizes(writer, config, architecture)
    _add_tokenizer(writer, model, config["vocab_size"], "qwen2" if config["model_type"] == "qwen2" else "gpt-2")
    for name, values in _arrange(model, config, architecture).items():
        stored = Type["F32" if values.ndim == 1 or "ffn_gate_inp" in name else kind]
        if stored is Type.F32:
            writer.add_tensor(name, values)
        else:
            blocks = codec(stored.name).encode(values.reshape(-1, values.shape[-1]))
            writer.add_tensor(name, blocks.reshape(*values.shape[:-1], -1), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _arrange(model: Path, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """GGUF name -> float32 values, experts stacked."""
    layers = config["num_hidden_layers"]
    found: dict[str, np.ndarray] = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, stored in load_tensors(model).items():
        values = stored.astype(np.float32)
        if architecture == "llama" and ".q_proj." in name:
            values = _permute(values, config["num_attention_heads"])
        elif architecture == "llama" and ".k_proj." in name:
            values = _permute(values, config["num_key_value_heads"])
        elif architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        elif ".experts." in name:
            for number, span in enumerate(gguf_spans(name, values.shape, architecture, layers)):
                rows = values.reshape(-1, values.shape[-1])
                parts.setdefault(span.tensor, {})[span.start] = rows[number * span.rows : (number + 1) * span.rows]
            continue
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        found[gguf_name(name, architecture, layers) or name] = values
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    for name, pieces in parts.items():
        whole = np.concatenate([pieces[start] for start in sorted(pieces)])
        found[name] = whole.reshape(experts, -1, whole.shape[-1])
    return found


def _permute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves to pairs."""
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if architecture in ("llama", "phi3"):
        writer.add_rope_dimension_count(width)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
        writer.add_sliding_window(config.get("sliding_window") or 0)
    if architecture == "gemma2":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if experts := config.get("num_local_experts", config.get("num_experts")):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, size: int, pattern: str) -> None:
    """`pattern` is llama.cpp's name of the split: transformers gives Qwen 2 its own, whatever tokenizer.json says."""
    table = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {token["id"]: token for token in table["added_tokens"]}
    tokens = {number: token for token, number in table["model"]["vocab"].items()}
    kinds = []
    for number in range(size):
        if number in special:
            kinds.append(TokenType.CONTROL if special[number]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL if number in tokens else TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pattern)
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in table["model"]["merges"]])
    places = {token: number for number, token in tokens.items()} | {t["content"]: t["id"] for t in special.values()}
    for what, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
    ):
        if config.get(what) in places:
            add(places[config[what]])
    writer.add_add_bos_token(False)
    template = model / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
