"""The names of tensors in GGUF files. Packs use the names of the safetensors checkpoint; the `gguf` package has the table.

A GGUF file stores the same rows, but not always in the same tensors: the experts of a layer are one tensor there, and a stacked
`gate_up_proj` is two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nestpatch.errors import UnsupportedModelError
from nestpatch.formats.gguf.package import gguf_module

GGUF_ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "PhiForCausalLM": "phi2",
    "Phi3ForCausalLM": "phi3",
    "GPTNeoXForCausalLM": "gptneox",
}
"""The class in a model's config.json -> `general.architecture` of its GGUF file."""
MAX_LAYERS = 512
"""As in llama.cpp (LLAMA_MAX_LAYERS). The table of names grows with the number of layers that a file claims."""
_SUFFIXES = (".weight", ".bias")
# One expert of its own: model.layers.0.mlp.experts.3.gate_proj.weight
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)(?P<suffix>\.weight)")
# All of them: model.layers.0.mlp.experts.gate_up_proj, with or without .weight
_STACKED = re.compile(r"(?P<stack>.+\.experts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?")
# Rows that a GGUF file stores in another order: llama.cpp interleaves the rotary halves of a head, and splits fused heads.
_REORDERED = {
    "llama": re.compile(r".+\.(?:q_proj|k_proj)\.(?:weight|bias)"),
    "gptneox": re.compile(r".+\.query_key_value\.(?:weight|bias)"),
}


@dataclass(frozen=True)
class RowSpan:
    """Consecutive rows of a checkpoint's matrix, and where a GGUF file stores them."""

    tensor: str
    """Its GGUF name: "blk.0.ffn_gate.weight"."""
    start: int
    """The first row there, experts flattened."""
    rows: int


def gguf_architecture(model_class: str) -> str:
    """The GGUF architecture of a model class.

    Args:
        model_class: The class in the model's config.json.

    Returns:
        An architecture of GGUF_ARCHITECTURES.

    Raises:
        UnsupportedModelError: The class is not in GGUF_ARCHITECTURES; the advice lists them.
    """
    if model_class not in GGUF_ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in GGUF_ARCHITECTURES)
        raise UnsupportedModelError(
            f"the GGUF architecture of {model_class[:100]!r} is not known here", advice=f"Known are {known} (ForCausalLM)."
        )
    return GGUF_ARCHITECTURES[model_class]


def expert_of(name: str) -> tuple[str, int, str] | None:
    """Parses the name of a matrix that belongs to a single expert.

    Args:
        name: Such as "model.layers.0.mlp.experts.3.up_proj.weight".

    Returns:
        (stack, number, part), here ("model.layers.0.mlp.experts", 3, "up_proj"); None for other tensors.
    """
    found = _EXPERT.fullmatch(name)
    return (found["stack"], int(found["number"]), found["part"]) if found else None


@lru_cache(maxsize=8)
def _table(architecture: str, layers: int) -> Any:
    if not 0 <= layers <= MAX_LAYERS:
        raise UnsupportedModelError(
            f"a model of {layers} layers",
            advice=f"llama.cpp runs models of up to {MAX_LAYERS} layers; this file may be broken.",
        )
    known = {name: arch for arch, name in gguf_module("constants").MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UnsupportedModelError(
            f"the GGUF architecture {architecture[:100]!r} is not known", advice="Upgrade gguf: pip install -U gguf"
        )
    return gguf_module("tensor_mapping").get_tensor_name_map(known[architecture], layers)


def gguf_name(name: str, architecture: str, layers: int) -> str | None:
    """The GGUF name of a whole tensor: "model.norm.weight" -> "output_norm.weight".

    Args:
        name: Its name in the safetensors checkpoint.
        architecture: The GGUF architecture.
        layers: Layers of the model.

    Returns:
        The name; None where the architecture has no such tensor.

    Raises:
        UnsupportedModelError: The architecture is unknown, or the number of layers is impossible.
    """
    found: str | None = _table(architecture, layers).get_name(name, _SUFFIXES)
    return found


def is_reordered(name: str, architecture: str) -> bool:
    """Whether a GGUF file stores the rows of a matrix, or the elements of a vector, in another order.

    Args:
        name: The tensor's name in the safetensors checkpoint.
        architecture: The GGUF architecture.
    """
    rule = _REORDERED.get(architecture)
    return rule is not None and rule.fullmatch(name) is not None


@dataclass(frozen=True)
class GgufHome:
    """The tensors of a GGUF file that store a checkpoint's matrix."""

    tensors: tuple[str, ...]
    """One; or two, whose rows alternate expert by expert."""
    expert: int | None = None
    """Which expert of the stack the matrix is; None where it is the whole tensor."""


def gguf_home(name: str, architecture: str, layers: int) -> GgufHome | None:
    """Which tensors of a GGUF file store a matrix.

    Args:
        name: The matrix's name in the safetensors checkpoint.
        architecture: The GGUF architecture ("llama", "phi3", "qwen3moe").
        layers: The block count of the GGUF file.

    Returns:
        The tensors; None where the architecture has none for it.

    Raises:
        UnsupportedModelError: The GGUF file stores its rows in another order, or the architecture is unknown.
    """
    if is_reordered(name, architecture):
        raise UnsupportedModelError(
            f"a GGUF file of architecture {architecture} stores the rows of {name} in another order",
            advice="Patch the safetensors model and export it anew: nestpatch export MODEL PACK --to gguf",
        )
    lookups, expert = [name], None
    if found := _EXPERT.fullmatch(name):
        lookups, expert = [f"{found['stack']}.{found['part']}{found['suffix']}"], int(found["number"])
    elif found := _STACKED.fullmatch(name):
        parts = ("gate_proj", "up_proj") if found["part"] == "gate_up_proj" else (found["part"],)
        lookups = [f"{found['stack']}.{part}.weight" for part in parts]
    tensors = [gguf_name(lookup, architecture, layers) for lookup in lookups]
    if None in tensors:
        return None
    return GgufHome(tuple(filter(None, tensors)), expert)


def gguf_spans(name: str, shape: Sequence[int], architecture: str, layers: int) -> tuple[RowSpan, ...]:
    """Where a GGUF file stores the rows of a matrix.

    Args:
        name: The matrix's name in the safetensors checkpoint.
        shape: [.., rows, in_features].
        architecture: The GGUF architecture.
        layers: The block count of the GGUF file.

    Returns:
        The spans in the order of the matrix's rows.

    Raises:
        UnsupportedModelError: The architecture has no such tensor, or stores its rows in another order.
    """
    home = gguf_home(name, architecture, layers)
    if home is None:
        raise UnsupportedModelError(f"GGUF files of architecture {architecture} have no tensor for {name}")
    rows = math.prod(shape[:-1])
    if len(home.tensors) == 1:
        return (RowSpan(home.tensors[0], (home.expert or 0) * rows, rows),)
    experts = shape[0]
    half = rows // experts // len(home.tensors)
    return tuple(RowSpan(tensor, expert * half, half) for expert in range(experts) for tensor in home.tensors)
