"""Bit-exact undo records.

Subtracting a delta does not restore the base: rounding loses bits in a few per cent of the elements. For every touched row the
record therefore holds `bits(original) XOR bits(naively unpatched)`, which is zero almost everywhere and compresses well, and a
64-bit checksum of the row before and after, by which `verify` can name a single altered row. Nothing can be subtracted from a
quantized row: there the record holds `original XOR patched`.

Layout: MAGIC, then per tensor: u64 length and zlib stream of its residual, u64 length and its row checksums.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nestpatch.errors import UndoError
from nestpatch.files.reading import open_regular
from nestpatch.rows import FloatArray, Rows, scaled
from nestpatch.values import dataclass

MAGIC = b"nestpatch-undo/1\n"
_LEVEL = 1
"""zlib level: residuals are mostly zeros, and higher levels take seconds to save a few per cent."""
Checksums = npt.NDArray[np.uint64]


def bits(rows: Rows) -> npt.NDArray[Any]:
    """The bits of rows.

    Args:
        rows: Rows of any dtype.

    Returns:
        Unsigned integers of the same width and shape.
    """
    raw: npt.NDArray[Any] = np.ascontiguousarray(rows).view(f"u{rows.dtype.itemsize}")
    return raw


def _unmerged(merged: Rows, delta: FloatArray, strength: float) -> Rows:
    """The naive inverse of the merge: exact in all but a few per cent of the elements. Quantized blocks (uint8) have none."""
    if merged.dtype == np.uint8:
        return merged
    with np.errstate(over="ignore", invalid="ignore"):
        lowered = merged.astype(np.float32)
        lowered -= scaled(delta, strength)
        narrow: Rows = lowered.astype(merged.dtype, copy=False)
    return narrow


def residual(original: Rows, merged: Rows, delta: FloatArray, strength: float) -> npt.NDArray[Any]:
    """The difference between the original rows and the naive inverse of the merge.

    Args:
        original: [rows, in_features], as stored.
        merged: The same rows after the merge.
        delta: float32 [rows, in_features].
        strength: Factor on the delta.

    Returns:
        Unsigned integers of the rows' width, mostly zero.
    """
    difference: npt.NDArray[Any] = bits(original) ^ bits(_unmerged(merged, delta, strength))
    return difference


def restored(merged: Rows, difference: npt.NDArray[Any], delta: FloatArray, strength: float) -> Rows:
    """The original rows, bit for bit: the inverse of `residual`.

    Args:
        merged: [rows, in_features], as stored after the merge.
        difference: What `residual` returned for them.
        delta: float32 [rows, in_features].
        strength: Factor on the delta.

    Returns:
        The rows before the merge, in the dtype of `merged`.
    """
    original: Rows = (bits(_unmerged(merged, delta, strength)) ^ difference).view(merged.dtype)
    return original


def checksums(rows: Rows) -> Checksums:
    """One 64-bit checksum per row: the sum of its 32-bit words times odd constants, modulo 2^64.

    Detects accidents, not forgeries.

    Args:
        rows: [rows, in_features], as stored.

    Returns:
        uint64 [rows].
    """
    raw = np.ascontiguousarray(rows).view(np.uint8)
    width = raw.shape[1]
    if width % 4:
        raw = np.pad(raw, ((0, 0), (0, -width % 4)))
    words = raw.view("<u4")
    weights = np.arange(1, 2 * words.shape[1] + 1, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    total: Checksums = words.astype(np.uint64) @ weights
    return total


@dataclass(frozen=True, eq=False)
class UndoBlock:
    """What a record holds of some rows."""

    residual: npt.NDArray[Any]
    before: Checksums
    after: Checksums


def undo_block(original: Rows, merged: Rows, delta: FloatArray, strength: float) -> UndoBlock:
    """What a record holds of rows that a merge changes.

    Args:
        original: [rows, in_features], as stored.
        merged: The same rows after the merge.
        delta: float32 [rows, in_features].
        strength: Factor on the delta.

    Returns:
        Their residual, and their checksums before and after.
    """
    return UndoBlock(residual(original, merged, delta, strength), checksums(original), checksums(merged))


class TensorPacker:
    """Compresses one tensor's part of a record, block by block."""

    def __init__(self) -> None:
        # Nearly everything is a run of zeros: run-length matching is faster here and compresses better.
        self._squeeze = zlib.compressobj(_LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        self._packed: list[bytes] = []
        self._sums: tuple[list[Checksums], list[Checksums]] = [], []

    def add(self, block: UndoBlock) -> None:
        """Adds the next rows.

        Args:
            block: What the record holds of them.
        """
        self._packed.append(self._squeeze.compress(block.residual.data))
        self._sums[0].append(block.before)
        self._sums[1].append(block.after)

    def write(self, file: BinaryIO) -> None:
        """Writes the tensor's part.

        Args:
            file: The record. It begins with MAGIC, and the parts follow in the order of the pack's tensors.
        """
        # Not joined: of quantized rows these are megabytes.
        packed = [*self._packed, self._squeeze.flush()]
        table = np.stack([np.concatenate(sums) for sums in self._sums]).astype("<u8").tobytes()
        for part in (packed, [table]):
            file.writelines([struct.pack("<Q", sum(map(len, part))), *part])


@dataclass(frozen=True)
class UndoPart:
    """Where one tensor's residual and checksums are in a record: (offset, length) each, in bytes."""

    residual: tuple[int, int]
    checksums: tuple[int, int]


class UndoReader:
    """Reads a record."""

    def __init__(self, path: Path, tensors: Sequence[str]) -> None:
        """Finds the parts of a record.

        Args:
            path: The record.
            tensors: The pack's tensors, in the pack's order.

        Raises:
            UndoError: The record is missing, broken or has another number of tensors.
        """
        self.path = path
        try:
            with open_regular(path, follow=False) as file:
                self.parts = dict(zip(tensors, self._scan(file, len(tensors)), strict=True))
        except (OSError, struct.error) as error:
            raise UndoError(f"the undo record {path} cannot be read: {error}") from error

    def _scan(self, file: FileIO, count: int) -> list[UndoPart]:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise UndoError(f"{self.path} is not an undo record")
        parts = []
        for _ in range(count):
            spans = []
            for _ in range(2):
                (length,) = struct.unpack("<Q", file.read(8))
                spans.append((file.tell(), length))
                if length > size - file.tell():
                    raise UndoError(f"the undo record {self.path} is truncated")
                file.seek(length, 1)
            parts.append(UndoPart(*spans))
        if file.tell() != size:
            raise UndoError(f"the undo record {self.path} is longer than its {count} tensors")
        return parts

    def residuals(self, tensor: str, sizes: Iterator[int]) -> Iterator[bytes]:
        """Yields the residual of a tensor in blocks.

        Args:
            tensor: Name of the tensor.
            sizes: Bytes of each block.

        Yields:
            The blocks.

        Raises:
            UndoError: The record is damaged.
        """
        offset, length = self.parts[tensor].residual
        stream = zlib.decompressobj()
        with open_regular(self.path, follow=False, error=UndoError) as file:
            file.seek(offset)
            for size in sizes:
                yield self._take(file, stream, size, offset + length)

    def _take(self, file: FileIO, stream: Any, size: int, end: int) -> bytes:
        pieces, missing = [], size
        while missing:
            data = stream.unconsumed_tail or file.read(min(1 << 20, end - file.tell()))
            try:
                piece = stream.decompress(data, missing) if data else stream.flush()
            except zlib.error as error:
                raise UndoError(f"the undo record {self.path} is damaged: {error}") from error
            if not piece and not data:
                raise UndoError(f"the undo record {self.path} is damaged: a residual is too short")
            pieces.append(piece)
            missing -= len(piece)
        return b"".join(pieces)

    def checksums(self, tensor: str, rows: int) -> tuple[Checksums, Checksums]:
        """The checksums of a tensor's rows.

        Args:
            tensor: Name of the tensor.
            rows: Number of rows.

        Returns:
            Checksums before and after, uint64 [rows] each.

        Raises:
            UndoError: The record is damaged.
        """
        offset, length = self.parts[tensor].checksums
        if length != 16 * rows:
            raise UndoError(f"the undo record {self.path} is damaged: expected two checksums for each of {rows} rows")
        with open_regular(self.path, follow=False, error=UndoError) as file:
            file.seek(offset)
            table = file.read(length)
        if len(table) != length:
            raise UndoError(f"the undo record {self.path} is damaged: its checksums end early")
        both = np.frombuffer(table, "<u8").reshape(2, -1)
        return both[0], both[1]
