"""Threads beside the main one, for long stretches of hashing, packing and syncing that leave the interpreter alone.

Two threads of reads and writes would be slower than one: each small call hands the interpreter over and waits to get it back.
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
AHEAD = 2
"""Items that wait for the second thread at most: each holds blocks of rows in memory."""


def beside(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The results of `work`, done in a second thread, in the order of the items, which are made in this one.

    What an item raises is raised in its turn; what is under way is waited for.
    """
    from concurrent.futures import ThreadPoolExecutor

    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def meanwhile() -> Iterator[Callable[[Callable[[], None]], Future[None]]]:
    """Gives a function that starts work in another thread, one piece after the other.

    At the end waits for all of it, and raises what a piece raised.
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
