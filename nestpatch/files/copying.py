"""Copies weight files as fast as the system can: a reflink where the file system has them, else inside the kernel.

`copy_file` copies a whole file; `copy_in_kernel` is the step that it shares with `hashing.Sink`.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from nestpatch.files.flushing import STRETCH

PIECE = 128 << 10
"""Bytes of one write to a new file. For larger ones Linux looks for larger pieces of free memory, which can take longer than
the write itself (bench/LOG.md, 2026-11-26)."""
_FICLONE = 0x40049409
"""ioctl of Linux: let the target share the source's blocks (btrfs, XFS, bcachefs)."""
_REAL_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def copy_file(source: Path, target: Path, *, flush: Callable[[Path], None] | None = None) -> str:
    """Copies the content and the mode of a file to a new file; links are followed.

    Args:
        source: The file to copy.
        target: The new file.
        flush: Of `flushing`; is called with a target of at least STRETCH bytes whenever so much of it was copied.

    Returns:
        How it was copied: "reflink", "kernel" or "buffered".

    Raises:
        OSError: Reading or writing failed; a part of the target may then exist.
    """
    with (
        open(source, "rb") as read,
        # The source may be readable by its owner only: so is the copy, from the first byte on.
        open(target, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as write,
    ):
        go_on = partial(flush, target) if flush is not None else lambda: None
        how = _reflink(read.fileno(), write.fileno()) or _whole_in_kernel(read.fileno(), write.fileno(), go_on)
        if how is None:
            read.seek(0)
            write.seek(0)
            write.truncate()
            shutil.copyfileobj(read, write, PIECE)
            how = "buffered"
    # A read-only base must not make its own copy unpatchable.
    target.chmod(source.stat().st_mode & 0o777 | 0o600)
    return how


def copy_in_kernel(source: int, target: int, nbytes: int, offset: int | None = None) -> int:
    """Copies bytes between two open files without bringing them into this process.

    Args:
        source: Descriptor of the file to read.
        target: Descriptor of the file to write, at its current position.
        nbytes: How many bytes at most.
        offset: Where to read; None for the source's own position, which then moves.

    Returns:
        How many bytes were copied. 0 at the end of the source, and where the system cannot do it: copy with a buffer.

    Raises:
        OSError: The disk is full, or broken.
    """
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, target, nbytes, offset)
    except OSError as error:
        if error.errno in _REAL_FAILURES:
            raise
        return 0


def _reflink(read: int, write: int) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    with suppress(OSError):
        fcntl.ioctl(write, _FICLONE, read)
        return "reflink"
    return None


def _whole_in_kernel(read: int, write: int, go_on: Callable[[], None]) -> str | None:
    size = left = os.fstat(read).st_size
    while left:
        if not (copied := copy_in_kernel(read, write, min(left, STRETCH))):
            return None  # unsupported here; some file systems end early instead of failing
        left -= copied
        if size >= STRETCH:
            go_on()
    return "kernel"
