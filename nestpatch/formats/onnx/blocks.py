"""Feed-forward blocks, found by the shape of the graph when all names are gone.

The last weight of such a block multiplies the product of two others, of which one, the gate, went through an activation; in
plain blocks it multiplies a single other one that did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestpatch.formats.onnx.graph import Graph, Node
from nestpatch.formats.onnx.linear import Weight

ACTIVATIONS = frozenset(
    ["Sigmoid", "Gelu", "Erf", "Tanh", "QuickGelu", "FastGelu", "BiasGelu", "Swish", "Silu", "Relu", "LeakyRelu", "Elu"]
    + ["HardSwish"]
)
_PASSING = frozenset({"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"})
"""Operations that hand on their first input."""
_ELEMENTWISE = frozenset({"Mul", "Add", "Div", "Pow", "Sub", "Sqrt", "Neg"}) | _PASSING | ACTIVATIONS
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
class Block:
    """One feed-forward block."""

    gate: Half | None
    """None in a plain block."""
    up: Half


def find_blocks(graph: Graph, weights: Sequence[Weight]) -> tuple[Block, ...]:
    """All feed-forward blocks, in the order in which they run."""
    walk = _Walk(graph, weights)
    found = (walk.block(weight) for weight in weights)
    return tuple(block for block in found if block is not None)


class _Walk:
    """Goes from a weight back to those whose products it multiplies."""

    def __init__(self, graph: Graph, weights: Sequence[Weight]) -> None:
        self.makers: Mapping[str, Node] = {name: node for node in graph.nodes for name in node.outputs if name}
        self.constants = graph.tensors.keys() | {name for node in graph.nodes if node.op == "Constant" for name in node.outputs}
        self.products = {weight.node.outputs[0]: weight for weight in weights if weight.node.outputs}

    def block(self, last: Weight) -> Block | None:
        """The block that a weight ends, if it ends one."""
        sources = self._sources(last.node.inputs[0])
        if sources is None:
            return None
        halves = {activated: self._half(*source) for source, activated in sources.items()}
        gate, up = halves.get(True), halves.get(False)
        if len(sources) == 1 and gate is not None and gate.rows == last.width:
            return Block(None, gate)
        if len(sources) == 2 and gate is not None and up is not None and gate.rows == up.rows == last.width:
            return Block(gate, up)
        return None

    def _sources(self, name: str) -> dict[tuple[Weight, int], bool] | None:
        """(weight, part of its product) -> whether an activation lies between; None where the way leads elsewhere."""
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
                todo += [(value, activated or node.op in ACTIVATIONS) for value in inputs if value]
        return None if todo else {(self.products[product], part): found for (product, part), found in sources.items()}

    def _part(self, name: str) -> tuple[str, int] | None:
        """(a weight's product, 0 for all of it, 1 or 2 for a half), if a value is that."""
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

    def _half(self, weight: Weight, part: int) -> Half:
        rows = weight.rows if part == 0 else weight.rows // 2
        return Half(weight, rows if part == 2 else 0, rows)
