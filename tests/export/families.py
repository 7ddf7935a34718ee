"""Tiny random models of every family that is exported, each with a tokenizer trained here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.export.tokenizers_made import LLAMA3, QWEN2, byte_level, edit, sentencepiece
from tests.helpers import write_checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 480,
}
WIDE = {"hidden_size": 256, "intermediate_size": 512}
"""Sizes that every block type fits."""
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.5 * n for n in range(8)],
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "original_max_position_embeddings": 128,
}


@dataclass(frozen=True)
class Kind:
    """How one family is made."""

    config: str
    """The name of its transformers config class."""
    tokenizer: Callable[[Path], None]
    settings: dict[str, Any]
    tolerance: float = 1e-4
    """Largest difference of logits. llama.cpp reads GELU from a table of half precision."""


def _llama3(folder: Path) -> None:
    byte_level(folder, LLAMA3, whole_words=True)


def _qwen2(folder: Path) -> None:
    byte_level(folder, QWEN2)


def _gpt2(folder: Path) -> None:
    byte_level(folder, "gpt2")


def _spm(folder: Path) -> None:
    sentencepiece(folder, "llama")


def _gemma(folder: Path) -> None:
    sentencepiece(folder, "gemma")


_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
FAMILIES: dict[str, Kind] = {
    "llama2": Kind("LlamaConfig", _spm, {}),
    "llama3": Kind("LlamaConfig", _llama3, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_bias": Kind("LlamaConfig", _spm, {"attention_bias": True, "mlp_bias": True}),
    "mistral": Kind("MistralConfig", _spm, {"head_dim": 32, "sliding_window": None}),
    "mixtral": Kind("MixtralConfig", _spm, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": Kind("Qwen2Config", _qwen2, {}),
    "qwen2_yarn": Kind("Qwen2Config", _qwen2, {"rope_parameters": _YARN}),
    "qwen3": Kind("Qwen3Config", _qwen2, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": Kind(
        "Qwen3MoeConfig",
        _qwen2,
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
    "gemma2": Kind("Gemma2Config", _gemma, _GEMMA, 5e-3),
    "gemma3": Kind("Gemma3TextConfig", _gemma, {**_GEMMA, "num_hidden_layers": 6}, 5e-3),
    "phi": Kind("Phi3Config", _spm, {"pad_token_id": 0, "sliding_window": None}),
    "phi_long": Kind("Phi3Config", _spm, {"pad_token_id": 0, "sliding_window": None, "rope_parameters": LONG}),
    "gpt_neox": Kind("GPTNeoXConfig", _gpt2, {}, 5e-3),
}


def make(name: str, folder: Path, *, dtype: str = "float32", shards: str | None = None, **settings: Any) -> Path:
    """Makes the model of a family in a new folder. `shards`: the size of one, such as "100KB"."""
    import torch
    import transformers

    kind = FAMILIES[name]
    folder.mkdir(parents=True)
    kind.tokenizer(folder)
    config = getattr(transformers, kind.config)(**{**SIZES, "bos_token_id": 1, "eos_token_id": 2, **kind.settings, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Fresh models have norms of one and biases of zero, which would hide what an export does to them.
            if "norm" in parameter_name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.normal_(std=0.1)
            else:
                parameter.mul_(3.0)
    model.to(dtype=getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def model_around(folder: Path, rows: int = 480) -> Path:
    """A tiny Llama whose only purpose is its vocabulary."""
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, 32), "model.norm.weight": (32,)}
    layer = "model.layers.0"
    shapes |= {f"{layer}.self_attn.{part}_proj.weight": (32, 32) for part in "qkvo"}
    shapes |= {f"{layer}.mlp.{part}_proj.weight": (32, 32) for part in ("gate", "up", "down")}
    shapes |= {f"{layer}.{part}_layernorm.weight": (32,) for part in ("input", "post_attention")}
    write_checkpoint(folder, {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    config = {**SIZES, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    edit(folder / "config.json", {**config, "vocab_size": rows, "tie_word_embeddings": True})
    return folder
