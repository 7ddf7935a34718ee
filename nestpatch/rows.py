"""The arithmetic of weight rows: digest, sketch, merge. docs/nest-format.md is normative; this implements it.

A block of rows is a 2-D array [rows, in_features] in the dtype that the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256, shake_256
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nestpatch.errors import PackContentError

Rows: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[np.float32]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
"""The dtypes that weights and deltas may have, by their safetensors names."""

SKETCHES = 4
"""Projections per row."""
SKETCH_MATCH = 0.95
"""Correlation from which two blocks of sketches count as the same rows."""


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of one of DTYPES."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def digest(blocks: Iterable[Rows]) -> str:
    """SHA-256 (hex) over the bytes of consecutive blocks of rows."""
    state = sha256()
    for block in blocks:
        state.update(np.ascontiguousarray(block).view(np.uint8).data)
    return state.hexdigest()


def sketch_signs(in_features: int) -> npt.NDArray[np.int8]:
    """The signs of the projections, +1 or -1, int8 [SKETCHES, in_features].

    Bit i (least significant first) of SHAKE-256("nest/1 sketch <in_features>") is sign i: 0 is +1, 1 is -1.
    """
    count = SKETCHES * in_features
    stream = shake_256(f"nest/1 sketch {in_features}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little", count=count)
    return (1 - 2 * bits.astype(np.int8)).reshape(SKETCHES, in_features)


def sketch(rows: Rows) -> npt.NDArray[np.float16]:
    """Projections of each row divided by its Euclidean norm, float16 [rows, SKETCHES]; a zero row gives zeros.

    Survives quantization (rounding noise averages out) and tells rows apart that a digest could not compare any more.
    """
    wide = rows.astype(np.float64)
    # A damaged model may hold infinities; its sketch is then NaN, which matches nothing.
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        projected = wide @ sketch_signs(rows.shape[1]).T.astype(np.float64)
        scaled: npt.NDArray[np.float64] = np.divide(projected, norms, out=np.zeros_like(projected), where=norms > 0)
        return scaled.astype(np.float16)


def sketch_correlation(ours: npt.NDArray[np.float16], theirs: npt.NDArray[np.float16]) -> float:
    """Uncentred correlation of two blocks of sketches: 1 for the same rows, about 0 for unrelated ones."""
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float(np.array_equal(a, b))


def merge(rows: Rows, delta: Rows, strength: float = 1.0) -> Rows:
    """The merge rule: widen to float32, add strength * delta, round to nearest-even back to the dtype of `rows`.

    rows, delta: [rows, in_features]. Raises PackContentError when a sum leaves the range of the dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        summed = rows.astype(np.float32) + np.float32(strength) * delta.astype(np.float32, copy=False)
        merged = summed.astype(rows.dtype)
        finite = bool(np.isfinite(merged.astype(np.float32, copy=False)).all())
    if not finite:
        raise PackContentError(f"the merged weights leave the range of {dtype_name(rows.dtype)}")
    return merged
