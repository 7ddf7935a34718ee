"""One tensor, its names in each format. Packs use the names of the safetensors checkpoint; the `gguf` package has the table.

A matrix keeps its rows in a GGUF file, but not always alone: the experts of a layer are one tensor there, and a stacked
`gate_up_proj` is two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nestpatch.errors import UnsupportedModelError

SUFFIXES = (".weight", ".bias")
# One expert of its own: model.layers.0.mlp.experts.3.gate_proj.weight
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)(?P<suffix>\.weight)")
# All of them: model.layers.0.mlp.experts.gate_up_proj, with or without .weight
_STACKED = re.compile(r"(?P<stack>.+\.experts)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj)(?:\.weight)?")
# Rows that stand in another order: llama.cpp turns the rotary halves of a head into pairs, and takes heads apart by part.
_REORDERED = {
    "llama": re.compile(r".+\.(?:q_proj|k_proj)\.(?:weight|bias)"),
    "gptneox": re.compile(r".+\.query_key_value\.(?:weight|bias)"),
}


@dataclass(frozen=True)
class Span:
    """Consecutive rows of a checkpoint's matrix, and where they are in a GGUF file."""

    tensor: str
    """Its GGUF name: "blk.0.ffn_gate.weight"."""
    start: int
    """The first row there, experts flattened."""
    rows: int


@lru_cache(maxsize=8)
def _table(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
    if architecture not in known:
        raise UnsupportedModelError(
            f"the GGUF architecture {architecture!r} is not known", advice="Upgrade gguf: pip install -U gguf"
        )
    return get_tensor_name_map(known[architecture], layers)


def gguf_name(name: str, architecture: str, layers: int) -> str | None:
    """The GGUF name of a whole tensor, or None where the architecture has none: "model.norm.weight" -> "output_norm.weight"."""
    found: str | None = _table(architecture, layers).get_name(name, SUFFIXES)
    return found


def is_reordered(name: str, architecture: str) -> bool:
    """Whether a GGUF file holds the rows of this matrix, or the elements of this vector, in another order."""
    rule = _REORDERED.get(architecture)
    return rule is not None and rule.fullmatch(name) is not None


def gguf_spans(name: str, shape: Sequence[int], architecture: str, layers: int) -> tuple[Span, ...]:
    """Where the rows of a matrix [.., rows, in_features] are in a GGUF file, in their order.

    `architecture` is the GGUF's ("llama", "phi3", "qwen3moe"), `layers` its block count.

    Raises UnsupportedModelError when the architecture has no such tensor, or holds its rows in another order.
    """
    if is_reordered(name, architecture):
        raise UnsupportedModelError(
            f"the rows of {name} stand in another order in a GGUF file of architecture {architecture}",
            advice="Patch the safetensors model and export it anew: nestpatch export MODEL PATCH --to gguf",
        )
    rows = 1
    for n in shape[:-1]:
        rows *= n
    if found := _EXPERT.fullmatch(name):
        tensor = _require(f"{found['stack']}.{found['part']}{found['suffix']}", name, architecture, layers)
        return (Span(tensor, int(found["number"]) * rows, rows),)
    if (found := _STACKED.fullmatch(name)) and len(shape) == 3:
        return _stacked(found, name, shape, architecture, layers)
    return (Span(_require(name, name, architecture, layers), 0, rows),)


def _stacked(found: re.Match[str], name: str, shape: Sequence[int], architecture: str, layers: int) -> tuple[Span, ...]:
    experts, rows = shape[0], shape[1]
    if found["part"] != "gate_up_proj":
        return (Span(_require(f"{found['stack']}.{found['part']}.weight", name, architecture, layers), 0, experts * rows),)
    halves = [_require(f"{found['stack']}.{part}.weight", name, architecture, layers) for part in ("gate_proj", "up_proj")]
    half = rows // 2
    return tuple(Span(tensor, expert * half, half) for expert in range(experts) for tensor in halves)


def _require(lookup: str, name: str, architecture: str, layers: int) -> str:
    found = gguf_name(lookup, architecture, layers)
    if found is None:
        raise UnsupportedModelError(f"GGUF files of architecture {architecture} have no tensor for {name}")
    return found
