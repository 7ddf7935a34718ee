"""Lets the disk write a new file while the rest of it is still being computed or copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from nestpatch.files.atomic import sync_file
from nestpatch.files.threads import Job, meanwhile

STRETCH = 256 << 20
"""Bytes of a large file between two flushes."""


@contextmanager
def flushing() -> Iterator[Callable[[Path], None]]:
    """Yields a function that has the disk write what a file holds by now, without waiting for it.

    One flush runs at a time and one waits, which covers all that is written until it begins: more calls queue nothing.

    Raises:
        OSError: On leaving the block: a file could not be synced.
    """
    with meanwhile() as start:
        pending: list[Job[None]] = []

        def flush(path: Path) -> None:
            pending[:] = [job for job in pending if not job.done()]
            if len(pending) < 2:
                pending.append(start(partial(sync_file, path)))

        yield flush
