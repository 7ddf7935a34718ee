"""The one file lock of nestpatch: flock, or msvcrt on Windows. The system frees a lock when its process dies.

`lock` and `unlock` work on an open file; `lock` raises a plain OSError where the file system has no locks (ENOLCK), so
that each caller can say what that means for it. `exclusive` opens a lock file and names the error itself.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nestpatch.errors import FileSystemError, NestpatchError

WINDOWS = os.name == "nt"
"""There a directory cannot be opened, and so not locked; and no lock is shared."""
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK)


def lock(handle: int, *, shared: bool = False, wait: bool = True) -> bool:
    """Locks an open file.

    Args:
        handle: A file descriptor; a directory's only where the system can open one.
        shared: Whether other shared locks may exist at the same time; Windows has none.
        wait: Whether to wait until the lock is free.

    Returns:
        Whether the file is locked now; always True with `wait`.

    Raises:
        OSError: The file system has no locks; on Windows also after ten seconds of waiting.
    """
    try:
        if WINDOWS:
            import msvcrt

            mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined,unused-ignore]
            msvcrt.locking(handle, mode, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait and error.errno in _TAKEN:
            return False
        raise
    return True


def unlock(handle: int) -> None:
    """Frees the lock of an open file at once.

    Closing the file is not enough where another thread forks at that moment: the child holds the same lock until it runs its
    own program.

    Args:
        handle: The file descriptor.
    """
    if not WINDOWS:
        import fcntl

        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def exclusive(file: Path, error: type[NestpatchError] = FileSystemError) -> Iterator[None]:
    """Holds a lock file for the duration of the block, waiting for other processes that hold it.

    Args:
        file: The lock file. It is created (mode 0600) when it is missing; its folder must exist.
        error: The class to raise.

    Raises:
        NestpatchError: Of the class `error`: the file cannot be created, or its file system has no locks.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(file, flags, 0o600)
    except OSError as refused:
        raise error(f"cannot write {file}: {refused.strerror or refused}") from refused
    try:
        try:
            lock(handle)
        except OSError as refused:
            advice = "Keep this folder on a file system with locks, such as a local disk: set NESTPATCH_HOME."
            raise error(f"cannot lock {file}: {refused.strerror or refused}", advice=advice) from refused
        yield
    finally:
        os.close(handle)
