"""A file being written, and its SHA-256: hashing runs beside writing, so that it costs next to no time."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path
from queue import Queue
from threading import Thread
from types import TracebackType

Data = bytes | memoryview
_AHEAD = 4
"""Blocks that the hash may lag behind."""


class Sink:
    """Appends blocks to a file. Blocks must not change after they were given away.

    Leaving the `with` block syncs the file; `sha256` and `nbytes` are then those of the whole file.
    """

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._state = sha256()
        self._queue: Queue[Data | None] = Queue(_AHEAD)
        self._thread = Thread(target=self._hash, daemon=True)

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def write(self, data: Data) -> None:
        """Appends a block and hands it to the hash."""
        self._queue.put(data)
        view = memoryview(data)
        self.nbytes += view.nbytes
        while view:
            view = view[self._file.write(view) :]

    @property
    def sha256(self) -> str:
        """Of all that was written; only after the `with` block."""
        return self._state.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    def _hash(self) -> None:
        while (data := self._queue.get()) is not None:
            self._state.update(data)


def seal(path: Path) -> tuple[int, str]:
    """Syncs a file that something else wrote. Returns (bytes, SHA-256)."""
    state = sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            state.update(block)
        return file.tell(), state.hexdigest()
