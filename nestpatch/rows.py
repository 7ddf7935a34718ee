"""The arithmetic of weight rows: digest, sketch, merge. Implements docs/nest-format.md, which is normative.

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

BLOCK_TYPES: dict[str, tuple[int, int]] = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "IQ4_NL": (32, 18),
    "MXFP4": (32, 17), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ3_S": (256, 110), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66),
}  # fmt: skip
"""The quantized types of GGUF files that a pack's base may have -> (elements, bytes) of a block."""

_SUM_BYTES = 1 << 18
"""Bytes of the float64 sums that are held at a time: they fit into the cache of a processor."""
SKETCHES = 4
"""Projections per row."""
SKETCH_MATCH = 0.95
"""Correlation from which two blocks of sketches count as the same rows."""


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The safetensors name of one of DTYPES."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def united(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """The row numbers that are in any of several arrays.

    np.unique would do, but imports all of numpy.ma, which takes longer than hashing the rows of a small model.

    Args:
        parts: Row numbers, at least one array of them.

    Returns:
        int64, sorted, each once.
    """
    rows = np.sort(np.concatenate([part.astype(np.int64) for part in parts]))
    kept: npt.NDArray[np.int64] = rows[np.concatenate([rows[:1] == rows[:1], rows[1:] != rows[:-1]])]
    return kept


def digest(blocks: Iterable[Rows]) -> str:
    """SHA-256 (hex) of the bytes of consecutive blocks of rows.

    Args:
        blocks: Arrays or buffers of any dtype; how the rows are divided into blocks makes no difference.
    """
    state = sha256()
    for block in blocks:
        state.update(np.ascontiguousarray(block).view(np.uint8).data)
    return state.hexdigest()


def sketch_signs(in_features: int) -> npt.NDArray[np.int8]:
    """The signs of the projections: bit i (least significant first) of SHAKE-256("nest/1 sketch <in_features>") is sign i.

    Args:
        in_features: Width of a row.

    Returns:
        int8 [SKETCHES, in_features]: +1 for a bit of 0, -1 for a bit of 1.
    """
    count = SKETCHES * in_features
    stream = shake_256(f"nest/1 sketch {in_features}".encode()).digest((count + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little", count=count)
    return (1 - 2 * bits.astype(np.int8)).reshape(SKETCHES, in_features)


def sketch(rows: Rows) -> npt.NDArray[np.float16]:
    """Projections of each row divided by its Euclidean norm.

    A sketch survives quantization, because rounding noise averages out, and so identifies rows whose digest has changed.

    Args:
        rows: [rows, in_features], any float dtype.

    Returns:
        float16 [rows, SKETCHES]; zeros for a row of zeros.
    """
    wide = rows.astype(np.float64)
    # A damaged model may hold infinities; the sketch is then NaN, which matches nothing.
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.sqrt(np.square(wide).sum(axis=1, keepdims=True))
        projected = wide @ sketch_signs(rows.shape[1]).T.astype(np.float64)
        scaled: npt.NDArray[np.float64] = np.divide(projected, norms, out=np.zeros_like(projected), where=norms > 0)
        return scaled.astype(np.float16)


def sketch_correlation(ours: npt.NDArray[np.float16], theirs: npt.NDArray[np.float16]) -> float:
    """Uncentred correlation of two blocks of sketches.

    Args:
        ours: float16 [rows, SKETCHES].
        theirs: The same shape.

    Returns:
        1 for the same rows, about 0 for unrelated ones; SKETCH_MATCH is the limit for "the same".
    """
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float(np.array_equal(a, b))


def inner(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    """The sum of the products of two blocks of rows, added in float64.

    BLAS would need copies in float64, and its threads keep the processors busy while they wait for more.

    Args:
        ours: [rows, in_features], any float dtype of numpy.
        theirs: The same shape.
    """
    return float(np.einsum("ij,ij->", ours, theirs, dtype=np.float64))


def row_space(matrix: Rows) -> FloatArray:
    """An orthonormal basis of the space that the rows of a matrix span.

    Args:
        matrix: [n, in_features], any float dtype.

    Returns:
        float32 [k, in_features], where k is the numerical rank in float32, by the rule of `numpy.linalg.matrix_rank`; the
        directions of the largest singular values first.
    """
    _, sizes, directions = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    least = sizes[0] * max(matrix.shape) * np.finfo(np.float32).eps
    basis: FloatArray = directions[sizes > least].astype(np.float32)
    return basis


def merge(rows: Rows, delta: Rows, strength: float = 1.0) -> Rows:
    """The merge rule: widen to float32, add strength * delta, round to nearest-even back to the dtype of `rows`.

    Args:
        rows: The base's rows, [rows, in_features], in one of DTYPES.
        delta: Their change, the same shape, any float dtype.
        strength: Factor on the change.

    Returns:
        The merged rows in the dtype of `rows`.

    Raises:
        PackContentError: A sum leaves the range of the dtype.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        summed = rows.astype(np.float32)
        summed += scaled(delta, strength)
        merged: Rows = summed.astype(rows.dtype, copy=False)
    if not _finite(merged):
        raise PackContentError(f"the merged weights leave the range of {dtype_name(rows.dtype)}")
    return merged


def scaled(delta: Rows, strength: float) -> FloatArray:
    """What the merge rule adds.

    Args:
        delta: The change, any float dtype.
        strength: Factor on it.

    Returns:
        float32 of the same shape; at strength 1 the delta itself where it has this dtype.
    """
    wide: FloatArray = delta.astype(np.float32, copy=False)
    return wide if strength == 1.0 else np.float32(strength) * wide


def _finite(rows: Rows) -> bool:
    """Whether no element of contiguous rows is infinite or NaN, by their exponents: a third of the time of isfinite."""
    pattern = f"u{rows.dtype.itemsize}"
    infinity = np.array(np.inf, rows.dtype).view(pattern)
    return bool((rows.view(pattern) & infinity).max(initial=0) < infinity)


def low_rank(factors: Rows, basis: Rows) -> FloatArray:
    """The changes that factors make of a basis: sums over k, in this order, in float64, rounded once to float32.

    A product of matrices by a library adds in another order and so gives other bytes.

    Args:
        factors: [rows, rank], any float dtype of at most 32 bits, whose products are exact in float64.
        basis: [rank, in_features], likewise.

    Returns:
        float32 [rows, in_features].
    """
    weights, vectors = factors.astype(np.float64), basis.astype(np.float64)
    change = np.empty((len(weights), vectors.shape[1]), np.float32)
    step = max(1, _SUM_BYTES // (8 * vectors.shape[1]))
    for start in range(0, len(weights), step):
        part = weights[start : start + step]
        total = np.zeros((len(part), vectors.shape[1]))
        product = np.empty_like(total)
        for k, vector in enumerate(vectors):
            np.multiply(part[:, k, None], vector, out=product)
            total += product
        change[start : start + step] = total
    return change
