"""Crash-safe row writes.

Before any row of a model changes, its present content is written here, checksummed and synced. A journal that is whole
means: a transaction may have changed rows, and this is what they held. A journal that is not means: nothing was changed yet.

Layout: MAGIC, header length (u64, little endian), header JSON, then per region its row numbers (int64) and their bytes, then
the SHA-256 of everything before.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nestpatch.errors import JournalError
from nestpatch.formats.atomic import sync_folder
from nestpatch.formats.interface import CHUNK, Checkpoint, IntArray, TensorInfo, row_blocks

MAGIC = b"nestpatch-journal/1\n"
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
    described = [
        {"file": r.info.file.name, "offset": r.info.offset, "row_bytes": r.info.row_bytes, "rows": len(r.rows)} for r in regions
    ]
    sizes = {file.name: file.stat().st_size for file in checkpoint.files}
    header = json.dumps({"transaction": transaction, "sizes": sizes, "regions": described}).encode()
    with open(path, "wb") as file:
        out = _Hashed(file)
        out.write(MAGIC + struct.pack("<Q", len(header)) + header)
        for region in regions:
            out.write(np.ascontiguousarray(region.rows, "<i8").data)
            for part in row_blocks(len(region.rows), region.info.row_bytes):
                out.write(checkpoint.read_rows(region.info.name, region.rows[part]).view(np.uint8).data)
        file.write(out.state.digest())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def remove_journal(path: Path) -> None:
    """Ends a transaction."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_transaction(path: Path) -> str | None:
    """The transaction of a whole journal; None for one whose writing was interrupted."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size < len(MAGIC) + 8 + DIGEST or file.read(len(MAGIC)) != MAGIC:
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
        for region in header["regions"]:
            rows = np.frombuffer(journal.read(8 * region["rows"]), "<i8")
            with open(files[region["file"]], "r+b") as file:
                for part in row_blocks(len(rows), region["row_bytes"]):
                    _restore(journal, file, region, rows[part])
    sync_files(list(files.values()))


def _restore(journal: BinaryIO, file: BinaryIO, region: Mapping[str, Any], rows: IntArray) -> None:
    for row in rows.tolist():
        file.seek(region["offset"] + row * region["row_bytes"])
        file.write(journal.read(region["row_bytes"]))


def sync_files(files: Sequence[Path]) -> None:
    """Makes all writes to these files durable."""
    for file in files:
        with suppress(FileNotFoundError), open(file, "r+b") as handle:
            os.fsync(handle.fileno())
