"""Reads and writes rows of a matrix in a file, in any format: only their place matters. Reads are unbuffered, as rows are."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from io import FileIO
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import CHUNK, IntArray, TensorInfo
from nestpatch.rows import Rows

_CACHED_ONLY = getattr(os, "RWF_NOWAIT", 0)
"""Flag of a read that fails instead of waiting for a disk; 0 where there is none."""


def read_rows_at(info: TensorInfo, rows: IntArray, dtype: np.dtype[Any]) -> Rows:
    """Reads sorted rows; consecutive ones are read together.

    Args:
        info: The tensor.
        rows: Sorted row numbers.
        dtype: What to read them as.

    Returns:
        [rows, elements] of the dtype.

    Raises:
        CheckpointFormatError: The file ends before them.
    """
    out = np.empty((len(rows), info.row_bytes), np.uint8)
    runs = list(_runs(info, rows, out))
    with open_regular(info.file) as file:
        left = runs[_read_cached(file, runs) :]
        if len(left) > 1:
            _announce(file, left)
        for target, offset in left:
            read_into(file, target, offset, info)
    return out.view(dtype)


def _read_cached(file: FileIO, runs: Iterable[tuple[memoryview, int]]) -> int:
    """Reads parts of a file as long as they are in memory. Returns how many it read: none where the system cannot tell."""
    read = 0
    if _CACHED_ONLY:
        handle = file.fileno()
        with suppress(OSError):
            for target, offset in runs:
                if os.preadv(handle, (target,), offset, _CACHED_ONLY) != len(target):
                    break
                read += 1
    return read


def _announce(file: FileIO, runs: Iterable[tuple[memoryview, int]]) -> None:
    """Has the disk read parts of a file at once, and nothing between them. Only a hint: a file system may not take it."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            for target, offset in runs:
                os.posix_fadvise(file.fileno(), offset, len(target), os.POSIX_FADV_WILLNEED)


def write_rows_at(info: TensorInfo, rows: IntArray, values: Rows) -> None:
    """Writes sorted rows in place; consecutive ones are written together.

    Args:
        info: The tensor.
        rows: Sorted row numbers.
        values: [rows, elements], as many bytes a row as the tensor has.
    """
    data = np.ascontiguousarray(values).view(np.uint8)
    with open_regular(info.file, write=True) as file:
        for source, offset in _runs(info, rows, data):
            write_at(file, source, offset)


def read_all_at(info: TensorInfo) -> Iterator[bytes]:
    """Reads a tensor whole, in blocks.

    Args:
        info: The tensor.

    Yields:
        Its bytes.

    Raises:
        CheckpointFormatError: The file ends inside it.
    """
    left = info.nbytes
    with open_regular(info.file) as file:
        file.seek(info.offset)
        while left:
            block = file.read(min(CHUNK, left))
            if not block:
                raise CheckpointFormatError(f"{info.file} ends inside tensor {info.name}")
            left -= len(block)
            yield block


def _runs(info: TensorInfo, rows: IntArray, data: Any) -> Iterator[tuple[memoryview, int]]:
    """(part of the data, its offset in the file) of every run of consecutive row numbers. data: uint8 [rows, row_bytes]."""
    if not len(rows):
        return
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    width, view = info.row_bytes, memoryview(data).cast("B")
    # In 64 bits: files are longer than 2 GiB, and row numbers may come in 32.
    offsets = (info.offset + rows[edges[:-1]].astype(np.int64) * width).tolist()
    for (start, stop), offset in zip(itertools.pairwise(edges), offsets, strict=True):
        yield view[start * width : stop * width], offset


def read_into(file: FileIO, out: memoryview, offset: int, info: TensorInfo) -> None:
    """Fills a buffer from an offset of a file.

    Args:
        file: The open file.
        out: The buffer.
        offset: Where to read.
        info: The tensor, for messages.

    Raises:
        CheckpointFormatError: The file ends before the buffer is full.
    """
    file.seek(offset)
    while out:  # raw reads and writes may be short
        count = file.readinto(out)
        if not count:
            raise CheckpointFormatError(f"{info.file} ends inside tensor {info.name}")
        out = out[count:]


def write_at(file: FileIO, data: memoryview, offset: int) -> None:
    """Writes a buffer.

    Args:
        file: The open file.
        data: The buffer.
        offset: Where to write.
    """
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file.fileno(), data, offset)
        else:  # Windows
            file.seek(offset)
            written = file.write(data)
        data, offset = data[written:], offset + written
