"""Sums of squares over rows, for the norms that differences are told in."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from nestpatch.rows import Rows

Sums = npt.NDArray[np.float64]


def finite(value: float) -> float | None:
    """The value, or None for infinity and NaN, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def squares(ours: Rows, theirs: Rows) -> tuple[Sums, Sums]:
    """Sums of squares of B - A and of A, per row."""
    if ours.dtype == np.uint8:  # bytes of who knows what
        return np.full(len(ours), np.nan), np.full(len(ours), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        base = ours.astype(np.float64)
        change = theirs.astype(np.float64) - base
        return np.einsum("ij,ij->i", change, change), np.einsum("ij,ij->i", base, base)
