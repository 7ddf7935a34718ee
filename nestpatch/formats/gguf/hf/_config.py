"""config.json from the metadata of a GGUF file: the way back of what export/_gguf_families.py writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.gguf.hf._facts import REQUIRED, FileFacts
from nestpatch.formats.gguf.names import MAX_LAYERS
from nestpatch.formats.gguf.traits import TRAITS, llama3_settings, longrope_attention
from nestpatch.rows import FloatArray

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are settings of config.json."""
_HEAD = "output.weight"
_CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
    "gptneox": ("GPTNeoXForCausalLM", "gpt_neox"),
}
"""general.architecture -> (class, model_type) of transformers. Mistral's models compute what Llama's do."""
_MIXTURE = ("MixtralForCausalLM", "mixtral")
"""Of the architecture llama with experts."""
_WINDOWS = {"gemma2": 4096}
"""The sliding window that llama.cpp takes where the file says none."""
_DERIVED = ("qwen2", "mixtral", "phi3", "gpt_neox")
"""Model types whose heads are as wide as the model by their number, unless they say otherwise."""
_UNKNOWN = re.compile(
    r"rope\.(?!dimension_count$|freq_base$|freq_base_swa$|scaling\.).+|rope\.scaling\.(?!type$|factor$|original_context_length$"
    r"|attn_factor$|finetuned$|yarn_beta_fast$|yarn_beta_slow$).+|.*(?:scale|alibi_bias|clamp_kqv|temperature.*|multiplier)"
)
"""Keys of settings that change what a model computes, and have no field here."""
_MOST_EXPERTS = 1 << 10
_LARGEST = 1 << 24
"""Of every size: config.json must not ask for more memory than a file could fill."""

Config = dict[str, Any]
Tables = Mapping[str, FloatArray]


def require_known(facts: FileFacts) -> None:
    """Checks that models of this architecture can be read back.

    Args:
        facts: The file's metadata.

    Raises:
        UnsupportedModelError: They cannot; the advice lists those that can.
    """
    if facts.architecture not in TRAITS:
        raise UnsupportedModelError(
            f"GGUF files of architecture {facts.architecture[:100]!r} cannot be read as models of transformers",
            advice=f"Known are {', '.join(TRAITS)}. Give the safetensors model that the file was made from.",
        )
    if unknown := [key for key in facts.below() if _UNKNOWN.fullmatch(key)]:
        raise UnsupportedModelError(
            f"{facts.where} has the setting {facts.architecture}.{unknown[0][:80]}, which is not known here",
            advice="Give the safetensors model that the file was made from.",
        )


def read_config(facts: FileFacts, names: Collection[str], vocabulary: int, tables: Tables, pattern: list[Any]) -> Config:
    """Makes the fields of config.json, without dtype and token ids.

    Args:
        facts: The file's metadata.
        names: Its tensors.
        vocabulary: Rows of its embeddings.
        tables: The content of ROPE_TENSORS.
        pattern: Whether each layer has a sliding window, where the file lists it; else empty.

    Returns:
        The fields.

    Raises:
        UnsupportedModelError: transformers has no such model.
        CheckpointFormatError: A fact is missing or impossible.
    """
    require_known(facts)
    sizes = _sizes(facts)
    if sizes["num_attention_heads"] % max(1, sizes["num_key_value_heads"]):
        raise CheckpointFormatError(f"{facts.where} has {sizes['num_key_value_heads']} key heads for more query heads")
    mixture = facts.architecture == "llama" and facts.whole("expert_count", 0) > 0
    model_class, kind = _MIXTURE if mixture else _CLASSES[facts.architecture]
    key, field, default = TRAITS[facts.architecture].epsilon
    config: Config = {
        "architectures": [model_class],
        "model_type": kind,
        "vocab_size": vocabulary,
        **sizes,
        "hidden_act": "silu",
        field: facts.real(key, default),
        "tie_word_embeddings": _HEAD not in names,
    }
    if mixture:
        config |= _experts(facts, "num_local_experts")
        config["sliding_window"] = None
    config |= _SPECIFICS[facts.architecture](facts, config, names, tables, pattern)
    return config


def stated(config: Config) -> Config:
    """The fields that config.json states: those that a class does not have, or derives in the same way, are left out.

    Args:
        config: From `read_config`.

    Returns:
        The fields to write.
    """
    unused = {"hidden_act"} if "hidden_activation" in config else set()
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"] and config["model_type"] in _DERIVED:
        unused.add("head_dim")
    if config["model_type"] == "gpt_neox":
        unused.add("num_key_value_heads")
    return {name: value for name, value in config.items() if name not in unused}


def _sizes(facts: FileFacts) -> dict[str, int]:
    heads = facts.whole("attention.head_count")
    width = facts.whole("embedding_length")
    if not 0 < heads <= _LARGEST:
        raise CheckpointFormatError(f"{facts.where} has {heads} attention heads")
    head = facts.whole("attention.key_length", width // heads)
    sizes = {
        "hidden_size": width,
        "intermediate_size": facts.whole("feed_forward_length"),
        "num_hidden_layers": facts.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.whole("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": facts.whole("context_length"),
    }
    if facts.whole("attention.value_length", head) != head:
        raise UnsupportedModelError(f"{facts.where} has values of another width than keys: transformers has no such model")
    for name, value in sizes.items():
        if not 0 < value <= (MAX_LAYERS if name == "num_hidden_layers" else _LARGEST):
            raise CheckpointFormatError(f"{facts.where} is a model with {name} = {value}")
    if head % 2:
        raise CheckpointFormatError(f"{facts.where} has heads of {head}, which cannot be rotated in pairs")
    return sizes


def _experts(facts: FileFacts, field: str) -> Config:
    count, used = facts.whole("expert_count"), facts.whole("expert_used_count")
    if not 0 < used <= count <= _MOST_EXPERTS:
        raise CheckpointFormatError(f"{facts.where} has {count} experts, of which it uses {used}")
    return {field: count, "num_experts_per_tok": used}


def _biased(names: Collection[str], part: str) -> bool:
    return f"blk.0.{part}.bias" in names


def _rotary(facts: FileFacts, config: Config, *, partial: bool = False) -> Config:
    """rope_parameters: linear and yarn scaling, or none."""
    rotated = facts.whole("rope.dimension_count", config["head_dim"])
    if not 0 < rotated <= config["head_dim"] or (rotated != config["head_dim"] and not partial):
        raise UnsupportedModelError(f"{facts.where} rotates {rotated} of {config['head_dim']} numbers of a head")
    kind = facts.text("rope.scaling.type", "none")
    found: Config = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base", 10000.0)}
    if not found["rope_theta"] > 0:
        raise CheckpointFormatError(f"{facts.where} has the rotary base {found['rope_theta']}")
    if rotated != config["head_dim"]:
        found["partial_rotary_factor"] = rotated / config["head_dim"]
    if kind == "none":
        return found
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{facts.where} scales positions by {kind[:40]!r}")
    found |= {"rope_type": kind, "factor": facts.real("rope.scaling.factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = facts.whole("rope.scaling.original_context_length")
        for name in ("beta_fast", "beta_slow"):
            if (value := facts.real(f"rope.scaling.yarn_{name}", None)) is not None:
                found[name] = value
        if facts.real("rope.scaling.attn_factor", 1.0) != 1.0:  # llama.cpp multiplies by it, transformers replaces by it
            raise UnsupportedModelError(f"{facts.where} has a yarn attention factor of its own")
    return found


def _llama(facts: FileFacts, config: Config, names: Collection[str], tables: Tables, _: list[Any]) -> Config:
    rope = _rotary(facts, config)
    if (divisors := tables.get(ROPE_TENSORS[0])) is not None:
        _require_length(divisors, config["head_dim"], facts)
        settings = llama3_settings(divisors, rope["rope_theta"], config["head_dim"])
        if settings is None or rope["rope_type"] != "default":
            raise UnsupportedModelError(f"the rotary frequencies of {facts.where} are not those of Llama 3.1")
        rope |= {"rope_type": "llama3", **settings}
    if config["model_type"] == "mixtral":
        return {"rope_parameters": rope}
    return {
        "rope_parameters": rope,
        "attention_bias": _biased(names, "attn_q"),
        "mlp_bias": _biased(names, "ffn_up"),
    }


def _qwen2(facts: FileFacts, config: Config, *_: Any) -> Config:
    return {"rope_parameters": _rotary(facts, config), "use_sliding_window": False}


def _qwen3(facts: FileFacts, config: Config, names: Collection[str], *_: Any) -> Config:
    return {**_qwen2(facts, config), "attention_bias": _biased(names, "attn_q")}


def _qwen3moe(facts: FileFacts, config: Config, names: Collection[str], *_: Any) -> Config:
    return {
        **_qwen3(facts, config, names),
        **_experts(facts, "num_experts"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(facts: FileFacts, config: Config, names: Collection[str], pattern: list[Any]) -> Config:
    """What Gemma 2 and 3 share. llama.cpp derives the scale of attention from other numbers, as here."""
    traits, layers = TRAITS[facts.architecture], config["num_hidden_layers"]
    width = config["hidden_size"] // config["num_attention_heads"]
    if pattern and (len(pattern) != layers or not all(isinstance(slides, bool) for slides in pattern)):
        raise CheckpointFormatError(f"{facts.where} lists sliding windows for {len(pattern)} of {layers} layers")
    period = facts.whole("attention.sliding_window_pattern", traits.period)
    slides = pattern or [period == 0 or number % period != 0 for number in range(1, layers + 1)]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width if layers == traits.large else config["head_dim"],
        "sliding_window": facts.whole("attention.sliding_window", _WINDOWS.get(facts.architecture, REQUIRED)),
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in slides],
        "attention_bias": _biased(names, "attn_q"),
    }


def _gemma2(facts: FileFacts, config: Config, names: Collection[str], _: Tables, pattern: list[Any]) -> Config:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # llama.cpp's, where the file says none
    return {
        **_gemma(facts, config, names, pattern),
        "rope_parameters": _rotary(facts, config),
        **{name: facts.real(name, default) for name, default in caps.items()},
    }


def _gemma3(facts: FileFacts, config: Config, names: Collection[str], _: Tables, pattern: list[Any]) -> Config:
    local = {"rope_type": "default", "rope_theta": facts.real("rope.freq_base_swa", 10000.0)}
    return {
        **_gemma(facts, config, names, pattern),
        "rope_parameters": {"full_attention": _rotary(facts, config), "sliding_attention": local},
        "attn_logit_softcapping": None,
        "final_logit_softcapping": facts.real("final_logit_softcapping", None),
    }


def _phi3(facts: FileFacts, config: Config, _: Collection[str], tables: Tables, __: list[Any]) -> Config:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedModelError(f"{facts.where} has heads of {config['head_dim']}: transformers has no such Phi-3")
    rope = _rotary(facts, config, partial=True)
    original = facts.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    rotated = facts.whole("rope.dimension_count", config["head_dim"])
    if any(name in tables for name in ROPE_TENSORS[1:]):
        for name in ROPE_TENSORS[1:]:
            _require_length(tables.get(name), rotated, facts)
        longer, shorter = (_decimals(tables[name]) for name in ROPE_TENSORS[1:])
        rope |= {"rope_type": "longrope", "long_factor": longer, "short_factor": shorter}
        rope["original_max_position_embeddings"] = original
        rope |= _phi3_scale(facts, config["max_position_embeddings"], original)
    return {
        "rope_parameters": rope,
        "original_max_position_embeddings": original,
        "sliding_window": facts.whole("attention.sliding_window", 0) or None,
    }


def _phi3_scale(facts: FileFacts, longest: int, original: int) -> Config:
    """attention_factor, where it is not the one that transformers computes."""
    stated = facts.real("rope.scaling.attn_factor", None)
    if original < 2:
        raise CheckpointFormatError(f"{facts.where} has rope.scaling.original_context_length = {original}")
    if stated is None or np.float32(stated) == np.float32(longrope_attention(longest / original, original)):
        return {}
    return {"attention_factor": stated}


def _gptneox(facts: FileFacts, config: Config, names: Collection[str], *_: Any) -> Config:
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"] or config["tie_word_embeddings"]:
        raise UnsupportedModelError(f"{facts.where} has sizes that no GPT-NeoX model of transformers has")
    return {
        "hidden_act": "gelu",
        "rope_parameters": _rotary(facts, config, partial=True),
        "use_parallel_residual": facts.flag("use_parallel_residual", True),
        "attention_bias": _biased(names, "attn_qkv"),
    }


_SPECIFICS: dict[str, Callable[[FileFacts, Config, Collection[str], Tables, list[Any]], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gptneox": _gptneox,
}


def _require_length(table: FloatArray | None, rotated: int, facts: FileFacts) -> None:
    if table is None or table.shape != (rotated // 2,) or not np.isfinite(table).all() or (table <= 0).any():
        raise CheckpointFormatError(f"{facts.where} has no rotary factors for {rotated} rotated dimensions")


def _decimals(table: FloatArray) -> list[float]:
    return [float(str(value)) for value in table]
