"""How a type stores the numbers of a row: float32 to bytes and back."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from nestpatch.rows import DTYPES, FloatArray
from nestpatch.values import dataclass

Blocks = npt.NDArray[np.uint8]
_STEPS = {"F32": 1 << 25, "BF16": 1 << 9, "F16": 1 << 12}


class Codec(Protocol):
    """One way to store rows. Each row is stored by itself: encoding a few rows gives the bytes that the whole tensor gives.

    A codec may inherit the defaults: rows can always be encoded, and there is nothing to fit.
    """

    @property
    def bits(self) -> float:
        """Bits per number, scales included."""

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest value of a block."""

    @property
    def span(self) -> int:
        """Numbers that share a scale."""

    @property
    def witnesses(self) -> int:
        """How many rows `fitted` needs; 0 where the codec has nothing to fit."""
        return 0

    def require(self) -> None:
        """Checks that rows can be encoded on this machine.

        Raises:
            QuantizationError: They cannot; the advice says what to do.
        """
        return

    def encode(self, rows: FloatArray) -> Blocks:
        """Encodes rows.

        Args:
            rows: float32 [rows, width].

        Returns:
            uint8 [rows, row_bytes].

        Raises:
            QuantizationError: They cannot be encoded on this machine.
        """

    def decode(self, blocks: Blocks) -> FloatArray:
        """Decodes rows.

        Args:
            blocks: uint8 [rows, row_bytes].

        Returns:
            float32 [rows, width].

        Raises:
            QuantizationError: The type holds no numbers.
        """

    def fitted(self, origin: FloatArray, stored: Blocks) -> Codec:
        """Finds the variant of this codec that a file was quantized with.

        Args:
            origin: float32 [rows, width], rows of the float model.
            stored: uint8 [rows, row_bytes], the same rows in the file, unchanged since they were quantized.

        Returns:
            The codec that encodes `origin` as `stored`.

        Raises:
            QuantizationError: No variant does.
        """
        del origin, stored
        return self


@dataclass(frozen=True)
class FloatCodec(Codec):
    """Plain numbers: rounded to the dtype, and no more."""

    dtype: str
    span = 1

    @property
    def bits(self) -> float:
        """Bits per number."""
        return 8.0 * DTYPES[self.dtype].itemsize

    @property
    def steps(self) -> int:
        """Steps from -x to x, at the precision of numbers near x."""
        return _STEPS[self.dtype]

    def encode(self, rows: FloatArray) -> Blocks:
        """Rounds to nearest, ties to even.

        Args:
            rows: float32 [rows, width].

        Returns:
            uint8 [rows, row_bytes].
        """
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(rows.astype(DTYPES[self.dtype])).view(np.uint8)

    def decode(self, blocks: Blocks) -> FloatArray:
        """Widens to float32, exactly.

        Args:
            blocks: uint8 [rows, row_bytes].

        Returns:
            float32 [rows, width].
        """
        return np.ascontiguousarray(blocks).view(DTYPES[self.dtype]).astype(np.float32)
