"""Finds a checkpoint's matrices in an ONNX graph, where few weights keep their names.

Tried in this order: the name of the tensor, the name of the operation that uses it, the modules that the exporter recorded for
the operation, and the shape of the graph: a feed-forward block is recognized by its activation and its product. As in every
format, a match counts only when its rows are those of the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestpatch.errors import UnsupportedModelError
from nestpatch.formats.onnx._weights import Weight
from nestpatch.formats.onnx.graph import Graph, Node

_ACTIVATIONS = frozenset(
    ["Sigmoid", "Gelu", "Erf", "Tanh", "QuickGelu", "FastGelu", "BiasGelu", "Swish", "Silu", "Relu", "LeakyRelu", "Elu"]
    + ["HardSwish"]
)
_PASSING = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"})
"""Operations that pass on their first input."""
_ELEMENTWISE = frozenset({"Mul", "Add", "Div", "Pow", "Sub", "Sqrt", "Neg"}) | _PASSING | _ACTIVATIONS
_BETWEEN = 64
"""Operations between the weights of a block: tanh approximations of gelu take about a dozen."""
_PASSED = 4
"""Operations between a packed weight and the operation that splits its product."""


@dataclass(frozen=True)
class Half:
    """Some rows of a weight."""

    weight: Weight
    start: int
    rows: int


@dataclass(frozen=True)
class _Block:
    """One feed-forward block."""

    gate: Half | None
    """None in a plain block."""
    up: Half


class _Walk:
    """Follows the graph from a weight back to the weights whose products it multiplies."""

    def __init__(self, graph: Graph, weights: Sequence[Weight]) -> None:
        self.makers: Mapping[str, Node] = {name: node for node in graph.nodes for name in node.outputs if name}
        self.constants = graph.tensors.keys() | {name for node in graph.nodes if node.op == "Constant" for name in node.outputs}
        self.products = {weight.node.outputs[0]: weight for weight in weights if weight.node.outputs}

    def block(self, last: Weight) -> _Block | None:
        """The block that a weight ends, if it ends one."""
        sources = self._sources(last.node.inputs[0])
        if sources is None:
            return None
        halves = {}
        for (weight, part), activated in sources.items():
            rows = weight.rows if part == 0 else weight.rows // 2
            halves[activated] = Half(weight, rows if part == 2 else 0, rows)
        gate, up = halves.get(True), halves.get(False)
        if len(sources) == 1 and gate is not None and gate.rows == last.width:
            return _Block(None, gate)
        if len(sources) == 2 and gate is not None and up is not None and gate.rows == up.rows == last.width:
            return _Block(gate, up)
        return None

    def _sources(self, name: str) -> dict[tuple[Weight, int], bool] | None:
        """(weight, part of its product) -> whether an activation is in between; None where something else is multiplied."""
        sources: dict[tuple[str, int], bool] = {}
        todo, seen = [(name, False)], set[tuple[str, bool]]()
        while todo and len(seen) < _BETWEEN:
            name, activated = todo.pop()
            if (name, activated) in seen or name in self.constants:
                continue
            seen.add((name, activated))
            node, part = self.makers.get(name), self._part(name)
            if part is not None:
                sources[part] = sources.get(part, False) or activated
            elif node is None or node.op not in _ELEMENTWISE:
                return None
            else:
                inputs = node.inputs[:1] if node.op in _PASSING else node.inputs
                todo += [(value, activated or node.op in _ACTIVATIONS) for value in inputs if value]
        return None if todo else {(self.products[product], part): found for (product, part), found in sources.items()}

    def _part(self, name: str) -> tuple[str, int] | None:
        """(product of a weight, 0 for all of it, 1 or 2 for a half), where a value is one."""
        if name in self.products:
            return name, 0
        node = self.makers.get(name)
        if node is None or node.op != "Split" or len(node.outputs) != 2:
            return None
        product = node.inputs[0]
        for _ in range(_PASSED):
            maker = self.makers.get(product)
            if product in self.products or maker is None or maker.op not in _PASSING or not maker.inputs:
                break
            product = maker.inputs[0]
        return (product, 1 + node.outputs.index(name)) if product in self.products else None


_GATE, _UP, _FUSED = "gate_proj", "up_proj", "gate_up_proj"
_PLAIN = ("fc1", "fc_in", "c_fc", "dense_h_to_4h")
# What follows the module's name in the name of a tensor or an operation.
_TAIL = re.compile(r"(?:(?:Fused)?MatMul|Gemm|q?weight|base_layer)(?:_\w+)?", re.IGNORECASE)
_LAYER = re.compile(r"[0-9]{1,6}")
_SOURCES = 3
"""Where names are found, the best first: the tensor's name, the operation's name, the exporter's module names."""
_Path = tuple[str, ...]
"""A module's name in its parts: ("model", "layers", "0", "mlp", "gate_proj")."""


class Finder:
    """Looks up the weights of one graph by the names that packs use."""

    def __init__(self, graph: Graph, weights: Sequence[Weight]) -> None:
        """Recognizes the graph's feed-forward blocks and indexes its weights by name.

        Args:
            graph: The graph.
            weights: What `find_weights` returns for it.
        """
        walk = _Walk(graph, weights)
        self.blocks = tuple(block for weight in weights if (block := walk.block(weight)) is not None)
        """In the order in which they run."""
        self._known: dict[tuple[int, str], list[tuple[_Path, Weight]]] = {}
        for weight in weights:
            for source, texts in enumerate(((weight.tensor.name,), (weight.node.name,), weight.node.scopes)):
                for text in texts:
                    path = _parts(text)
                    while path and _TAIL.fullmatch(path[-1]):
                        path = path[:-1]
                    if path:
                        self._known.setdefault((source, path[-1]), []).append((path, weight))

    def find(self, name: str) -> tuple[Half, ...]:
        """Finds the rows of a matrix.

        Args:
            name: The name that packs use.

        Returns:
            Rows of one weight or of two, in the order of the matrix's rows; empty where the model has no such matrix.

        Raises:
            UnsupportedModelError: Several weights match the name equally well.
        """
        module = _parts(name.removesuffix(".weight"))
        if not module:
            return ()
        if whole := self._by_name(module):
            return (Half(whole, 0, whole.rows),)
        parent, part = module[:-1], module[-1]
        if part in (_GATE, _UP) and (fused := self._by_name((*parent, _FUSED))):
            # As the graph uses the packed weight; where it is not recognized, the gate comes first.
            halves = (block.gate if part == _GATE else block.up for block in self.blocks)
            rows = fused.rows // 2
            default = Half(fused, 0 if part == _GATE else rows, rows)
            return (next((half for half in halves if half is not None and half.weight is fused), default),)
        if part == _FUSED:
            gate, up = (self._by_name((*parent, other)) for other in (_GATE, _UP))
            if gate is not None and up is not None:
                return Half(gate, 0, gate.rows), Half(up, 0, up.rows)
        return self._by_structure(module)

    def _by_name(self, module: _Path) -> Weight | None:
        """The weight with a name that ends like the module's."""
        for source in range(_SOURCES):
            scores: dict[int, dict[str, Weight]] = {}
            for path, weight in self._known.get((source, module[-1]), ()):
                if score := _likeness(path, module):
                    scores.setdefault(score, {})[weight.tensor.name] = weight
            best = scores[max(scores)] if scores else {}
            if len(best) > 1:
                raise UnsupportedModelError(
                    f"{len(best)} weights of the model could be {'.'.join(module)}: {', '.join(sorted(best)[:3])}",
                    advice="Export the model anew with the names of its weights: nestpatch export MODEL --to onnx",
                )
            if best:
                return next(iter(best.values()))
        return None

    def _by_structure(self, module: _Path) -> tuple[Half, ...]:
        """The weights of the layer's feed-forward block, found by counting the blocks of the graph."""
        numbers = [int(part) for part in module if _LAYER.fullmatch(part)]
        part = module[-1]
        if len(numbers) != 1 or part not in (_GATE, _UP, _FUSED, *_PLAIN):
            return ()
        alike = [block for block in self.blocks if (block.gate is None) == (part in _PLAIN)]
        if numbers[0] >= len(alike):
            return ()
        gate, up = alike[numbers[0]].gate, alike[numbers[0]].up
        if gate is None or part == _UP:
            return (up,)
        if part == _GATE:
            return (gate,)
        if gate.weight is up.weight and gate.start + gate.rows == up.start:  # they follow each other in one weight
            return (Half(gate.weight, gate.start, gate.rows + up.rows),)
        return gate, up


def _parts(text: str) -> _Path:
    return tuple(filter(None, re.split(r"[./]", text)))


def _likeness(path: _Path, module: _Path) -> int:
    """How many of a module's last names a path ends in; 0 unless its layer's number is among them."""
    count = 0
    while count < min(len(path), len(module)) and path[-1 - count] == module[-1 - count]:
        count += 1
    layer = next((place for place, part in enumerate(module) if _LAYER.fullmatch(part)), 1)
    return count if count >= len(module) - max(0, layer - 1) else 0
