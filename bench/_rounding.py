"""Other types through whose rounding deltas can be trained than that of the base's file: for files that are quantized later."""

from __future__ import annotations

from dataclasses import replace

from nestpatch.errors import QuantizationError
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.gguf.quants import block, codec
from nestpatch.formats.onnx._nbits import NBitsCodec

OWN, NONE, INT4 = "own", "none", "int4"
TYPES = (OWN, NONE, "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k", INT4)
"""The base's own, no rounding, types of GGUF files, and that of 4-bit ONNX exports."""
_SPAN = 32
"""Numbers of a block that the export to ONNX gives one scale."""


def rounded_as(kind: str, info: TensorInfo) -> TensorInfo:
    """The tensor in the type through whose rounding its rows are trained.

    Each patched row is then the rounded sum of the base's row and its delta: `apply` with the float base and `export` write it.

    Args:
        kind: One of TYPES.
        info: The tensor in the base's file.

    Returns:
        The tensor with the name and the codec of that type; plain numbers where rows are not rounded.

    Raises:
        QuantizationError: Rows of this width do not fit into blocks of the type, or they cannot be quantized on this machine.
    """
    if kind == OWN:
        return info
    if kind == NONE:
        return replace(info, dtype="F32", codec=None)
    width = info.shape[-1]
    if kind == INT4:
        return replace(info, dtype="INT4", codec=NBitsCodec(4, _SPAN, width, "F32", zero_points=False))
    elements, _ = block(kind.upper())
    if width % elements:
        raise QuantizationError(
            f"rows of {info.name} have {width} numbers, which do not fit into blocks of {kind}, which have {elements}",
            advice="llama.cpp gives such rows another type: q5_0 in Q4_K files, q5_1 in Q5_K, q8_0 in Q6_K. Name that one.",
        )
    coding = codec(kind.upper())
    coding.require()
    return replace(info, dtype=kind.upper(), codec=coding)
