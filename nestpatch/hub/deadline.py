"""How long a server may take for a file, in total: byte by byte, from redirect to redirect, and with what it asks to wait for.

The timeouts of HTTP libraries are for one read each. A server that sends a byte every few seconds keeps to them for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

SETUP = 30.0
"""Seconds for any file: connections, redirects, a server that has to think."""
RATE = 64_000
"""Bytes per second that must arrive beyond that."""
MOST_WAITS = 60.0
"""Seconds of pauses between attempts, in total: what a server may ask for with Retry-After."""

T = TypeVar("T")


class SlowError(Exception):
    """The time is over."""


class Deadline:
    """The time for a file of a size, or for what is read of it. Begins when it is made.

    `share`: files that are read at the same time over one line.
    """

    def __init__(self, size: int, share: int = 1) -> None:
        self.seconds = SETUP + size * share / RATE
        self._end = time.monotonic() + self.seconds
        self._pauses = MOST_WAITS

    def _left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def check(self) -> None:
        """Raises SlowError when the time is over."""
        if not self._left():
            raise self._over()

    def run(self, work: Callable[[], T]) -> T:
        """The result of some work; raises what it raises, and SlowError when it is not done in time.

        The work runs in a thread: no other way ends a wait for headers that come byte by byte. It should `check` where it can,
        so that the thread ends too.
        """
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                done.set_exception(error)

        Thread(target=run, daemon=True).start()
        wait([done], self._left())
        if not done.done():
            raise self._over()
        return done.result()

    def pause(self, seconds: float) -> None:
        """Waits, which does not count as the server's time. Raises SlowError when the pauses become too long in total."""
        if seconds > self._pauses:
            raise SlowError(f"the server asks for a pause of {seconds:g} s; {self._pauses:g} s are left for pauses")
        self._pauses -= seconds
        self._end += seconds
        time.sleep(seconds)

    def _over(self) -> SlowError:
        return SlowError(f"it took longer than the {self.seconds:.1f} s that are given")
