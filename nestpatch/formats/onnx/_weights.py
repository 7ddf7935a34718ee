"""The weights that a graph multiplies with: which they are, how their rows are stored, and whether they may be changed.

A row is what one neuron has, whatever the file calls rows. `find_weights` looks at the graph only; `stored` looks at the type
and the bytes of one weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from nestpatch.errors import CheckpointError, QuantizationError, UnsupportedModelError
from nestpatch.formats._codec import Codec
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.onnx._layout import ColumnLayout, Layout, RowLayout
from nestpatch.formats.onnx._nbits import BITS, NBitsCodec
from nestpatch.formats.onnx._tensors import Initializer
from nestpatch.formats.onnx.graph import Graph, Node
from nestpatch.rows import DTYPES

_MICROSOFT = "com.microsoft"
_NBITS = "MatMulNBits"
_MAX_BLOCK = 1 << 20
"""Numbers that share a scale."""
WAY_OUT = "Patch the float model and export it anew, or load the pack beside the model as an adapter."
_CODED = {
    # Operation -> the input that is its weight
    "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "QLinearMatMul": 3, "QGemm": 3, "MatMulBnb4": 1,
    "MatMulFpQ4": 1,
}  # fmt: skip
"""Operations with weights in a form that nestpatch cannot write."""
_STEPS = 5
"""Operations between a weight and its multiplication."""
_Identity = tuple[str, tuple[str, ...]]
"""An operation's name and outputs: the same pair may occur once in each branch of an If, and is then one operation."""


class Form(Enum):
    """How the bytes of a weight are arranged."""

    ROWS = "one row after the other"
    COLUMNS = "transposed: a row is a column of the file"
    BLOCKS = "quantized blocks, with scales and zero points in other tensors"
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


@dataclass(frozen=True)
class Stored:
    """The rows of one weight in files."""

    layout: Layout
    dtype: str
    codec: Codec | None


def find_weights(graph: Graph) -> tuple[Weight, ...]:
    """Finds the weights of a graph.

    Args:
        graph: The graph.

    Returns:
        The weights in the order of the operations that use them, those that must not be patched included.
    """
    makers = {name: node for node in graph.nodes for name in node.outputs if name and node.op != "Constant"}
    found = [weight for node in graph.nodes if (weight := _weight(node, graph.tensors, makers)) is not None]
    shared = _shared(graph, found)
    for place, weight in enumerate(found):
        names = weight.node.inputs[1:4] if weight.form is Form.BLOCKS else (weight.tensor.name,)
        read = next((name for name in names if name and len(shared[name]) > 1), None)
        if read is not None and not weight.trouble:
            trouble = f"{len(shared[read])} operations read {read[:80]}: a patch would change all of them"
            found[place] = replace(weight, trouble=trouble)
    return tuple(found)


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


def _weight(node: Node, tensors: Mapping[str, Initializer], makers: Mapping[str, Node]) -> Weight | None:
    if node.op in ("MatMul", "FusedMatMul", "Gemm") and len(node.inputs) > 1:
        return _float_weight(node, tensors, makers)
    if node.op == _NBITS and node.domain == _MICROSOFT and len(node.inputs) > 2:
        return _block_weight(node, tensors)
    if node.op in _CODED and len(node.inputs) > _CODED[node.op]:
        tensor = tensors.get(node.inputs[_CODED[node.op]])
        if tensor is not None and len(tensor.shape) > 1:
            width, rows = tensor.shape[-2:]
            return Weight(node, tensor, Form.OTHER, rows, width, f"it is stored for {node.op}")
    return None


def _float_weight(node: Node, tensors: Mapping[str, Initializer], makers: Mapping[str, Node]) -> Weight | None:
    """The second factor of a product, followed back through operations that only pass on, transpose or widen it."""
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
        trouble = "its columns are in another order (g_idx)"
    return Weight(node, tensor, Form.BLOCKS, node.numbers.get("N", 0), node.numbers.get("K", 0), trouble)


def stored(weight: Weight, tensors: Mapping[str, Initializer]) -> Stored:
    """Finds where the rows of a weight are stored.

    Args:
        weight: The weight.
        tensors: The tensors of its graph.

    Returns:
        How its rows are read and written, and their type.

    Raises:
        QuantizationError: The rows are quantized in a form that cannot be patched.
        UnsupportedModelError: The rows must not be changed, or are stored in a type that cannot be patched.
    """
    if weight.form is Form.BLOCKS:
        return _stored_blocks(weight, tensors)
    tensor = weight.tensor
    if trouble := weight.trouble or tensor.trouble:
        raise refusal(tensor, trouble)
    if tensor.dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise refusal(tensor, f"it is stored as {tensor.dtype}; only {known} and {BITS} bits of MatMulNBits can be patched")
    if not tensor.nbytes:
        raise refusal(tensor, "it is empty")
    if weight.form is Form.ROWS:
        return Stored(RowLayout(_part(tensor, weight.rows)), tensor.dtype, None)
    columns = TensorInfo(tensor.name, tensor.dtype, (weight.width, weight.rows), tensor.file, tensor.offset, tensor.nbytes)
    return Stored(ColumnLayout(columns, DTYPES[tensor.dtype].itemsize), tensor.dtype, None)


def _stored_blocks(weight: Weight, tensors: Mapping[str, Initializer]) -> Stored:
    """The rows of a MatMulNBits: its parts must have the sizes that its attributes promise."""
    node, names = weight.node, [name for name in weight.node.inputs[1:4] if name]
    parts = [tensors[name] for name in names if name in tensors]
    if trouble := weight.trouble or next((f"{part.name}: {part.trouble}" for part in parts if part.trouble), ""):
        raise refusal(weight.tensor, trouble)
    if len(parts) != len(names):
        raise refusal(weight.tensor, "its scales or zero points are computed, not stored")
    scales, zero_points = parts[1], parts[2] if len(parts) > 2 else None
    bits, block = node.numbers.get("bits", 4), node.numbers.get("block_size", 0)
    if bits not in BITS or not 16 <= block <= _MAX_BLOCK or block & (block - 1) or scales.dtype not in DTYPES:
        raise refusal(weight.tensor, f"its form is not known: {bits} bits, blocks of {block}, scales of {scales.dtype}")
    if weight.tensor.dtype != "U8" or (zero_points is not None and zero_points.dtype != "U8"):
        raise refusal(weight.tensor, "its zero points are not packed, as rounding to nearest packs them")
    if weight.rows <= 0 or weight.width <= 0:
        raise refusal(weight.tensor, f"its form is not known: {weight.rows} rows of {weight.width}")
    codec = NBitsCodec(bits, block, weight.width, scales.dtype, zero_points is not None, narrow_last=scales.dtype == "BF16")
    for part, nbytes in zip(parts, codec.parts, strict=False):
        if part.nbytes != nbytes * weight.rows:
            wanted = f"{weight.rows} rows of {codec.name} need {nbytes * weight.rows}"
            raise refusal(weight.tensor, f"{part.name} has {part.nbytes} bytes where {wanted}")
    return Stored(RowLayout(*(_part(part, weight.rows) for part in parts)), codec.name, codec)


def _part(tensor: Initializer, rows: int) -> TensorInfo:
    """The bytes of a tensor as a matrix with that many rows."""
    return TensorInfo(tensor.name, "U8", (rows, tensor.nbytes // rows), tensor.file, tensor.offset, tensor.nbytes)


def refusal(tensor: Initializer, trouble: str) -> CheckpointError:
    """The error that says why a tensor cannot be patched.

    Args:
        tensor: The tensor.
        trouble: The reason.

    Returns:
        QuantizationError for types of quantized numbers, UnsupportedModelError for others; not raised.
    """
    kind = UnsupportedModelError if tensor.dtype in DTYPES else QuantizationError
    return kind(f"the rows of {tensor.name[:120]} cannot be patched: {trouble}", advice=WAY_OUT)
