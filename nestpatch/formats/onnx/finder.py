"""Finds a checkpoint's matrices in an ONNX graph, where few weights keep their names.

In this order: the name of the tensor, the name of the operation that uses it, the modules that the exporter says the operation
belongs to, and the shape of the graph: a feed-forward block is known by its activation and its product. What is found is only
believed when its rows are those of the base, as in every format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nestpatch.errors import UnsupportedModelError
from nestpatch.formats.onnx.blocks import Block, Half
from nestpatch.formats.onnx.linear import Weight

GATE, UP, FUSED = "gate_proj", "up_proj", "gate_up_proj"
PLAIN = ("fc1", "fc_in", "c_fc", "dense_h_to_4h")
# What a tensor's or an operation's name has behind that of its module.
_TAIL = re.compile(r"(?:(?:Fused)?MatMul|Gemm|q?weight|base_layer)(?:_\w+)?", re.IGNORECASE)
_LAYER = re.compile(r"[0-9]{1,6}")
_TEXTS: Mapping[str, Callable[[Weight], Sequence[str]]] = {
    "the tensor's name": lambda weight: (weight.tensor.name,),
    "the operation's name": lambda weight: (weight.node.name,),
    "the exporter's module names": lambda weight: weight.node.scopes,
}
Path = tuple[str, ...]
"""A module's name in its parts: ("model", "layers", "0", "mlp", "gate_proj")."""


@dataclass(frozen=True)
class Found:
    """Rows of weights that together are a matrix."""

    halves: tuple[Half, ...]
    how: str
    """By what they were found, for people."""


class Finder:
    """All names of all weights of one graph."""

    def __init__(self, weights: Sequence[Weight], blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._known: dict[tuple[str, str], list[tuple[Path, Weight]]] = {}
        for weight in weights:
            for how, texts in _TEXTS.items():
                for path in filter(None, map(_untailed, texts(weight))):
                    self._known.setdefault((how, path[-1]), []).append((path, weight))

    def find(self, name: str) -> Found | None:
        """The rows that are a pack's tensor, or None. Raises UnsupportedModelError when several weights could be it."""
        module = _parts(name.removesuffix(".weight"))
        if not module:
            return None
        whole = self._by_name(module)
        if whole is not None:
            return whole
        parent, part = module[:-1], module[-1]
        if part in (GATE, UP) and (fused := self._by_name((*parent, FUSED))) is not None:
            return Found((self._half(fused.halves[0].weight, part),), fused.how)
        if part == FUSED:
            gate, up = (self._by_name((*parent, other)) for other in (GATE, UP))
            if gate is not None and up is not None:
                return Found((*gate.halves, *up.halves), gate.how)
        return self._by_structure(module)

    def _by_name(self, module: Path) -> Found | None:
        """The weight whose names end in the module's."""
        for how in _TEXTS:
            scores: dict[int, dict[str, Weight]] = {}
            for path, weight in self._known.get((how, module[-1]), ()):
                if score := _likeness(path, module):
                    scores.setdefault(score, {})[weight.tensor.name] = weight
            best = scores[max(scores)] if scores else {}
            if len(best) > 1:
                raise UnsupportedModelError(
                    f"{len(best)} weights of the model could be {'.'.join(module)}: {', '.join(sorted(best)[:3])}",
                    advice="Export the model anew with the names of its weights: nestpatch export MODEL --to onnx",
                )
            for weight in best.values():
                return Found((Half(weight, 0, weight.rows),), how)
        return None

    def _half(self, weight: Weight, part: str) -> Half:
        """The gate's or the other rows of a packed weight: as the graph uses them, else the gate first."""
        for block in self.blocks:
            half = block.gate if part == GATE else block.up
            if half is not None and half.weight is weight:
                return half
        rows = weight.rows // 2
        return Half(weight, 0 if part == GATE else rows, rows)

    def _by_structure(self, module: Path) -> Found | None:
        """The weights of the layer's feed-forward block, counted from the first."""
        numbers = [int(part) for part in module if _LAYER.fullmatch(part)]
        part = module[-1]
        if len(numbers) != 1 or part not in (GATE, UP, FUSED, *PLAIN):
            return None
        alike = [block for block in self.blocks if (block.gate is None) == (part in PLAIN)]
        if numbers[0] >= len(alike):
            return None
        block = alike[numbers[0]]
        if block.gate is not None and part == FUSED:
            return Found(_joined(block.gate, block.up), "the shape of the graph")
        half = block.gate if block.gate is not None and part == GATE else block.up
        return Found((half,), "the shape of the graph")


def _parts(text: str) -> Path:
    return tuple(filter(None, re.split(r"[./]", text)))


def _untailed(text: str) -> Path:
    """The parts of a name without what exporters add to that of its module."""
    parts = _parts(text)
    while parts and _TAIL.fullmatch(parts[-1]):
        parts = parts[:-1]
    return parts


def _likeness(path: Path, module: Path) -> int:
    """How many of a module's last names a path ends in; 0 unless its layer's is among them."""
    count = 0
    while count < min(len(path), len(module)) and path[-1 - count] == module[-1 - count]:
        count += 1
    return count if count >= _needed(module) else 0


def _needed(module: Path) -> int:
    """How many of its last names tell a module from all others: from what its first number counts."""
    first = next((place for place, part in enumerate(module) if _LAYER.fullmatch(part)), 1)
    return len(module) - max(0, first - 1)


def _joined(gate: Half, up: Half) -> tuple[Half, ...]:
    """Gate and up; as one, where they follow each other in one weight."""
    if gate.weight is up.weight and gate.start + gate.rows == up.start:
        return (Half(gate.weight, gate.start, gate.rows + up.rows),)
    return gate, up
