"""A file being written, and its SHA-256: a second thread hashes what lies in the page cache already, and costs little time."""

from __future__ import annotations

import errno
import os
from hashlib import sha256
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType

from nestpatch.errors import CheckpointFormatError

Data = bytes | memoryview
_BLOCK = 1 << 20
_COPY = 64 << 20
"""Bytes copied in one call."""


class Sink:
    """Appends to a file. Leaving the `with` block syncs it; `sha256` and `nbytes` are then those of the whole file."""

    def __init__(self, path: Path) -> None:
        self.nbytes = 0
        self._path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._state = sha256()
        self._news = Condition()
        self._done = False
        self._stopped = False
        self._in_kernel = hasattr(os, "copy_file_range")
        self._failure: OSError | None = None
        self._thread = Thread(target=self._hash, daemon=True)

    def __enter__(self) -> Sink:
        self._thread.start()
        return self

    def write(self, data: Data) -> None:
        """Appends a block."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._tell(memoryview(data).nbytes)

    def copy(self, file: Path, offset: int, nbytes: int) -> None:
        """Appends a part of another file, inside the kernel where it can.

        Raises CheckpointFormatError when that file ends too early.
        """
        with open(file, "rb", buffering=0) as source:
            while nbytes:
                count = self._copy_some(source.fileno(), offset, min(nbytes, _COPY))
                if not count:
                    raise CheckpointFormatError(f"{file} ends too early")
                offset, nbytes = offset + count, nbytes - count

    def _copy_some(self, source: int, offset: int, nbytes: int) -> int:
        if self._in_kernel:
            try:
                count = os.copy_file_range(source, self._file.fileno(), nbytes, offset)
            except OSError as error:
                # Unsupported between these files: copy with a buffer. A full disk is a full disk.
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
                count = 0
            if count:
                self._tell(count)
                return count
            self._in_kernel = False
        os.lseek(source, offset, os.SEEK_SET)
        data = os.read(source, min(nbytes, _BLOCK))
        self.write(data)
        return len(data)

    def _tell(self, count: int) -> None:
        with self._news:
            self.nbytes += count
            self._news.notify()

    @property
    def sha256(self) -> str:
        """Of all that was written; only after the `with` block."""
        return self._state.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._file:
            try:
                if kind is None:
                    os.fsync(self._file.fileno())
            finally:
                with self._news:
                    self._done = True
                    self._stopped = kind is not None
                    self._news.notify()
                self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure

    def _hash(self) -> None:
        """Follows the writer through the file."""
        buffer = memoryview(bytearray(_BLOCK))
        hashed = 0
        try:
            with open(self._path, "rb", buffering=0) as file:
                while self._wait(hashed):
                    if not (count := file.readinto(buffer)):
                        raise OSError(f"{self._path} was cut off while it was written")
                    self._state.update(buffer[:count])
                    hashed += count
        except OSError as error:
            self._failure = error

    def _wait(self, hashed: int) -> bool:
        """Until there is a block to hash, or all of it is written. False: there is nothing left to do."""
        with self._news:
            self._news.wait_for(lambda: self._done or self.nbytes - hashed >= _BLOCK)
            return self.nbytes > hashed and not self._stopped


def seal(path: Path) -> tuple[int, str]:
    """Syncs a file that something else wrote. Returns (bytes, SHA-256)."""
    state = sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(_BLOCK):
            state.update(block)
        return file.tell(), state.hexdigest()
