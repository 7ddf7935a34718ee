"""The SHA-256 of a file while it is being written.

`Sink` writes a file and hashes it in a second thread, which reads back what is still in the page cache: the digest of a 16 GB
file costs little time on top of writing it. `seal` hashes a file that something else wrote while it is synced.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.atomic import sync_file
from nestpatch.files.copying import PIECE, copy_in_kernel
from nestpatch.files.flushing import STRETCH, flushing
from nestpatch.files.threads import meanwhile

Data = bytes | memoryview
_BLOCK = 1 << 20
_COPY = 64 << 20
"""Bytes copied in one call."""


class Sink:
    """A new file that is written from its start to its end, and its SHA-256.

    Use it as a context manager: the block writes, and the disk begins to; leaving it syncs the file and ends the hashing
    thread. When the block raises, the file is closed as it is, without a digest.

        with Sink(path) as sink:
            sink.write(header)
            sink.copy(source, offset, nbytes)
        sink.sha256, sink.nbytes

    Attributes:
        nbytes: Bytes written so far.
    """

    def __init__(self, path: Path, *, kept: bool = True) -> None:
        """Creates the file, or empties an existing one.

        Args:
            path: The file.
            kept: False for a file that only another program reads, and that is removed then: it is neither hashed nor synced.

        Raises:
            OSError: It cannot be created.
        """
        self.nbytes = 0
        self._path, self._kept = path, kept
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._state = sha256()
        self._news = Condition()
        self._done = False
        self._stopped = False
        self._in_kernel = True
        self._failure: OSError | None = None
        self._thread = Thread(target=self._hash, daemon=True)
        self._flushing = ExitStack()
        self._flush: Callable[[Path], None] | None = None
        self._next_flush = STRETCH

    def __enter__(self) -> Sink:
        if self._kept:
            self._flush = self._flushing.enter_context(flushing())
            self._thread.start()
        return self

    def write(self, data: Data) -> None:
        """Appends a block.

        Args:
            data: Its bytes.

        Raises:
            OSError: The disk is full, or broken.
        """
        view = memoryview(data)
        while view:
            view = view[self._file.write(view[:PIECE]) :]
        self._notify(memoryview(data).nbytes)

    def copy(self, file: Path, offset: int, nbytes: int) -> None:
        """Appends a part of another file, inside the kernel where the system can.

        Args:
            file: The other file.
            offset: The first byte to copy.
            nbytes: How many bytes.

        Raises:
            CheckpointFormatError: The other file ends before.
            OSError: The disk is full, or broken.
        """
        with open(file, "rb", buffering=0) as source:
            while nbytes:
                count = self._copy_some(source.fileno(), offset, min(nbytes, _COPY))
                if not count:
                    raise CheckpointFormatError(f"{file} ends too early")
                offset, nbytes = offset + count, nbytes - count

    def _copy_some(self, source: int, offset: int, nbytes: int) -> int:
        if self._in_kernel:
            if count := copy_in_kernel(source, self._file.fileno(), nbytes, offset):
                self._notify(count)
                return count
            self._in_kernel = False
        os.lseek(source, offset, os.SEEK_SET)
        data = os.read(source, min(nbytes, _BLOCK))
        self.write(data)
        return len(data)

    def _notify(self, count: int) -> None:
        with self._news:
            self.nbytes += count
            self._news.notify()
        if self._flush is not None and self.nbytes >= self._next_flush:
            self._next_flush = self.nbytes + STRETCH
            self._flush(self._path)

    @property
    def sha256(self) -> str:
        """Hex digest of everything written; complete only after the `with` block."""
        return self._state.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            if not self._kept:
                return
            try:
                self._flushing.close()
                if kind is None:
                    os.fsync(self._file.fileno())
            except OSError:
                if kind is None:
                    raise
            finally:
                with self._news:
                    self._done = True
                    self._stopped = kind is not None
                    self._news.notify()
                self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _hash(self) -> None:
        """Reads what was written and hashes it, until `__exit__` ends it. Runs in the second thread."""
        buffer = memoryview(bytearray(_BLOCK))
        hashed = 0
        try:
            with open(self._path, "rb", buffering=0) as file:
                while self._wait(hashed):
                    if not (count := file.readinto(buffer)):
                        raise OSError(f"{self._path} was truncated while it was written")
                    self._state.update(buffer[:count])
                    hashed += count
        except OSError as error:
            self._failure = error

    def _wait(self, hashed: int) -> bool:
        """Waits until there is a block to hash or everything is written. Returns whether anything is left to hash."""
        with self._news:
            self._news.wait_for(lambda: self._done or self.nbytes - hashed >= _BLOCK)
            return self.nbytes > hashed and not self._stopped


def seal(path: Path, *, sync: bool = True) -> tuple[int, str]:
    """Hashes a file that something else wrote, and syncs it meanwhile.

    Args:
        path: The file.
        sync: Whether to sync it.

    Returns:
        (bytes, SHA-256 in hex).

    Raises:
        OSError: It cannot be read or synced.
    """
    state = sha256()
    with meanwhile() as start, open(path, "rb", buffering=0) as file:
        if sync:
            start(partial(sync_file, path))
        buffer = memoryview(bytearray(_BLOCK))
        while count := file.readinto(buffer):
            state.update(buffer[:count])
        return file.tell(), state.hexdigest()
