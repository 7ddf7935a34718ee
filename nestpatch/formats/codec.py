"""How a type holds the numbers of a row: float32 to bytes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nestpatch.rows import DTYPES, FloatArray

Blocks = npt.NDArray[np.uint8]
_STEPS = {"F32": 1 << 25, "BF16": 1 << 9, "F16": 1 << 12}


class Codec(Protocol):
    """One way to store rows. Every row is stored by itself, so a few rows give the bytes that the whole tensor would give."""

    @property
    def bits(self) -> float:
        """Per number, scales included."""

    @property
    def steps(self) -> int:
        """Between the smallest and the largest value of a block."""

    @property
    def span(self) -> int:
        """Numbers that share a scale."""

    @property
    def witnesses(self) -> int:
        """How many rows `fitted` wants to see; 0 where any rounding of the base will do."""

    def require(self) -> None:
        """Raises QuantizationError, with the way out, when rows cannot be encoded here."""

    def encode(self, rows: FloatArray) -> Blocks:
        """float32 [rows, width] -> uint8 [rows, row_bytes]. Raises QuantizationError when that cannot be done here."""

    def decode(self, blocks: Blocks) -> FloatArray:
        """uint8 [rows, row_bytes] -> float32 [rows, width]. Raises QuantizationError for types that hold no numbers."""

    def fitted(self, origin: FloatArray, stored: Blocks) -> Codec:
        """The codec that makes `stored` of `origin`, for rows that nothing has changed since they were quantized.

        Raises QuantizationError when the file was quantized in another way than this codec knows.
        """


@dataclass(frozen=True)
class FloatCodec:
    """Plain numbers: rounding to the dtype is all there is."""

    dtype: str
    span = 1
    witnesses = 0

    @property
    def bits(self) -> float:
        """Per number."""
        return 8.0 * DTYPES[self.dtype].itemsize

    @property
    def steps(self) -> int:
        """From -x to x, at the precision that numbers near x have."""
        return _STEPS[self.dtype]

    def require(self) -> None:
        """Can be done everywhere."""

    def encode(self, rows: FloatArray) -> Blocks:
        """Rounds to nearest, ties to even."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(rows.astype(DTYPES[self.dtype])).view(np.uint8)

    def decode(self, blocks: Blocks) -> FloatArray:
        """Widens."""
        return np.ascontiguousarray(blocks).view(DTYPES[self.dtype]).astype(np.float32)

    def fitted(self, origin: FloatArray, stored: Blocks) -> FloatCodec:  # noqa: ARG002 - the protocol's signature
        """There is one way to round."""
        return self
