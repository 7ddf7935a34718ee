"""How the rows of a weight are read and written, whatever their arrangement in files. Memory does not grow with the matrix.

A row is what one neuron has: `RowLayout` where a file stores it in one piece, or in a few; `ColumnLayout` where a file stores
the transposed matrix; `JoinedLayout` for rows of several weights as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import numpy as np

from nestpatch.files.reading import open_regular
from nestpatch.formats._codec import Blocks
from nestpatch.formats._rowio import read_into, read_rows_at, write_at, write_rows_at
from nestpatch.formats.checkpoint import CHUNK, IntArray, TensorInfo
from nestpatch.rows import Rows

_GATHERED = 4
"""CHUNKs of columns to work on at a time: every time, the whole matrix is read."""
_SPARSE = 16
"""Columns that span less than this part of the matrix are read by themselves."""
_BYTES = np.dtype(np.uint8)


class Layout(Protocol):
    """Rows of one matrix, as bytes."""

    rows: int
    row_bytes: int
    files: tuple[Path, ...]
    """The files that hold them."""
    offset: int
    """Of the first byte in the first file."""
    chunks: int
    """How many CHUNKs of rows to read at a time."""

    def read(self, rows: IntArray) -> Blocks:
        """Reads some rows.

        Args:
            rows: Sorted row numbers.

        Returns:
            uint8 [rows, row_bytes].

        Raises:
            CheckpointFormatError: A file ends before them.
        """

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes some rows in place.

        Args:
            rows: Sorted row numbers.
            values: uint8 [rows, row_bytes].
        """


class RowLayout:
    """Each row is in one piece in one tensor, or in several: its blocks, its scales, its zero points."""

    chunks = 1

    def __init__(self, *parts: TensorInfo) -> None:
        """Joins tensors that are matrices with the same number of rows.

        Args:
            parts: The tensors, in the order in which a row has their bytes.
        """
        self.parts = parts
        self.rows = parts[0].rows
        self.row_bytes = sum(part.row_bytes for part in parts)
        self.files = tuple(dict.fromkeys(part.file for part in parts))
        self.offset = parts[0].offset

    def read(self, rows: IntArray) -> Blocks:
        """Reads some rows, part by part.

        Args:
            rows: Sorted row numbers.

        Returns:
            uint8 [rows, row_bytes].
        """
        return np.concatenate([read_rows_at(part, rows, _BYTES) for part in self.parts], axis=1)

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes some rows in place, part by part.

        Args:
            rows: Sorted row numbers.
            values: uint8 [rows, row_bytes].
        """
        start = 0
        for part in self.parts:
            write_rows_at(part, rows, values[:, start : start + part.row_bytes])
            start += part.row_bytes


class ColumnLayout:
    """Transposed: a row of the matrix is a column in the file, and is gathered from all of it."""

    chunks = _GATHERED

    def __init__(self, tensor: TensorInfo, itemsize: int) -> None:
        """Transposes a tensor.

        Args:
            tensor: [width, rows].
            itemsize: Bytes of an element.
        """
        self.tensor = tensor
        self.rows = tensor.shape[1]
        self.row_bytes = tensor.shape[0] * itemsize
        self.files: tuple[Path, ...] = (tensor.file,)
        self.offset = tensor.offset
        self._element = np.dtype(f"u{itemsize}")

    def read(self, rows: IntArray) -> Blocks:
        """Gathers some rows from the columns of the file.

        Args:
            rows: Sorted row numbers.

        Returns:
            uint8 [rows, row_bytes].
        """
        out = np.empty((len(rows), self.tensor.shape[0]), self._element)
        if len(rows):
            with open_regular(self.tensor.file) as file:
                for lines, first, window, _ in self._windows(file, rows):
                    out[:, lines] = window[:, rows - first].T
        return out.view(np.uint8)

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes some rows in place.

        The bytes between their elements are read and written unchanged: one large write instead of many tiny ones.

        Args:
            rows: Sorted row numbers.
            values: uint8 [rows, row_bytes].
        """
        if not len(rows):
            return
        elements = np.ascontiguousarray(values).view(self._element)
        with open_regular(self.tensor.file, write=True) as file:
            for lines, first, window, offset in self._windows(file, rows):
                window[:, rows - first] = elements[:, lines].T
                write_at(file, window.data.cast("B"), offset)

    def _windows(self, file: FileIO, rows: IntArray) -> Iterator[tuple[slice, int, Rows, int]]:
        """(lines, first column, content [lines, columns], offset) of pieces of the file that cover all elements of the rows."""
        height, width = self.tensor.shape
        itemsize = self._element.itemsize
        first, count, step = 0, width, max(1, CHUNK // (width * itemsize))
        span = int(rows[-1]) - int(rows[0]) + 1
        if span * _SPARSE <= width:
            first, count, step = int(rows[0]), span, 1
        for start in range(0, height, step):
            lines = slice(start, min(start + step, height))
            window = np.empty((lines.stop - start, count), self._element)
            offset = self.tensor.offset + (start * width + first) * itemsize
            read_into(file, window.data.cast("B"), offset, self.tensor)
            yield lines, first, window, offset


@dataclass(frozen=True)
class Segment:
    """Consecutive rows of a layout."""

    layout: Layout
    start: int
    rows: int


class JoinedLayout:
    """Rows of several layouts one after the other, or some rows of one."""

    def __init__(self, *segments: Segment) -> None:
        """Joins segments with rows of the same size.

        Args:
            segments: The segments, in the order of the matrix's rows.
        """
        layouts = [segment.layout for segment in segments]
        self.segments = segments
        self.rows = sum(segment.rows for segment in segments)
        self.row_bytes = layouts[0].row_bytes
        self.files = tuple(dict.fromkeys(file for layout in layouts for file in layout.files))
        self.offset = layouts[0].offset
        self.chunks = max(layout.chunks for layout in layouts)

    def read(self, rows: IntArray) -> Blocks:
        """Reads some rows, segment by segment.

        Args:
            rows: Sorted row numbers.

        Returns:
            uint8 [rows, row_bytes].
        """
        found = [segment.layout.read(own) for segment, own, _ in self._split(rows)]
        return np.concatenate([np.empty((0, self.row_bytes), np.uint8), *found])

    def write(self, rows: IntArray, values: Blocks) -> None:
        """Writes some rows in place, segment by segment.

        Args:
            rows: Sorted row numbers.
            values: uint8 [rows, row_bytes].
        """
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
