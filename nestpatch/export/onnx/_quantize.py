"""Weight-only quantization of a graph's matrices, by the functions that onnxruntime's own quantizer calls.

Every block of BLOCK weights of a neuron has one scale, rounded to nearest, without zero points. The result is that of
onnxruntime's MatMulNBitsQuantizer, byte for byte; here it needs memory for one matrix at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import QuantizationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.onnx._graph import TRANSPOSED

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK = 32
HEAD = "lm_head"
HEAD_BITS = 8
"""Of the matrix that computes logits: 4 bits would lose more there than in all others, for a few percent of the size."""
ACCURACY = 4
"""The type to which activations are rounded in products: 4 means int8. Without it, 8-bit matrices are a hundred times slower in
onnxruntime, which converts them to floats for every token."""
_SAMPLE = 16
"""Neurons of each matrix that are read back and compared."""
DOMAIN = "com.microsoft"


def quantize_graph(model: ir.Model, bits: int, on_event: OnEvent = ignore) -> int:
    """Replaces every product with a constant matrix by MatMulNBits.

    Args:
        model: The graph; changed in place.
        bits: Bits of a number, 4 or 8.
        on_event: Receives the progress.

    Returns:
        How many were replaced.
    """
    graph = model.graph
    _untie_head(model)
    found = [node for node in graph if _matrix(node) is not None]
    for number, node in enumerate(found, start=1):
        weight = node.inputs[1]
        assert weight is not None  # noqa: S101 - checked by _matrix
        wide = HEAD_BITS if str(weight.name).startswith(HEAD) else bits
        _replace(graph, node, weight, wide)
        on_event(Event("onnx.quantize", number, len(found), str(weight.name)))
    if found:
        model.graph.opset_imports[DOMAIN] = 1
    return len(found)


def _untie_head(model: ir.Model) -> None:
    """Gives a head that uses the transposed embeddings its own matrix: a lookup needs floats, a product does not."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        given = node.inputs[1] if node.op_type == "MatMul" else None
        maker = given.producer() if given is not None else None
        if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is None or maker.inputs[0].const_value is None:
            continue
        values = np.ascontiguousarray(maker.inputs[0].const_value.numpy().T)
        name = f"{HEAD}{TRANSPOSED}"
        if values.ndim != 2 or name in graph.initializers:
            continue
        weight = ir.Value(name=name, const_value=ir.tensor(values, name=name))
        graph.register_initializer(weight)
        node.replace_input_with(1, weight)
        if not maker.outputs[0].uses():
            graph.remove(maker, safe=True)


def quantize_matrix(weight: npt.NDArray[Any], bits: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Quantizes a matrix.

    Args:
        weight: [in, out].
        bits: Bits of a number, 4 or 8.

    Returns:
        (blocks uint8 [out, in / BLOCK, BLOCK * bits / 8], scales [out, in / BLOCK] in the matrix's dtype).
    """
    from onnxruntime.capi import _pybind_state as runtime

    rows, columns = weight.shape
    blocks = -(-rows // BLOCK)
    packed = np.zeros((columns, blocks, BLOCK * bits // 8), np.uint8)
    scales = np.zeros((columns, blocks), weight.dtype)
    # Unused with symmetric blocks, but required.
    zeros = np.zeros((columns, -(-blocks * bits // 8)), np.uint8)
    convert = {4: runtime.quantize_matmul_4bits, 8: runtime.quantize_matmul_8bits}[bits]
    # A traced weight may be a view of its transpose, and the function ignores strides.
    padded = np.ascontiguousarray(np.pad(weight, ((0, blocks * BLOCK - rows), (0, 0))))
    convert(packed, padded, scales, zeros, BLOCK, columns, rows, True)
    return packed, scales


def require_faithful(
    weight: npt.NDArray[Any], packed: npt.NDArray[np.uint8], scales: npt.NDArray[Any], bits: int, name: str
) -> None:
    """Reads some neurons back and compares them with the matrix.

    Args:
        weight: [in, out].
        packed: The blocks, as `quantize_matrix` returns them.
        scales: The scales.
        bits: Bits of a number.
        name: The matrix, for messages.

    Raises:
        QuantizationError: A weight differs by more than one step of its block.
    """
    chosen = np.linspace(0, weight.shape[1] - 1, num=min(_SAMPLE, weight.shape[1]), dtype=np.int64)
    codes = packed[chosen].astype(np.int16)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1)
    step = scales[chosen].astype(np.float32)[..., None]
    values = ((codes - (1 << bits - 1)) * step).reshape(len(chosen), -1)[:, : len(weight)]
    wanted = weight[:, chosen].T.astype(np.float32)
    room = 1.01 * np.abs(np.repeat(step[..., 0], BLOCK, axis=1))[:, : len(weight)]
    if not (np.abs(values - wanted) <= room).all():
        raise QuantizationError(f"{name}: onnxruntime's {bits}-bit blocks differ from the given weights")


def _matrix(node: ir.Node) -> npt.NDArray[Any] | None:
    """The constant matrix of a product, or None."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2 or weight.is_graph_input():
        return None
    values = weight.const_value.numpy()
    return values if values.dtype in (np.float32, np.float16) else None


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value, bits: int) -> None:
    import onnx_ir as ir

    values = _matrix(node)
    assert values is not None  # noqa: S101 - checked by the caller
    packed, scales = quantize_matrix(values, bits)
    require_faithful(values, packed, scales, bits, str(weight.name))
    inputs = [node.inputs[0]]
    for ending, part in ((f"_Q{bits}", packed), ("_scales", scales)):
        name = f"{weight.name}{ending}"
        value = graph.initializers.get(name) or ir.Value(name=name, const_value=ir.tensor(part, name=name))
        graph.register_initializer(value)
        inputs.append(value)
    sizes = {"K": values.shape[0], "N": values.shape[1], "bits": bits, "block_size": BLOCK, "accuracy_level": ACCURACY}
    new = ir.node("MatMulNBits", inputs, sizes, domain=DOMAIN, name=f"{node.name}_Q{bits}")
    result, old = new.outputs[0], node.outputs[0]
    result.shape, result.type, name = old.shape, old.type, str(old.name)
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.insert_after(node, new)
    graph.remove(node, safe=True)
    result.name = name
    if not weight.uses():
        del graph.initializers[str(weight.name)]
