"""The rows that a pack touches, read a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.files.threads import beside
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.rows import Rows

_HASHED = 4
"""Blocks of rows that may be in memory while they are read in one thread and hashed in another."""


def rows_of(delta: TensorDelta, part: slice) -> IntArray:
    """The row numbers of a part of a delta.

    Args:
        delta: The delta.
        part: Which of its rows.

    Returns:
        int64 [rows], sorted.
    """
    return delta.rows[part].astype(np.int64)


def working_bytes(info: TensorInfo) -> int:
    """Bytes that a row takes while it is merged or undone, for blocks of rows that keep memory flat (bench/large.py).

    Plain rows are held as they were and as they will be, and as float32 between the two, while blocks before them are still
    being hashed and packed; the numbers of quantized rows are held a dozen times as float32 while they are quantized and read
    back, in every thread. Layouts that read the whole matrix for every block hold more of it (`info.chunks`).

    Args:
        info: The tensor.

    Returns:
        Bytes per row.
    """
    if info.plain:
        return (8 if info.chunks == 1 else 1) * info.row_bytes
    return 48 * info.shape[-1]


def touched_blocks(delta: TensorDelta, checkpoint: Checkpoint) -> Iterator[tuple[slice, Rows]]:
    """Reads the rows that a pack touches, as they are stored.

    Args:
        delta: The pack's change of the tensor.
        checkpoint: The model.

    Returns:
        An iterator over (part of the delta's rows, their content).
    """
    return checkpoint.iter_rows(delta.name, delta.rows, row_bytes=working_bytes(checkpoint.info(delta.name)))


def untouched(delta: TensorDelta, rows: int) -> IntArray:
    """The rows of a matrix that a pack leaves alone.

    Args:
        delta: The pack's change of the matrix.
        rows: How many rows the matrix has.

    Returns:
        Row numbers in rising order, int64.
    """
    spared = np.ones(rows, bool)
    spared[delta.rows] = False
    return np.flatnonzero(spared)


def reads_whole(deltas: Iterable[TensorDelta], checkpoint: Checkpoint) -> bool:
    """Whether reading rows passes over whole matrices. Blocks are large then, and one should be in memory at a time.

    Args:
        deltas: Changes of tensors, some of which the model may lack.
        checkpoint: The model.

    Returns:
        True if that is so for any of the tensors.
    """
    return any(checkpoint.info(delta.name).chunks > 1 for delta in deltas if checkpoint.has(delta.name))


def touched_digests(deltas: Sequence[TensorDelta], checkpoint: Checkpoint) -> dict[str, str]:
    """The digests of the rows that a pack touches, as they are stored: read in this thread, hashed in another.

    Args:
        deltas: Changes of different tensors, which the model has in the same shape.
        checkpoint: The model.

    Returns:
        Tensor name -> SHA-256 (hex) of its touched rows.

    Raises:
        CheckpointError: Rows cannot be read.
    """
    states = {delta.name: sha256() for delta in deltas}
    whole = reads_whole(deltas, checkpoint)

    def blocks() -> Iterator[tuple[str, Rows]]:
        for delta in deltas:
            row_bytes = (1 if whole else _HASHED) * checkpoint.info(delta.name).row_bytes
            for _, rows in checkpoint.iter_rows(delta.name, delta.rows, row_bytes=row_bytes):
                yield delta.name, rows

    def update(block: tuple[str, Rows]) -> None:
        states[block[0]].update(np.ascontiguousarray(block[1]).view(np.uint8).data)

    for _ in (map if whole else beside)(update, blocks()):
        pass
    return {name: state.hexdigest() for name, state in states.items()}
