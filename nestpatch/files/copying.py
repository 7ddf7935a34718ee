"""Copying weight files as fast as the system can: a reflink where the file system has them, else inside the kernel."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nestpatch.files.threads import meanwhile

STRETCH = 256 << 20
"""Bytes between two flushes."""

_FICLONE = 0x40049409
"""ioctl of Linux: let the target share the source's blocks (btrfs, XFS, bcachefs)."""


def copy_file(source: Path, target: Path, *, flush: bool = False) -> str:
    """Copies content and mode to a new file; links are followed. Returns how: "reflink", "kernel" or "buffered".

    With `flush` the disk begins to write while the copy goes on, for a caller that will sync the file.

    Raises OSError; the target may then be there in part.
    """
    with open(source, "rb") as read, open(target, "xb", opener=_private) as write, _flushing(write.fileno(), flush) as go_on:
        how = _reflink(read.fileno(), write.fileno()) or _in_kernel(read.fileno(), write.fileno(), go_on)
        if how is None:
            read.seek(0)
            write.seek(0)
            write.truncate()
            shutil.copyfileobj(read, write, 16 << 20)
            how = "buffered"
    # A read-only base must not make its own copy unpatchable.
    target.chmod(source.stat().st_mode & 0o777 | 0o600)
    return how


def _private(name: str, flags: int) -> int:
    """The source may be for its owner alone: so is the copy, from the first byte on."""
    return os.open(name, flags, 0o600)


@contextmanager
def _flushing(handle: int, flush: bool) -> Iterator[Callable[[], None]]:
    """Gives a function that lets another thread sync the file, or that does nothing."""
    if not flush:
        yield lambda: None
        return
    with meanwhile() as start:
        under_way = start(lambda: None)

        def go_on() -> None:
            nonlocal under_way
            if under_way.done():
                under_way = start(partial(os.fsync, handle))

        yield go_on


def _reflink(read: int, write: int) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.ioctl(write, _FICLONE, read)
        return "reflink"
    return None


def _in_kernel(read: int, write: int, go_on: Callable[[], None]) -> str | None:
    if not hasattr(os, "copy_file_range"):
        return None
    left = os.fstat(read).st_size
    try:
        while left:
            copied = os.copy_file_range(read, write, min(left, STRETCH))
            if copied == 0:
                return None  # some file systems end early instead of failing
            left -= copied
            go_on()
    except OSError as error:
        import errno

        # Unsupported here: copy with a buffer. A full disk is a full disk.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        return None
    return "kernel"
