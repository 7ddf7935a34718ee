"""Work in other threads, for long stretches of hashing, packing, quantizing and syncing, which release the interpreter.

Two threads that make many small reads and writes would be slower than one: each call hands the interpreter over and waits to
get it back. No result depends on how many threads there are.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Generic, TypeVar

from nestpatch.errors import DataError

T = TypeVar("T")
R = TypeVar("R")
_AHEAD = 1
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


class Job(Generic[R]):
    """Work for another thread. concurrent.futures has the same, and takes as long to import as hashing 8 MB."""

    def __init__(self, work: Callable[[], R]) -> None:
        """Prepares the work; `run` does it.

        Args:
            work: What to do.
        """
        self._work = work
        self._error: BaseException | None = None
        self._ended = Lock()
        self._ended.acquire()

    def run(self) -> None:
        """Does the work, in the thread that calls this."""
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised where the result is wanted
            self._error = error
        finally:
            self._ended.release()

    def done(self) -> bool:
        """Whether the work has ended."""
        return not self._ended.locked()

    def result(self) -> R:
        """Waits for the work, and returns its result or raises its exception."""
        with self._ended:
            if self._error is not None:
                raise self._error
            return self._result


@contextmanager
def _started(count: int) -> Iterator[Callable[[Job[Any]], None]]:
    """Yields a function that queues a job for some threads. Leaving the block waits for all jobs."""
    jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()

    def serve() -> None:
        while (job := jobs.get()) is not None:
            job.run()

    threads = [Thread(target=serve) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        yield jobs.put
    finally:
        for _ in threads:
            jobs.put(None)
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def beside(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Maps a function over items in a second thread, while this thread produces the items; in this one if it is the only one.

    An exception is raised in the place of its result; unfinished work is waited for.

    Args:
        work: Runs in the second thread.
        items: Iterated in this thread, at most _AHEAD items before the results.

    Yields:
        The results, in the order of the items.
    """
    return _mapped(work, items, 1)


def spread(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
    """Maps a function over items in as many threads as may compute, while this thread only produces the items.

    For work that takes much longer than producing an item, and releases the interpreter. An exception is raised in the place of
    its result; unfinished work is waited for.

    Args:
        work: Runs in several threads at once; nothing that it calls is divided among further threads.
        items: Iterated in this thread, at most _AHEAD items before the results and the work.

    Yields:
        The results, in the order of the items.
    """

    def alone(item: T) -> R:
        with limited(1):
            return work(item)

    return _mapped(alone, items, allowed())


def _mapped(work: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    if allowed() == 1:
        yield from map(work, items)
        return
    waiting: deque[Job[R]] = deque()
    with _started(threads) as start:
        for item in items:
            waiting.append(Job(partial(work, item)))
            start(waiting[-1])
            if len(waiting) >= threads + _AHEAD:
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
    others = [Job(partial(work, part)) for part in parts[1:]]
    with _started(threads - 1) as start:
        for other in others:
            start(other)
        work(parts[0])
    for other in others:
        other.result()


@contextmanager
def meanwhile() -> Iterator[Callable[[Callable[[], None]], Job[None]]]:
    """Yields a function that queues work for a second thread and returns it.

    The work is to wait for the disk, so `limited` does not count its thread. Leaving the block waits for all of the work and
    raises the first exception that it raised.
    """
    begun: list[Job[None]] = []

    def begin(work: Callable[[], None]) -> Job[None]:
        begun.append(Job(work))
        start(begun[-1])
        return begun[-1]

    with _started(1) as start:
        yield begin
    for job in begun:
        job.result()
