"""Crash-safe row writes.

Before any row of a model changes, its present content is written here, checksummed and synced. A journal that is whole
means: a transaction may have changed rows, and this is what they held. A journal that is not means: nothing was changed yet.

Rows are read and put back by the checkpoint, so that it does not matter how a format lays them out.

Layout: MAGIC, header length (u64, little endian), header JSON, then per region its row numbers (int64) and their bytes, then
the SHA-256 of everything before.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nestpatch.errors import JournalError
from nestpatch.formats.atomic import sync_folder
from nestpatch.formats.interface import CHUNK, Checkpoint, IntArray, TensorInfo, row_blocks

FAMILY = b"nestpatch-journal/"
MAGIC = FAMILY + b"2\n"
DIGEST = 32


@dataclass(frozen=True, eq=False)
class Region:
    """Rows of one tensor that a transaction may change."""

    info: TensorInfo
    rows: IntArray


class _Hashed:
    """A file that digests what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.state = sha256()

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.state.update(data)


def write_journal(path: Path, transaction: str, checkpoint: Checkpoint, regions: Sequence[Region]) -> None:
    """Saves the regions' present content, synced to disk: file and folder.

    Raises OSError; then the journal is not whole and nothing of the model was changed.
    """
    described = [{"tensor": r.info.name, "row_bytes": r.info.row_bytes, "rows": len(r.rows)} for r in regions]
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    spared = [found for region in regions if (found := _untouched(region))]
    witness = {"rows": spared, "sha256": _digest(spared, checkpoint)}
    facts = {"transaction": transaction, "sizes": sizes, "witness": witness, "regions": described}
    header = json.dumps(facts).encode()
    with open(path, "wb") as file:
        out = _Hashed(file)
        out.write(MAGIC + struct.pack("<Q", len(header)) + header)
        for region in regions:
            out.write(np.ascontiguousarray(region.rows, "<i8").data)
            for part in row_blocks(len(region.rows), region.info.row_bytes, region.info.stretch):
                out.write(checkpoint.read_rows(region.info.name, region.rows[part]).view(np.uint8).data)
        file.write(out.state.digest())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    # The folder may be as new as the journal.
    sync_folder(path.parent.parent)


def _untouched(region: Region) -> tuple[str, int] | None:
    """(tensor, its first row that stays as it is): by such rows the model is known again."""
    gaps = np.flatnonzero(region.rows != np.arange(len(region.rows)))
    row = int(gaps[0]) if len(gaps) else len(region.rows)
    return (region.info.name, row) if row < region.info.rows else None


def _digest(rows: Sequence[tuple[str, int]], checkpoint: Checkpoint) -> str:
    state = sha256()
    for name, row in rows:
        state.update(checkpoint.read_rows(name, np.array([row])).view(np.uint8).data)
    return state.hexdigest()


def remove_journal(path: Path) -> None:
    """Ends a transaction."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_transaction(path: Path) -> str | None:
    """The transaction of a whole journal; None for one whose writing was interrupted.

    Raises JournalError for one of another version: removing it could leave a model half patched.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        magic = file.read(len(MAGIC))
        if magic != MAGIC and magic.startswith(FAMILY) and magic.endswith(b"\n"):
            raise JournalError(
                f"the journal {path} is of another nestpatch", advice="Run the command with the version that wrote it."
            )
        if size < len(MAGIC) + 8 + DIGEST or magic != MAGIC:
            return None
        file.seek(0)
        state, left = sha256(), size - DIGEST
        while left:
            block = file.read(min(CHUNK, left))
            if not block:
                return None
            state.update(block)
            left -= len(block)
        if file.read() != state.digest():
            return None
    with open(path, "rb") as file:
        return str(_read_header(file)["transaction"])


def _read_header(file: BinaryIO) -> Mapping[str, Any]:
    file.seek(len(MAGIC))
    (length,) = struct.unpack("<Q", file.read(8))
    header: dict[str, Any] = json.loads(file.read(length))
    return header


def roll_back(path: Path, checkpoint: Checkpoint) -> None:
    """Puts the rows of a whole journal back and syncs them. Doing it twice does no harm.

    Raises JournalError when the model's files are not those that the journal was written for.
    """
    files = {file.name: file for file in checkpoint.files}
    with open(path, "rb") as journal:
        header = _read_header(journal)
        for name, size in header["sizes"].items():
            # Only plain names of the model's own weight files: a journal must not reach out of the model.
            if name not in files or files[name].stat().st_size != size:
                raise JournalError(f"the journal {path} was written for another {name}")
        if not _fits(header, checkpoint):
            raise JournalError(f"the journal {path} was written for a model with other weights")
        for region in header["regions"]:
            rows = np.frombuffer(journal.read(8 * region["rows"]), "<i8")
            for part in row_blocks(len(rows), region["row_bytes"], checkpoint.info(region["tensor"]).stretch):
                _restore(journal, region, rows[part], checkpoint)
    sync_files(list(files.values()))


def _fits(header: Mapping[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether the model has the journal's tensors, and the rows that were to stay as they were."""
    for region in header["regions"]:
        if not checkpoint.has(region["tensor"]) or checkpoint.info(region["tensor"]).row_bytes != region["row_bytes"]:
            return False
    return _digest(header["witness"]["rows"], checkpoint) == str(header["witness"]["sha256"])


def _restore(journal: BinaryIO, region: Mapping[str, Any], rows: IntArray, checkpoint: Checkpoint) -> None:
    raw = np.frombuffer(journal.read(len(rows) * region["row_bytes"]), np.uint8).reshape(len(rows), -1)
    stored = checkpoint.read_rows(region["tensor"], rows[:0]).dtype
    checkpoint.write_rows(region["tensor"], rows, raw.view(stored))


def sync_files(files: Sequence[Path]) -> None:
    """Makes all writes to these files durable."""
    for file in files:
        with open(file, "r+b") as handle:
            os.fsync(handle.fileno())
