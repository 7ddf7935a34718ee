"""Journals as an attacker writes them: with correct checksums, but without the seal of this machine."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher._journal import MAGIC, Region, write_journal
from tests.state.conftest import Scene

Header = dict[str, Any]


def genuine(scene: Scene, rows: Mapping[str, Sequence[int]]) -> bytes:
    """The journal that nestpatch itself writes for these rows of a model, sealed by this machine. The file is removed again."""
    checkpoint, state_dir = open_checkpoint(scene.model), scene.state_dir
    made = not state_dir.folder.exists()
    state_dir.folder.mkdir(exist_ok=True)
    regions = [Region(checkpoint.info(name), np.array(numbers, np.int64)) for name, numbers in sorted(rows.items())]
    write_journal(state_dir, "ab" * 8, checkpoint, regions)
    data = state_dir.journal.read_bytes()
    state_dir.journal.unlink()
    if made:
        state_dir.folder.rmdir()
    return data


def forged(journal: bytes, change: Callable[[Header], None] = lambda header: None, *, content: bytes | None = None) -> bytes:
    """A journal with another header, optionally other content, a correct checksum and no seal."""
    (length,) = struct.unpack("<Q", journal[len(MAGIC) : len(MAGIC) + 8])
    start = len(MAGIC) + 8
    header = json.loads(journal[start : start + length])
    change(header)
    text = json.dumps(header).encode()
    body = MAGIC + struct.pack("<Q", len(text)) + text + (journal[start + length : -64] if content is None else content)
    return body + sha256(body).digest() + bytes(32)


def content_of(rows: Sequence[int], data: Sequence[bytes]) -> bytes:
    """The content of one region: row numbers, then their bytes."""
    return np.array(rows, "<i8").tobytes() + b"".join(data)


def plant(scene: Scene, journal: bytes) -> Path:
    """Puts a journal where nestpatch looks for one."""
    scene.state_dir.folder.mkdir(exist_ok=True)
    scene.state_dir.journal.write_bytes(journal)
    return scene.state_dir.journal
