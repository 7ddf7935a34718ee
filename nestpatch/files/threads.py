"""Work in a second thread, for long stretches of hashing, packing and syncing, which release the interpreter.

Two threads that make many small reads and writes would be slower than one: each call hands the interpreter over and waits to
get it back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 2
"""Items that may wait for the second thread: each holds blocks of rows in memory."""


def beside(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Maps a function over items in a second thread, while this thread produces the items.

    An exception is raised in the place of its result; unfinished work is waited for.

    Args:
        work: Runs in the second thread.
        items: Iterated in this thread, at most _AHEAD items before the results.

    Yields:
        The results, in the order of the items.
    """
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def meanwhile() -> Iterator[Callable[[Callable[[], None]], Future[None]]]:
    """Yields a function that queues work for a second thread and returns its Future.

    Leaving the block waits for all of the work and raises the first exception that it raised.
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
