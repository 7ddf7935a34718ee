"""The type through whose rounding deltas are trained: that of the base's file, or the one that the setting `round_to` names."""

from __future__ import annotations

from dataclasses import replace

from nestpatch.errors import QuantizationError
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.gguf.quants import block, codec
from nestpatch.formats.onnx import NBitsCodec

AUTO, NONE, INT4 = "auto", "none", "int4"
_SPAN = 32
"""Numbers of a block that the export to ONNX gives one scale."""


def rounded_as(round_to: str, info: TensorInfo) -> TensorInfo | None:
    """The tensor in the type through whose rounding its rows are trained.

    Args:
        round_to: The setting of the recipe.
        info: The tensor in the base's file.

    Returns:
        The tensor with the name and the codec of that type; None where rows are not rounded.

    Raises:
        QuantizationError: Rows of this width do not fit into blocks of the type, or they cannot be quantized on this machine.
    """
    if round_to == NONE or (round_to == AUTO and info.plain):
        return None
    if round_to == AUTO:
        return info
    width = info.shape[-1]
    if round_to == INT4:
        return replace(info, dtype="INT4", codec=NBitsCodec(4, _SPAN, width, "F32", zero_points=False))
    kind = round_to.upper()
    elements, _ = block(kind)
    if width % elements:
        raise QuantizationError(
            f"round_to={round_to}: rows of {info.name} have {width} numbers, which do not fit into blocks of {elements}",
            advice="llama.cpp gives such rows another type: q5_0 in Q4_K files, q5_1 in Q5_K, q8_0 in Q6_K. Name that one.",
        )
    coding = codec(kind)
    coding.require()
    return replace(info, dtype=kind, codec=coding)
