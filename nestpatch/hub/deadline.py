"""The total time that a server may take for a file: connections, redirects, repeated attempts and slow bytes together.

The timeouts of HTTP libraries apply to one read each. A server that sends a byte every few seconds never exceeds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

SETUP = 30.0
"""Seconds for any file: connections, redirects, a server that is slow to start."""
RATE = 64_000
"""Bytes per second that must arrive beyond that."""
MOST_WAITS = 60.0
"""Seconds of pauses between attempts, in total: what a server may ask for with Retry-After."""

T = TypeVar("T")


class SlowError(Exception):
    """The server took too long."""


class Deadline:
    """The time for a file, or for a part of it. Starts when it is made.

    Args:
        size: Bytes to read.
        share: Number of files that are read at the same time over one connection.
    """

    def __init__(self, size: int, share: int = 1) -> None:
        self._begin(SETUP + size * share / RATE)

    @classmethod
    def of(cls, seconds: float) -> Deadline:
        """A time that does not depend on a size.

        Args:
            seconds: How long.

        Returns:
            The deadline.
        """
        deadline = cls.__new__(cls)
        deadline._begin(seconds)
        return deadline

    def _begin(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds
        self._pauses = MOST_WAITS

    def check(self) -> None:
        """Checks the time.

        Raises:
            SlowError: The time is over.
        """
        if time.monotonic() >= self._end:
            raise SlowError(f"it took longer than the allowed {self.seconds:.1f} s")

    def run(self, work: Callable[[], T]) -> T:
        """Runs work in a thread: nothing else ends a wait for headers that come byte by byte.

        Args:
            work: Should call `check` where it can, so that its thread ends too.

        Returns:
            The result of the work.

        Raises:
            SlowError: The work was not done in time. Exceptions of the work are raised as they are.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again by done.result()
                done.set_exception(error)

        Thread(target=run, daemon=True).start()
        while not wait([done], max(0.0, self._end - time.monotonic())).done:
            self.check()
        return done.result()

    def pause(self, seconds: float) -> None:
        """Waits; pauses do not count as the server's time.

        Args:
            seconds: How long.

        Raises:
            SlowError: The pauses become too long in total.
        """
        if seconds > self._pauses:
            raise SlowError(f"the server asks for a pause of {seconds:g} s; {self._pauses:g} s are left for pauses")
        self._pauses -= seconds
        self._end += seconds
        time.sleep(seconds)
