"""A weight of the graph as rows in files: which type they have, and whether they may be changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestpatch.errors import CheckpointError, QuantizationError, UnsupportedModelError
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.codec import Codec
from nestpatch.formats.onnx._layout import ColumnLayout, Layout, RowLayout
from nestpatch.formats.onnx._linear import Form, Weight
from nestpatch.formats.onnx._nbits import BITS, NBitsCodec
from nestpatch.formats.onnx._tensors import Initializer
from nestpatch.rows import DTYPES

MAX_BLOCK = 1 << 20
"""Numbers that share a scale."""
WAY_OUT = "Patch the float model and export it anew, or load the patch beside the model as an adapter."


@dataclass(frozen=True)
class Stored:
    """Rows of one weight."""

    layout: Layout
    dtype: str
    codec: Codec | None


def stored(weight: Weight, tensors: Mapping[str, Initializer]) -> Stored:
    """Where the rows of a weight are. Raises QuantizationError or UnsupportedModelError when they cannot be patched."""
    if weight.form is Form.BLOCKS:
        return _blocks(weight, tensors)
    tensor = weight.tensor
    if trouble := weight.trouble or tensor.trouble:
        raise refusal(tensor, trouble)
    if tensor.dtype not in DTYPES:
        raise refusal(
            tensor, f"it holds {tensor.dtype}; only {', '.join(DTYPES)} and {BITS} bits of MatMulNBits can be patched"
        )
    if not tensor.nbytes:
        raise refusal(tensor, "it is empty")
    if weight.form is Form.ROWS:
        return Stored(RowLayout((_part(tensor, weight.rows),)), tensor.dtype, None)
    columns = TensorInfo(tensor.name, tensor.dtype, (weight.width, weight.rows), tensor.file, tensor.offset, tensor.nbytes)
    return Stored(ColumnLayout(columns, DTYPES[tensor.dtype].itemsize), tensor.dtype, None)


def _blocks(weight: Weight, tensors: Mapping[str, Initializer]) -> Stored:
    """The rows of a MatMulNBits: its parts must have the sizes that its attributes promise."""
    node, names = weight.node, [name for name in weight.node.inputs[1:4] if name]
    parts = [tensors[name] for name in names if name in tensors]
    if trouble := weight.trouble or next((f"{part.name}: {part.trouble}" for part in parts if part.trouble), ""):
        raise refusal(weight.tensor, trouble)
    if len(parts) != len(names):
        raise refusal(weight.tensor, "its scales or zero points are computed, not stored")
    scales, zero_points = parts[1], parts[2] if len(parts) > 2 else None
    bits, block = node.numbers.get("bits", 4), node.numbers.get("block_size", 0)
    if bits not in BITS or not 16 <= block <= MAX_BLOCK or block & (block - 1) or scales.dtype not in DTYPES:
        raise refusal(weight.tensor, f"its form is not known: {bits} bits, blocks of {block}, scales of {scales.dtype}")
    if weight.tensor.dtype != "U8" or (zero_points is not None and zero_points.dtype != "U8"):
        raise refusal(weight.tensor, "its zero points are not packed, which rounding to nearest does not make")
    if weight.rows <= 0 or weight.width <= 0:
        raise refusal(weight.tensor, f"its form is not known: {weight.rows} rows of {weight.width}")
    codec = NBitsCodec(bits, block, weight.width, scales.dtype, zero_points is not None, narrow_last=scales.dtype == "BF16")
    for part, nbytes in zip(parts, codec.parts, strict=False):
        if part.nbytes != nbytes * weight.rows:
            wanted = f"{weight.rows} rows of {codec.name} need {nbytes * weight.rows}"
            raise refusal(weight.tensor, f"{part.name} has {part.nbytes} bytes where {wanted}")
    return Stored(RowLayout(tuple(_part(part, weight.rows) for part in parts)), codec.name, codec)


def _part(tensor: Initializer, rows: int) -> TensorInfo:
    """The bytes of a tensor as a matrix of so many rows."""
    return TensorInfo(tensor.name, "U8", (rows, tensor.nbytes // rows), tensor.file, tensor.offset, tensor.nbytes)


def refusal(tensor: Initializer, trouble: str) -> CheckpointError:
    """The error that says why a tensor cannot be patched."""
    kind = UnsupportedModelError if tensor.dtype in DTYPES else QuantizationError
    return kind(f"the rows of {tensor.name[:120]} cannot be patched: {trouble}", advice=WAY_OUT)
