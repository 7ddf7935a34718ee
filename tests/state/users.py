"""Other users of this machine, where the tests run as root, and a limit to waiting."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

NOBODY = 65534
needs_root = pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can act as other users")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Runs as a user to whom file modes apply, if this process is root."""
    if os.name == "nt" or os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def by_nobody(act: Callable[[], object]) -> str:
    """Runs `act` in a process of another user: its result as text, or its error as "ErrorClass: reason"."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            signal.alarm(60)
            said = str(act())
        except BaseException as error:  # noqa: BLE001 - every error is reported
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode()[:60000])
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        reported = pipe.read().decode()
    os.waitpid(process, 0)
    return reported


class Waited(BaseException):
    """Raised when a block waits too long. No handler of errors catches it."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises Waited in a block that takes longer, for example because it waits for a pipe without a writer."""

    def stop(*_: object) -> None:
        raise Waited(f"for {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
