"""The rows of MatMulNBits, onnxruntime's operation for quantized weights: blocks, then their scales, then their zero points.

Rounds to nearest as onnxruntime's own quantizer does, with the same bytes (MatMulNBitsQuantizer,
onnxruntime/core/mlas/lib/q4_dq.cpp): a scale per block, and the numbers as multiples of it. Each row is quantized by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nestpatch.errors import QuantizationError
from nestpatch.formats._codec import Blocks
from nestpatch.rows import DTYPES, FloatArray

BITS = (2, 4, 8)
_WAYS = ((True, False), (True, True), (False, True))
"""Half precision, quantized by onnxruntime; bfloat16, which it widens first; scales that were converted later."""
WITNESSES = 1 << 16
"""Numbers of untouched rows that are compared to find out how a model was quantized."""
_MATCHING = 0.5
"""Share of untouched rows that a quantizer must reproduce: others may hold another pack."""


@dataclass(frozen=True)
class NBitsCodec:
    """How one weight is stored: the Codec of MatMulNBits."""

    depth: int
    """Bits of a number."""
    span: int
    """Numbers that share a scale."""
    width: int
    """Numbers of a row."""
    scale: str
    """Dtype of the scales."""
    zero_points: bool
    """Whether each block has a zero point; else zero is in the middle."""
    narrow_first: bool = True
    """Whether the numbers had the scales' dtype before they were quantized."""
    narrow_last: bool = False
    """Whether scales were rounded to their dtype after all was quantized with wider ones."""

    @property
    def witnesses(self) -> int:
        """How many rows `fitted` needs: ways of narrowing differ in one number of some hundreds."""
        return max(8, WITNESSES // self.width)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return -(-self.width // self.span)

    @property
    def parts(self) -> tuple[int, int, int]:
        """Bytes of a row: numbers, scales, zero points."""
        zero_points = -(-self.blocks * self.depth // 8) if self.zero_points else 0
        return self.blocks * self.span * self.depth // 8, self.blocks * DTYPES[self.scale].itemsize, zero_points

    @property
    def bits(self) -> float:
        """Bits per number, scales included."""
        return 8 * sum(self.parts) / self.width

    @property
    def steps(self) -> int:
        """Steps between the smallest and the largest value of a block."""
        return (1 << self.depth) - 1

    @property
    def name(self) -> str:
        """For messages: "INT4_32_F16", "INT4_32_F16_ZP"."""
        return f"INT{self.depth}_{self.span}_{self.scale}{'_ZP' if self.zero_points else ''}"

    def require(self) -> None:
        """Checks that rows end with a whole byte.

        Raises:
            QuantizationError: They do not.
        """
        if self.width * self.depth % 8:
            raise QuantizationError(f"rows of {self.width} numbers of {self.depth} bits end inside a byte")

    def encode(self, rows: FloatArray) -> Blocks:
        """Quantizes rows to the nearest step.

        Args:
            rows: float32 [rows, width].

        Returns:
            uint8 [rows, row_bytes]: numbers, scales, zero points.
        """
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            kept = rows.astype(DTYPES[self.scale]).astype(np.float32) if self.narrow_first else rows
            values = self._blocked(kept, 0.0)
            scales, zeros = self._scales(kept)
            stored = scales.astype(DTYPES[self.scale])
            used = scales if self.narrow_last else stored.astype(np.float32)
            inverse = np.where(used != 0, np.float32(1) / used, np.float32(0))
            numbers = _rounded(values * inverse[..., None] + zeros[..., None]).clip(0, self.steps)
            flat = numbers.reshape(len(rows), -1)
            flat[:, self.width :] = 0
            parts = [self._packed(flat), stored.view(np.uint8).reshape(len(rows), -1)]
            if self.zero_points:
                spare = -self.blocks % (8 // self.depth)
                middle = 1 << (self.depth - 1)
                parts.append(self._packed(np.pad(zeros, ((0, 0), (0, spare)), constant_values=middle)))
        return np.concatenate(parts, axis=1)

    def _blocked(self, rows: FloatArray, filler: float) -> FloatArray:
        """float32 [rows, blocks, span]; the last block is filled up."""
        spare = self.blocks * self.span - self.width
        return np.pad(rows, ((0, 0), (0, spare)), constant_values=filler).reshape(len(rows), self.blocks, self.span)

    def _scales(self, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(scales, zero points), float32 [rows, blocks].

        With zero points the steps span the smallest to the largest number, and zero. Without, the number farthest from zero
        becomes the smallest step.
        """
        low, high = self._blocked(rows, np.inf).min(axis=2), self._blocked(rows, -np.inf).max(axis=2)
        if not self.zero_points:
            middle = np.float32(1 << (self.depth - 1))
            farthest = np.where(np.abs(high) > np.abs(low), high, low)
            return np.divide(farthest, -middle, dtype=np.float32), np.full_like(low, middle)
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        scales = (high - low) / np.float32(self.steps)
        zeros = np.where(scales != 0, np.float32(0) - low / scales, low)
        return scales, _rounded(zeros.clip(0, self.steps))

    def _packed(self, numbers: FloatArray) -> Blocks:
        """float32 [rows, n] -> uint8 [rows, n * bits / 8], the first number in the lowest bits."""
        grouped = numbers.astype(np.uint8).reshape(len(numbers), -1, 8 // self.depth)
        packed = np.zeros(grouped.shape[:2], np.uint8)
        for place in range(grouped.shape[2]):
            packed |= grouped[..., place] << (place * self.depth)
        return packed

    def _unpacked(self, packed: Blocks) -> FloatArray:
        shifts = np.arange(0, 8, self.depth, dtype=np.uint8)
        numbers = (packed[..., None] >> shifts) & np.uint8(self.steps)
        return numbers.reshape(len(packed), -1).astype(np.float32)

    def decode(self, blocks: Blocks) -> FloatArray:
        """Dequantizes rows.

        Args:
            blocks: uint8 [rows, row_bytes], as `encode` returns them.

        Returns:
            float32 [rows, width].
        """
        numbers, scales, zeros = np.split(blocks, np.cumsum(self.parts)[:2], axis=1)
        wide = np.ascontiguousarray(scales).view(DTYPES[self.scale]).astype(np.float32)
        middle = self._unpacked(zeros)[:, : self.blocks, None] if self.zero_points else 1 << (self.depth - 1)
        values = self._unpacked(numbers).reshape(len(blocks), self.blocks, self.span) - np.float32(middle)
        flat: FloatArray = (values * wide[..., None]).reshape(len(blocks), -1)[:, : self.width]
        return flat

    def fitted(self, origin: FloatArray, stored: Blocks) -> NBitsCodec:
        """Finds the way of narrowing that a file was quantized with.

        Args:
            origin: float32 [rows, width], rows of the float model.
            stored: uint8 [rows, row_bytes], the same rows in the file, unchanged since they were quantized.

        Returns:
            The codec whose way of narrowing reproduces most of the rows.

        Raises:
            QuantizationError: Every way reproduces less than half of the rows.
        """
        ways = [replace(self, narrow_first=first, narrow_last=last) for first, last in _WAYS if self.scale != "F32"] or [self]
        made = {codec: float((codec.encode(origin) == stored).all(axis=1).mean()) for codec in ways}
        best = max(made, key=lambda codec: made[codec])
        if made[best] >= _MATCHING:
            return best
        raise QuantizationError(
            "the model was not quantized by onnxruntime's default quantizer: the rows written would not be those of quantizing "
            "the patched model",
            advice="Patch the float model and quantize it anew, or load the pack beside the model as an adapter.",
        )


def _rounded(values: npt.NDArray[np.float32]) -> FloatArray:
    """To the nearest integer, halves away from zero, as C does it."""
    whole = np.trunc(values)
    further = np.where(np.abs(values - whole) >= 0.5, np.copysign(np.float32(1), values), np.float32(0))
    rounded: FloatArray = whole + further
    return rounded
