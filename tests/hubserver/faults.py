"""What may go wrong on the way: each fault stands between the request and the true answer."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from tests.hubserver.messages import Answer, Request

Serve: TypeAlias = Callable[[Request], Answer]
Bend: TypeAlias = Callable[[Request, Serve], Answer]


@dataclass
class Fault:
    """Bends the answers to requests whose "METHOD target" matches; the first `skip` pass, then `times` are bent (None: all)."""

    pattern: str
    bend: Bend
    times: int | None = None
    skip: int = 0
    seen: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def strikes(self, request: Request) -> bool:
        """Whether this request is bent. Counts."""
        if not re.search(self.pattern, f"{request.method} {request.target}"):
            return False
        with self._lock:
            self.seen += 1
            return self.seen > self.skip and (self.times is None or self.seen <= self.skip + self.times)


def served(request: Request, serve: Serve, faults: list[Fault]) -> Answer:
    """The answer after all faults that strike; the last one set stands nearest to the client."""
    for fault in faults:
        if fault.strikes(request):
            serve = _around(fault.bend, serve)
    return serve(request)


def _around(bend: Bend, serve: Serve) -> Serve:
    return lambda request: bend(request, serve)


def status(code: int, **headers: str) -> Bend:
    """Another status, without content."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _request, _serve: Answer(code, named)


def truncated(count: int) -> Bend:
    """The connection breaks after `count` bytes of the body."""
    return lambda request, serve: replace(serve(request), cut=count)


def shortened(count: int) -> Bend:
    """A proxy that cuts the body to `count` bytes and says so: HTTP is content, the content is not."""

    def bend(request: Request, serve: Serve) -> Answer:
        answer = serve(request)
        return replace(answer, body=answer.body[:count])

    return bend


def dropped() -> Bend:
    """The connection is closed without an answer."""
    return lambda _request, _serve: Answer(cut=-1)


def corrupted(position: int = 0) -> Bend:
    """One bit of the body differs; the length is the same."""

    def bend(request: Request, serve: Serve) -> Answer:
        answer = serve(request)
        body = bytearray(answer.body)
        body[position] ^= 1
        return replace(answer, body=bytes(body))

    return bend


def slow(seconds: float) -> Bend:
    """The answer comes late."""

    def bend(request: Request, serve: Serve) -> Answer:
        time.sleep(seconds)
        return serve(request)

    return bend


def trickled(pace: float, *, head: bool = False) -> Bend:
    """The body comes one byte at a time, some seconds apart; with `head`, the status line and the headers too."""
    return lambda request, serve: replace(serve(request), pace=pace, slow_head=head)


def redirected(url: str) -> Bend:
    """The client is sent somewhere else."""
    return lambda _request, _serve: Answer(302, {"Location": url})


def replayed(answer: Answer) -> Bend:
    """A fixed answer, whatever was asked: yesterday's, or somebody else's."""
    return lambda _request, _serve: answer


def rangeless() -> Bend:
    """A server or proxy that ignores Range and sends everything."""
    return lambda request, serve: serve(request.without("range"))
