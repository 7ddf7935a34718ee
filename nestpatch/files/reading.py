"""Files that others may have put there: opened and read without trusting what they are.

A path given to nestpatch may name a pipe that nobody writes to, a device without end, a folder, a link, or a file of terabytes.
`open_regular` opens regular files and nothing else, `read_bounded` reads no more than its caller has use for. Neither waits.

Both raise OSError, whose `strerror` is a sentence for people, so that the `except OSError` of a caller names the file and the
class; or that class itself, when the caller gives it:

    try:
        data = read_bounded(path, MAX_LEDGER, follow=False, error=LedgerError)
    except FileNotFoundError:
        return Ledger()
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NoReturn

from nestpatch.errors import FileSystemError, NestpatchError

BLOCK = 16 << 20
"""Bytes read at a time, so that a limit costs no memory that the file does not fill."""
MAX_JSON = 64 << 20
"""Bytes of a JSON file in a model's folder. The largest are vocabularies: tokenizer.json of Gemma 3 has 33 MB."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}
# Windows lacks all of them but O_BINARY.
_SAFELY = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def open_regular(
    path: str | Path, *, follow: bool = True, write: bool = False, error: type[NestpatchError] | None = None
) -> FileIO:
    """Opens a regular file for reading, unbuffered; with `write` also for writing. It never creates or truncates one.

    follow: whether the last part of the path may be a symbolic link; say no for files that nestpatch itself keeps.

    Raises FileNotFoundError when there is nothing, and OSError with a reason in `strerror` for everything else: what is no
    regular file, may not be read, or cannot be a path. With `error` that class is raised in place of OSError, with the path and
    the reason; FileNotFoundError stays what it is.
    """
    try:
        return _open(path, follow, write)
    except FileNotFoundError:
        raise
    except OSError as refused:
        if error is None:
            raise
        raise error(f"cannot {'change' if write else 'read'} {path}: {refused.strerror or refused}") from refused


def read_bounded(path: str | Path, limit: int, *, follow: bool = True, error: type[NestpatchError] | None = None) -> bytes:
    """The whole content of a regular file that may have `limit` bytes.

    Raises what `open_regular` raises, and likewise for a longer file; of that nothing is read.
    """
    try:
        with open_regular(path, follow=follow) as file:
            return read_open(file, limit, path)
    except FileNotFoundError:
        raise
    except OSError as refused:
        if error is None:
            raise
        raise error(f"cannot read {path}: {refused.strerror or refused}") from refused


def read_text(path: str | Path, limit: int, *, error: type[NestpatchError] | None = None) -> str:
    """The same as text in UTF-8, whatever ends its lines. Raises UnicodeDecodeError too, or the class that was given."""
    data = read_bounded(path, limit, error=error)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as refused:
        if error is None:
            raise
        raise error(f"cannot read {path}: {refused}") from refused


def _open(path: str | Path, follow: bool, write: bool) -> FileIO:
    # Before it is opened: opening a device may do something.
    _require_regular(_status(path, follow), path)
    flags = (os.O_RDWR if write else os.O_RDONLY) | _SAFELY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    try:
        handle = os.open(path, flags)
    except OSError as refused:
        if refused.errno == errno.ELOOP and not follow:
            _refuse(errno.ELOOP, "it is a symbolic link, not a file", path)
        raise
    try:
        # And again: another process may have put something else there meanwhile.
        _require_regular(os.fstat(handle), path)
        return os.fdopen(handle, "r+b" if write else "rb", buffering=0)
    except BaseException:
        os.close(handle)
        raise


def _status(path: str | Path, follow: bool) -> os.stat_result:
    try:
        return os.stat(path, follow_symlinks=follow)  # noqa: PTH116 - links as the caller has it
    except ValueError:  # what no system call takes: a NUL, or characters that file names cannot hold
        _refuse(errno.EINVAL, "no file can have this name", path)


def _require_regular(found: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        _refuse(errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL, f"it is {kind}, not a file", path)


def read_open(file: FileIO, limit: int, path: str | Path) -> bytes:
    """The whole content of an open file that may have `limit` bytes. Raises OSError for a longer one."""
    blocks, left = [], limit
    if os.fstat(file.fileno()).st_size > limit:
        _refuse(errno.EFBIG, f"it is too long: such a file may have {limit} bytes", path)
    # The size is no promise: files of /proc have none, and others grow.
    while block := file.read(min(BLOCK, left + 1)):
        left -= len(block)
        if left < 0:
            _refuse(errno.EFBIG, f"it is too long: such a file may have {limit} bytes", path)
        blocks.append(block)
    return b"".join(blocks)


def _refuse(number: int, reason: str, path: str | Path) -> NoReturn:
    raise OSError(number, reason, os.fspath(path))


@contextmanager
def alone(lock: Path, error: type[NestpatchError] = FileSystemError) -> Iterator[None]:
    """Waits for other processes that hold this lock file, which is made when it is missing; its folder must be there.

    The system frees the lock when a process dies. Raises `error` when the file cannot be made, or its file system has no locks.
    """
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
    except OSError as refused:
        raise error(f"cannot write {lock}: {refused.strerror or refused}") from refused
    try:
        _lock(handle, lock, error)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, lock: Path, error: type[NestpatchError]) -> None:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as refused:
        advice = "Keep this folder on a file system with locks, such as a local disk: set NESTPATCH_HOME."
        raise error(f"cannot lock {lock}: {refused.strerror or refused}", advice=advice) from refused
