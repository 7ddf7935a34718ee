"""How the rows of a weight are read and written, whatever way they lie in files. Memory does not grow with the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nestpatch.files.reading import open_regular
from nestpatch.formats._rowio import read_into, read_rows_at, write_all, write_rows_at
from nestpatch.formats.checkpoint import CHUNK, IntArray, TensorInfo
from nestpatch.formats.codec import Blocks
from nestpatch.rows import Rows

GATHERED = 4
"""How many times CHUNK bytes of columns to work on at a time: every time, the whole matrix is read."""
SPARSE = 16
"""Columns that span less than this part of the matrix are read by themselves."""
_BYTES = np.dtype(np.uint8)


class Layout(Protocol):
    """Rows of one matrix, as bytes."""

    @property
    def rows(self) -> int:
        """Of the matrix."""

    @property
    def row_bytes(self) -> int:
        """Of one row."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Where they lie."""

    @property
    def offset(self) -> int:
        """Of the first byte in the first file."""

    @property
    def stretch(self) -> int:
        """How many times CHUNK bytes of rows to work on at a time."""

    def read(self, rows: IntArray) -> Blocks:
        """Sorted rows, uint8 [rows, row_bytes]."""

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes sorted rows, in the form that `read` gives."""


@dataclass(frozen=True)
class RowLayout:
    """Each row lies together in one tensor, or in several: its blocks, its scales, its zero points."""

    parts: tuple[TensorInfo, ...]
    """Each a matrix of the same rows."""
    stretch = 1

    @property
    def rows(self) -> int:
        return self.parts[0].rows

    @property
    def row_bytes(self) -> int:
        return sum(part.row_bytes for part in self.parts)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(part.file for part in self.parts))

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    def read(self, rows: IntArray) -> Blocks:
        """Sorted rows, uint8 [rows, row_bytes]."""
        return np.concatenate([read_rows_at(part, rows, _BYTES) for part in self.parts], axis=1)

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes sorted rows, in the form that `read` gives."""
        start = 0
        for part in self.parts:
            write_rows_at(part, rows, values[:, start : start + part.row_bytes])
            start += part.row_bytes


@dataclass(frozen=True)
class ColumnLayout:
    """Transposed: a row of the matrix is a column in the file, and is gathered from all of it."""

    tensor: TensorInfo
    """[width, rows] as it lies."""
    itemsize: int
    stretch = GATHERED

    @property
    def rows(self) -> int:
        return self.tensor.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.tensor.shape[0] * self.itemsize

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.tensor.file,)

    @property
    def offset(self) -> int:
        return self.tensor.offset

    def read(self, rows: IntArray) -> Blocks:
        """Sorted rows, uint8 [rows, row_bytes]."""
        out = np.empty((len(rows), self.tensor.shape[0]), self._element)
        if len(rows):
            with open_regular(self.tensor.file) as file:
                for lines, first, window, _ in self._windows(file, rows):
                    out[:, lines] = window[:, rows - first].T
        return out.view(np.uint8)

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes sorted rows, in the form that `read` gives.

        What lies between their elements is read and written as it was: one large write instead of many tiny ones.
        """
        if not len(rows):
            return
        elements = np.ascontiguousarray(values).view(self._element)
        with open_regular(self.tensor.file, write=True) as file:
            for lines, first, window, offset in self._windows(file, rows):
                window[:, rows - first] = elements[:, lines].T
                file.seek(offset)
                write_all(file, window.data.cast("B"))

    @property
    def _element(self) -> np.dtype[Any]:
        return np.dtype(f"u{self.itemsize}")

    def _windows(self, file: FileIO, rows: IntArray) -> Iterator[tuple[slice, int, Rows, int]]:
        """(lines, first column, content, place) of pieces of the file that hold all elements of the rows.

        Content: [lines, columns].
        """
        height, width = self.tensor.shape
        first, count, step = 0, width, max(1, CHUNK // (width * self.itemsize))
        span = int(rows[-1]) - int(rows[0]) + 1
        if span * SPARSE <= width:
            first, count, step = int(rows[0]), span, 1
        for start in range(0, height, step):
            lines = slice(start, min(start + step, height))
            window = np.empty((lines.stop - start, count), self._element)
            offset = self.tensor.offset + (start * width + first) * self.itemsize
            read_into(file, window.data.cast("B"), offset, self.tensor)
            yield lines, first, window, offset


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a layout."""

    layout: Layout
    start: int
    rows: int


@dataclass(frozen=True)
class JoinedLayout:
    """Rows of several layouts one after the other, or some rows of one."""

    segments: tuple[Segment, ...]

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    @property
    def row_bytes(self) -> int:
        return self.segments[0].layout.row_bytes

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(file for segment in self.segments for file in segment.layout.files))

    @property
    def offset(self) -> int:
        return self.segments[0].layout.offset

    @property
    def stretch(self) -> int:
        return max(segment.layout.stretch for segment in self.segments)

    def read(self, rows: IntArray) -> Blocks:
        """Sorted rows, uint8 [rows, row_bytes]."""
        found = [segment.layout.read(own) for segment, own, _ in self._split(rows)]
        return np.concatenate([np.empty((0, self.row_bytes), np.uint8), *found])

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes sorted rows, in the form that `read` gives."""
        for segment, own, part in self._split(rows):
            segment.layout.write(own, values[part])

    def _split(self, rows: IntArray) -> Iterator[tuple[Segment, IntArray, slice]]:
        """(segment, the rows there, which of the rows they are)."""
        begin = 0
        for segment in self.segments:
            part = slice(*np.searchsorted(rows, (begin, begin + segment.rows)).tolist())
            if part.start < part.stop:
                yield segment, rows[part] - begin + segment.start, part
            begin += segment.rows
