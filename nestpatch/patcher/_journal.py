"""The journal: crash-safe row writes.

Before any row of a model changes, its present content is written here, checksummed, sealed and synced. A complete journal means
that a transaction may have changed rows, and holds their earlier content. An incomplete journal means that nothing was changed.

A journal is kept beside the model and travels with it. It is therefore checked in full when it is read: that it is a regular
file of this user, and that its header fits its size. `_rollback` compares it with the model and puts the rows back. Its seal
(signing/machine.py) or recovery.py decides whether that is permitted.

Layout: MAGIC, header length (u64, little endian), header JSON, then per region its row numbers (int64) and their bytes, then
the SHA-256 of everything before, then 32 bytes of seal (HMAC-SHA256; zeros where this user has no key).
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointError, InPlaceError, JournalError
from nestpatch.files.atomic import sync_folder
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import CHUNK, Checkpoint, IntArray, TensorInfo
from nestpatch.patcher.state_dir import TRANSACTION, UNDO, StateDir
from nestpatch.patcher.touched import working_bytes
from nestpatch.rows import Rows
from nestpatch.signing.machine import is_ours, seal
from nestpatch.values import dataclass

_FAMILY = b"nestpatch-journal/"
MAGIC = _FAMILY + b"3\n"
_DIGEST = 32
_MAX_HEADER = 16 << 20
"""Bytes of header JSON, which has an object per tensor."""
_WITNESSES = 64
"""Most untouched rows by which the model is recognized."""


@dataclass(frozen=True, eq=False)
class Region:
    """Rows of one tensor that a transaction may change."""

    info: TensorInfo
    rows: IntArray


@dataclass(frozen=True)
class SavedRegion:
    """Where a journal holds the rows of one tensor."""

    tensor: str
    rows: int
    """Number of rows."""
    row_bytes: int
    offset: int
    """Of the row numbers in the journal; the content of the rows follows them."""


@dataclass(frozen=True)
class Journal:
    """A complete journal. Its content is not yet compared with the model."""

    path: Path
    transaction: str
    sizes: Mapping[str, int]
    """Weight file -> bytes."""
    witness: tuple[tuple[str, int], ...]
    """(tensor, row) that no step touches."""
    witness_sha256: str
    regions: tuple[SavedRegion, ...]
    makes: tuple[str, ...]
    """Undo records that the transaction writes."""
    retires: tuple[str, ...]
    """Undo records that are not needed once the transaction is committed."""
    ours: bool
    """Whether the journal has the seal of this machine."""

    def row_numbers(self, file: FileIO, region: SavedRegion) -> IntArray:
        """The row numbers of a region.

        Args:
            file: The journal, open.
            region: The region.

        Returns:
            int64 [rows].

        Raises:
            ValueError: The journal ends early.
        """
        return np.frombuffer(_read_at(file, region.offset, 8 * region.rows), "<i8")

    def content(self, file: FileIO, region: SavedRegion, part: slice) -> Rows:
        """The saved bytes of some rows of a region.

        Args:
            file: The journal, open.
            region: The region.
            part: Which of its rows.

        Returns:
            uint8 [rows, row_bytes].

        Raises:
            ValueError: The journal ends early.
        """
        count, start = part.stop - part.start, region.offset + 8 * region.rows
        data = _read_at(file, start + part.start * region.row_bytes, count * region.row_bytes)
        return np.frombuffer(data, np.uint8).reshape(count, -1)


def write_journal(
    state_dir: StateDir,
    transaction: str,
    checkpoint: Checkpoint,
    regions: Sequence[Region],
    *,
    makes: Sequence[str] = (),
    retires: Sequence[str] = (),
) -> None:
    """Saves the present content of the regions, synced to disk: file and folder. Nothing of the model is changed.

    Args:
        state_dir: Where the state of the model is.
        transaction: Its name.
        checkpoint: The model.
        regions: The rows that the transaction may change.
        makes: Undo records that it writes.
        retires: Undo records that are not needed once it is committed.

    Raises:
        OSError: The journal cannot be written.
        InPlaceError: Every row of the model would change.
    """
    witness = _witnesses(checkpoint, regions)
    facts = {
        "transaction": transaction,
        "sizes": {file.name: file.stat().st_size for file in checkpoint.files},
        "witness": {"rows": witness, "sha256": witness_digest(witness, checkpoint)},
        "regions": [{"tensor": r.info.name, "row_bytes": r.info.row_bytes, "rows": len(r.rows)} for r in regions],
        "makes": list(makes),
        "retires": list(retires),
    }
    header = json.dumps(facts).encode()
    # Only its owner can read the file, and it is never opened through a link.
    flags = os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with open(state_dir.journal, "wb", opener=lambda name, mode: os.open(name, mode | flags, 0o600)) as file:
        state = sha256()

        def put(data: Any) -> None:
            file.write(data)
            state.update(data)

        put(MAGIC + struct.pack("<Q", len(header)) + header)
        for region in regions:
            put(np.ascontiguousarray(region.rows, "<i8").data)
            for _, rows in checkpoint.iter_rows(region.info.name, region.rows, row_bytes=working_bytes(region.info)):
                put(rows.view(np.uint8).data)
        digest = state.digest()
        file.write(digest + (bytes.fromhex(seal("journal", state_dir.folder, digest)) or bytes(_DIGEST)))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(state_dir.folder)
    # The folder may be as new as the journal.
    sync_folder(state_dir.folder.parent)


def _witnesses(checkpoint: Checkpoint, regions: Sequence[Region]) -> list[tuple[str, int]]:
    """(tensor, row) of rows that do not change: the first such row of every region, or else a row of another tensor."""
    spared = []
    for region in regions:
        gaps = np.flatnonzero(region.rows != np.arange(len(region.rows)))
        row = int(gaps[0]) if len(gaps) else len(region.rows)
        if row < region.info.rows:
            spared.append((region.info.name, row))
    if spared:
        return spared[:: max(1, len(spared) // _WITNESSES)][:_WITNESSES]
    touched = {region.info.name for region in regions}
    places = {(region.info.file, region.info.offset) for region in regions}
    for name in checkpoint.tensors():
        info = checkpoint.info(name)
        if name in touched or (info.file, info.offset) in places or not info.nbytes:
            continue
        with suppress(CheckpointError):  # a tensor that has no rows
            if len(checkpoint.read_rows(name, np.array([0]))) == 1:
                return [(name, 0)]
    raise InPlaceError("every row of the model would change: none would be left to recognize it by after a crash")


def witness_digest(rows: Sequence[tuple[str, int]], checkpoint: Checkpoint) -> str:
    """The digest by which a journal recognizes its model.

    Args:
        rows: (tensor, row) of rows that no step touches.
        checkpoint: The model.

    Returns:
        SHA-256 of the rows, hex.

    Raises:
        CheckpointError: A row cannot be read.
    """
    state = sha256()
    for name, row in rows:
        state.update(checkpoint.read_rows(name, np.array([row])).view(np.uint8).data)
    return state.hexdigest()


def remove_journal(path: Path) -> None:
    """Removes a journal, which ends its transaction.

    Args:
        path: The journal, which may be gone already.

    Raises:
        OSError: It cannot be removed.
    """
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def open_journal(path: Path) -> Iterator[FileIO]:
    """Opens a journal for reading.

    Args:
        path: The journal.

    Yields:
        The open file.

    Raises:
        JournalError: It is missing, not a regular file, or does not belong to this user or to root.
    """
    try:
        file = open_regular(path, follow=False, error=JournalError)
    except FileNotFoundError as error:
        raise JournalError(f"the journal {path} was removed in the meantime", advice="Run the command again.") from error
    except JournalError as error:
        error.advice = f"Run the command as the user who started the change, or remove {path} if you did not put it there."
        raise
    with file:
        owner = os.fstat(file.fileno()).st_uid
        if os.name != "nt" and owner not in {os.geteuid(), 0}:
            raise JournalError(
                f"the journal {path} belongs to user id {owner}, not to this user or to root",
                advice="Run the command as the user who started the change, or remove the journal.",
            )
        yield file


def read_journal(state_dir: StateDir) -> Journal | None:
    """Reads the journal of a model, and checks that it is complete. Changes nothing.

    Args:
        state_dir: Where the state of the model is.

    Returns:
        The journal; None if its writing was interrupted.

    Raises:
        JournalError: It has another format version (removing it could leave a model half patched), or its header contradicts
            its size.
    """
    path = state_dir.journal
    with open_journal(path) as file:
        magic = file.read(len(MAGIC)) or b""
        if magic != MAGIC and magic.startswith(_FAMILY) and magic.endswith(b"\n"):
            raise JournalError(
                f"the journal {path} was written by another version of nestpatch",
                advice="Run the command with the version that wrote it.",
            )
        size = os.fstat(file.fileno()).st_size
        if size < len(MAGIC) + 8 + 2 * _DIGEST or magic != MAGIC:
            return None
        file.seek(0)
        state, left = sha256(), size - 2 * _DIGEST
        while left and (block := file.read(min(CHUNK, left))):
            state.update(block)
            left -= len(block)
        digest = state.digest()
        if left or file.read(_DIGEST) != digest:
            return None
        mac = (file.read(_DIGEST) or b"").hex()
        try:
            return _parse(file, path, size - 2 * _DIGEST, ours=is_ours("journal", state_dir.folder, digest, mac))
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            raise JournalError(f"the journal {path} is not consistent: {str(error)[:200]}", advice=REMOVE_ADVICE) from error


REMOVE_ADVICE = (
    "nestpatch did not write this journal for this model. To remove it and leave the rows as they are: "
    "nestpatch recover MODEL --foreign remove"
)


def _parse(file: FileIO, path: Path, end: int, *, ours: bool) -> Journal:
    file.seek(len(MAGIC))
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER:
        raise ValueError(f"its header has {length} bytes, at most {_MAX_HEADER} are allowed")
    header = json.loads(_read_at(file, len(MAGIC) + 8, length))
    regions, offset = [], len(MAGIC) + 8 + length
    for region in header["regions"]:
        rows, row_bytes = _count(region["rows"]), _count(region["row_bytes"])
        regions.append(SavedRegion(_text(region["tensor"]), rows, row_bytes, offset))
        offset += rows * (8 + row_bytes)
    if offset != end:
        raise ValueError(f"its regions end at byte {offset}, its content at byte {end}")
    if not (header["sizes"] and header["witness"]["rows"] and regions):
        raise ValueError("it names no files, no rows, or no witness rows")
    makes, retires = (tuple(_text(name, UNDO) for name in header[part]) for part in ("makes", "retires"))
    return Journal(
        path=path,
        transaction=_text(header["transaction"], TRANSACTION),
        sizes={_text(name): _count(size) for name, size in header["sizes"].items()},
        witness=tuple((_text(name), _count(row, least=0)) for name, row in header["witness"]["rows"]),
        witness_sha256=_text(header["witness"]["sha256"]),
        regions=tuple(regions),
        makes=makes,
        retires=retires,
        ours=ours,
    )


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or not least <= value < 1 << 48:
        raise ValueError(f"{str(value)[:40]} where a number is expected")
    return value


def _text(value: Any, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or len(value) > 4096 or (pattern is not None and not pattern.fullmatch(value)):
        raise ValueError(f"{str(value)[:40]} where a name is expected")
    return value


def _read_at(file: FileIO, offset: int, length: int) -> bytes:
    file.seek(offset)
    parts = []
    while length:
        block = file.read(min(length, 64 << 20))
        if not block:
            raise ValueError("it ends early")
        parts.append(block)
        length -= len(block)
    return b"".join(parts)
