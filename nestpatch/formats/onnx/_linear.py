"""Which weights a graph multiplies with, and how their rows lie: a row is what one neuron has, whatever the file calls rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from nestpatch.formats.onnx._graph import Graph, Node
from nestpatch.formats.onnx._tensors import Initializer

MICROSOFT = "com.microsoft"
NBITS = "MatMulNBits"
_CODED = {
    # Operation -> the input that is its weight
    "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "QLinearMatMul": 3, "QGemm": 3, "MatMulBnb4": 1,
    "MatMulFpQ4": 1,
}  # fmt: skip
"""Operations with weights in a form that nobody here writes."""
_STEPS = 5
"""Operations between a weight and its multiplication."""
_Identity = tuple[str, tuple[str, ...]]
"""An operation's name and outputs: both branches of an If may hold the same one, which no graph does twice."""


class Form(Enum):
    """How the bytes of a weight lie."""

    ROWS = "a row after the other"
    COLUMNS = "transposed: a row is a column of the file"
    BLOCKS = "quantized blocks, their scales and zero points beside them"
    OTHER = "in another way"


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that the graph multiplies with."""

    node: Node
    """The multiplication."""
    tensor: Initializer
    """Its numbers; of a quantized one its blocks."""
    form: Form
    rows: int
    width: int
    """Numbers of a row."""
    trouble: str = ""
    """Why its rows must not be changed; empty where they may be."""


def find_weights(graph: Graph) -> tuple[Weight, ...]:
    """All weights of a graph, in the order of the operations that use them."""
    makers = {name: node for node in graph.nodes for name in node.outputs if name and node.op != "Constant"}
    found = [weight for node in graph.nodes for weight in _weights(node, graph.tensors, makers)]
    shared = _shared(graph, found)
    return tuple(weight if weight.trouble else replace(weight, trouble=_sharing(weight, shared)) for weight in found)


def _shared(graph: Graph, weights: Iterable[Weight]) -> Mapping[str, set[_Identity]]:
    """Tensor -> the operations that read it, directly or as their weight."""
    readers: dict[str, set[_Identity]] = {}
    for node in graph.nodes:
        for name in node.inputs:
            readers.setdefault(name, set()).add((node.name, node.outputs))
    users: dict[str, set[_Identity]] = {}
    for weight in weights:
        users.setdefault(weight.tensor.name, set()).add((weight.node.name, weight.node.outputs))
    return {name: max(found, users.get(name, set()), key=len) for name, found in readers.items()}


def _sharing(weight: Weight, shared: Mapping[str, set[_Identity]]) -> str:
    names = weight.node.inputs[1:4] if weight.form is Form.BLOCKS else (weight.tensor.name,)
    for name in filter(None, names):
        if len(shared[name]) > 1:
            return f"{len(shared[name])} operations read {name[:80]}: a patch would change all of them"
    return ""


def _weights(node: Node, tensors: Mapping[str, Initializer], makers: Mapping[str, Node]) -> Iterator[Weight]:
    if node.op in ("MatMul", "FusedMatMul", "Gemm") and len(node.inputs) > 1:
        weight = _float_weight(node, tensors, makers)
    elif node.op == NBITS and node.domain == MICROSOFT and len(node.inputs) > 2:
        weight = _block_weight(node, tensors)
    elif node.op in _CODED and len(node.inputs) > _CODED[node.op]:
        weight = _coded_weight(node, tensors)
    else:
        return
    if weight is not None:
        yield weight


def _float_weight(node: Node, tensors: Mapping[str, Initializer], makers: Mapping[str, Node]) -> Weight | None:
    """The second factor of a product, as far back as it is only passed on, turned or widened."""
    name, turned, trouble = node.inputs[1], bool(node.numbers.get("transB")), ""
    for _ in range(_STEPS):
        if name in tensors:
            break
        maker = makers.get(name)
        if maker is None or not maker.inputs:
            return None
        if maker.op == "Transpose" and maker.lists.get("perm", (1, 0)) == (1, 0):
            turned = not turned
        elif maker.op == "DequantizeLinear":
            trouble = "it is quantized in QDQ form (DequantizeLinear)"
        elif maker.op not in ("Cast", "Identity"):
            return None
        name = maker.inputs[0]
    tensor = tensors.get(name)
    # Some exporters keep dimensions of one in front.
    if tensor is None or len(tensor.shape) < 2 or any(n != 1 for n in tensor.shape[:-2]):
        return None
    rows, width = tensor.shape[-2:] if turned else tensor.shape[:-3:-1]
    return Weight(node, tensor, Form.ROWS if turned else Form.COLUMNS, rows, width, trouble)


def _block_weight(node: Node, tensors: Mapping[str, Initializer]) -> Weight | None:
    tensor = tensors.get(node.inputs[1])
    if tensor is None:
        return None
    trouble = ""
    if node.numbers.get("weight_prepacked"):
        trouble = "its blocks are prepacked for one kind of GPU (weight_prepacked)"
    elif len(node.inputs) > 4 and node.inputs[4]:
        trouble = "its columns stand in another order (g_idx)"
    return Weight(node, tensor, Form.BLOCKS, node.numbers.get("N", 0), node.numbers.get("K", 0), trouble)


def _coded_weight(node: Node, tensors: Mapping[str, Initializer]) -> Weight | None:
    tensor = tensors.get(node.inputs[_CODED[node.op]])
    if tensor is None or len(tensor.shape) < 2:
        return None
    width, rows = tensor.shape[-2:]
    return Weight(node, tensor, Form.OTHER, rows, width, f"it is stored for {node.op}")
