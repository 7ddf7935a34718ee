"""Bit-exact undo records.

Subtracting a delta does not give the base back: rounding loses bits of a few per cent of the elements. So the record holds, for
every touched row, `bits(original) XOR bits(naively unpatched)`, which is zero almost everywhere and compresses well, and one
64-bit checksum of each row before and after, by which `verify` can name a single altered row. Of quantized rows, which nothing
can be subtracted from, it holds `original XOR patched`.

Layout: MAGIC, then per tensor: u64 length and zlib stream of its residual, u64 length and its row checksums.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nestpatch.errors import UndoError
from nestpatch.files.reading import open_regular
from nestpatch.rows import FloatArray, Rows

MAGIC = b"nestpatch-undo/1\n"
LEVEL = 1
"""zlib: residuals are mostly zeros, and higher levels cost seconds for percents."""
Checksums = npt.NDArray[np.uint64]


def unpatched(rows: Rows, delta: FloatArray, strength: float) -> Rows:
    """The naive inverse of the merge: near the original, exact in all but a few per cent of the elements."""
    with np.errstate(over="ignore", invalid="ignore"):
        lowered: Rows = (rows.astype(np.float32) - np.float32(strength) * delta).astype(rows.dtype)
    return lowered


def bits(rows: Rows) -> npt.NDArray[Any]:
    """The rows as unsigned integers of the same width."""
    raw: npt.NDArray[Any] = np.ascontiguousarray(rows).view(f"u{rows.dtype.itemsize}")
    return raw


def residual(original: Rows, merged: Rows, delta: FloatArray, strength: float) -> npt.NDArray[Any]:
    """What the naive inverse of `merged` lacks to be `original`: unsigned integers, mostly zero.

    Quantized blocks (uint8) have no inverse to start from: theirs is the difference itself.
    """
    near = merged if merged.dtype == np.uint8 else unpatched(merged, delta, strength)
    lacking: npt.NDArray[Any] = bits(original) ^ bits(near)
    return lacking


def restored(merged: Rows, lacking: npt.NDArray[Any], delta: FloatArray, strength: float) -> Rows:
    """The original rows, bit for bit."""
    near = merged if merged.dtype == np.uint8 else unpatched(merged, delta, strength)
    original: Rows = (bits(near) ^ lacking).view(merged.dtype)
    return original


def checksums(rows: Rows) -> Checksums:
    """One 64-bit checksum per row: its 32-bit words times odd constants, summed modulo 2^64. Finds accidents, not forgeries."""
    raw = np.ascontiguousarray(rows).view(np.uint8)
    width = raw.shape[1]
    if width % 4:
        raw = np.pad(raw, ((0, 0), (0, -width % 4)))
    words = raw.view("<u4")
    weights = np.arange(1, 2 * words.shape[1] + 1, 2, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    total: Checksums = words.astype(np.uint64) @ weights
    return total


@dataclass(frozen=True)
class UndoTensor:
    """One tensor's part of a record, packed."""

    residual: bytes
    """zlib stream."""
    checksums: bytes


class TensorPacker:
    """Packs one tensor's part of a record, block by block."""

    def __init__(self) -> None:
        # Runs of zeros are nearly all there is: run-length matching is faster here and packs tighter.
        self._squeeze = zlib.compressobj(LEVEL, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        self._packed: list[bytes] = []
        self._sums: tuple[list[Checksums], list[Checksums]] = [], []

    def add(self, lacking: npt.NDArray[Any], before: Checksums, after: Checksums) -> None:
        """The next rows: their residual, their checksums before and after."""
        self._packed.append(self._squeeze.compress(lacking.data))
        self._sums[0].append(before)
        self._sums[1].append(after)

    def finish(self) -> UndoTensor:
        """All of it."""
        table = np.stack([np.concatenate(sums) for sums in self._sums]).astype("<u8")
        return UndoTensor(b"".join([*self._packed, self._squeeze.flush()]), table.tobytes())


class UndoWriter:
    """Writes the record of one transaction, tensor by tensor."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        file.write(MAGIC)

    def tensor(self, packed: UndoTensor) -> None:
        """Adds the next tensor."""
        for part in (packed.residual, packed.checksums):
            self.file.write(struct.pack("<Q", len(part)) + part)


@dataclass(frozen=True)
class UndoPart:
    """Where one tensor's residual and checksums lie in a record."""

    residual: tuple[int, int]
    checksums: tuple[int, int]


class UndoReader:
    """Reads a record. Raises UndoError when it is missing, broken or of another number of tensors."""

    def __init__(self, path: Path, tensors: Sequence[str]) -> None:
        self.path = path
        try:
            with open_regular(path, follow=False) as file:
                self.parts = dict(zip(tensors, self._scan(file, len(tensors)), strict=True))
        except (OSError, struct.error) as error:
            raise UndoError(f"the undo record {path} cannot be read: {error}") from error

    def _scan(self, file: FileIO, count: int) -> list[UndoPart]:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(MAGIC)) != MAGIC:
            raise UndoError(f"{self.path} is no undo record")
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
            raise UndoError(f"the undo record {self.path} is longer than its model's tensors need")
        return parts

    def residuals(self, tensor: str, sizes: Iterator[int]) -> Iterator[bytes]:
        """The residual of a tensor in blocks of the given numbers of bytes."""
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
        """(before, after) of a tensor's rows, of which there are so many."""
        offset, length = self.parts[tensor].checksums
        if length != 16 * rows:
            raise UndoError(f"the undo record {self.path} is damaged: it has no two checksums for each of {rows} rows")
        with open_regular(self.path, follow=False, error=UndoError) as file:
            file.seek(offset)
            table = file.read(length)
        if len(table) != length:
            raise UndoError(f"the undo record {self.path} is damaged: its checksums are cut")
        both = np.frombuffer(table, "<u8").reshape(2, -1)
        return both[0], both[1]
