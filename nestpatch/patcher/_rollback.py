"""Putting back the rows that a journal holds, after a check that it was written for this model.

Rows are written through the checkpoint, so the layout of the format does not matter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nestpatch.errors import CheckpointError, JournalError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.patcher._journal import REMOVE_ADVICE, Journal, open_journal, witness_digest


def check_fit(journal: Journal, checkpoint: Checkpoint) -> None:
    """Checks that a journal was written for this model: its files, tensors, rows and untouched content.

    Args:
        journal: The journal.
        checkpoint: The model.

    Raises:
        JournalError: It was written for another model.
    """
    files = {file.name: file for file in checkpoint.files}
    for name, size in journal.sizes.items():
        # Only plain names of the model's own weight files: a journal must not write anywhere else.
        if name not in files or files[name].stat().st_size != size:
            raise _misfit(journal, f"another file {name}")
    if set(journal.sizes) != set(files):
        raise _misfit(journal, "a model with other files")
    with open_journal(journal.path) as file:
        for region in journal.regions:
            if not checkpoint.has(region.tensor):
                raise _misfit(journal, f"a model with the tensor {region.tensor}")
            info = checkpoint.info(region.tensor)
            rows = journal.row_numbers(file, region)
            if info.row_bytes != region.row_bytes or rows[0] < 0 or rows[-1] >= info.rows or (np.diff(rows) <= 0).any():
                raise _misfit(journal, f"a tensor {region.tensor} of another shape than {list(info.shape)}")
    _check_witness(journal, checkpoint)


def _check_witness(journal: Journal, checkpoint: Checkpoint) -> None:
    for name, row in journal.witness:
        if not checkpoint.has(name) or row >= checkpoint.info(name).rows:
            raise _misfit(journal, f"a model with row {row} of {name}")
    try:
        found = witness_digest(journal.witness, checkpoint)
    except CheckpointError as error:
        raise _misfit(journal, f"another model: {error}") from error
    if found != journal.witness_sha256:
        raise _misfit(journal, "a model with other weights")


def _misfit(journal: Journal, what: str) -> JournalError:
    return JournalError(f"the journal {journal.path} was written for {what}", advice=REMOVE_ADVICE)


def roll_back(journal: Journal, checkpoint: Checkpoint) -> None:
    """Puts the rows of a journal back, and syncs the files that hold them. Idempotent. Call `check_fit` first.

    Args:
        journal: The journal.
        checkpoint: The model.

    Raises:
        OSError: A file cannot be read or written.
    """
    with open_journal(journal.path) as file:
        for region in journal.regions:
            info, rows = checkpoint.info(region.tensor), journal.row_numbers(file, region)
            stored = checkpoint.read_rows(region.tensor, rows[:0]).dtype
            for part in info.blocks(len(rows), region.row_bytes):
                checkpoint.write_rows(region.tensor, rows[part], journal.content(file, region, part).view(stored))
    sync_files(files_of(checkpoint, [region.tensor for region in journal.regions]))


def files_of(checkpoint: Checkpoint, names: Sequence[str]) -> list[Path]:
    """The weight files that hold some tensors.

    Args:
        checkpoint: The model.
        names: The tensors.

    Returns:
        Paths, sorted, each once.
    """
    return sorted({file for name in names for file in checkpoint.info(name).files})


def sync_files(files: Sequence[Path]) -> None:
    """Makes all writes to some files durable.

    Args:
        files: The files.

    Raises:
        OSError: The disk does not confirm it.
    """
    for file in files:
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())
