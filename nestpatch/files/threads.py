"""Work in other threads, for long stretches of hashing, packing, quantizing and syncing, which release the interpreter.

Two threads that make many small reads and writes would be slower than one: each call hands the interpreter over and waits to
get it back. No result depends on how many threads there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from nestpatch.errors import DataError

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2
"""Items that may wait for the second thread: each holds blocks of rows in memory."""
_LIMIT: ContextVar[int | None] = ContextVar("threads", default=None)


def cores() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def allowed() -> int:
    """How many threads may compute, the calling one included: what `limited` says, else one for every processor."""
    return _LIMIT.get() or cores()


@contextmanager
def limited(threads: int | None) -> Iterator[None]:
    """Inside, no more threads compute than the caller allows.

    Args:
        threads: Their number; None changes nothing.

    Raises:
        DataError: It is below 1.
    """
    if threads is not None and threads < 1:
        raise DataError(f"threads must be at least 1, got {threads}")
    before = _LIMIT.set(threads or _LIMIT.get())
    try:
        yield
    finally:
        _LIMIT.reset(before)


def beside(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Maps a function over items in a second thread, while this thread produces the items; in this one if it is the only one.

    An exception is raised in the place of its result; unfinished work is waited for.

    Args:
        work: Runs in the second thread.
        items: Iterated in this thread, at most _AHEAD items before the results.

    Yields:
        The results, in the order of the items.
    """
    if allowed() == 1:
        yield from map(work, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_parts(work: Callable[[slice], None], count: int, least: int) -> None:
    """Divides a range among all threads that may compute. The first exception is raised when all of them have ended.

    Args:
        work: Is called with consecutive slices of the range, in several threads.
        count: Length of the range.
        least: Length from which a part is worth a thread.
    """
    threads = max(1, min(allowed(), count // max(1, least)))
    edges = [count * number // threads for number in range(threads + 1)]
    parts = list(map(slice, edges, edges[1:]))
    if threads == 1:
        work(parts[0])
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(work, part) for part in parts[1:]]
        work(parts[0])
    for other in others:
        other.result()


@contextmanager
def meanwhile() -> Iterator[Callable[[Callable[[], None]], Future[None]]]:
    """Yields a function that queues work for a second thread and returns its Future.

    The work is to wait for the disk, so `limited` does not count its thread. Leaving the block waits for all of the work and
    raises the first exception that it raised.
    """
    from concurrent.futures import ThreadPoolExecutor

    started: list[Future[None]] = []

    def start(work: Callable[[], None]) -> Future[None]:
        started.append(pool.submit(work))
        return started[-1]

    with ThreadPoolExecutor(1) as pool:
        yield start
    for future in started:
        future.result()
