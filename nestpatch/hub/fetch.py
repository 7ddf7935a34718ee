"""Small files over HTTP: complete, in time, from the host that was asked, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from nestpatch.errors import HubAnswerError
from nestpatch.hub._requests import MOST_REDIRECTS, REDIRECTS, answered, led_to
from nestpatch.hub.client import Reference, Snapshot, shown
from nestpatch.hub.deadline import Deadline
from nestpatch.hub.retry import retried


@dataclass(frozen=True)
class Request:
    """One file to fetch."""

    url: str
    """May contain credentials; messages show `shown(url)`."""
    what: Reference | Snapshot | str
    """What is asked for, for messages."""
    limit: int
    """Bytes, at most."""
    headers: Mapping[str, str]
    known_commit: str = ""
    """Hub only: an answer from this commit need not be read."""


@dataclass(frozen=True)
class Answer:
    """A complete answer."""

    data: bytes | None
    """None: nothing is new, by the server or by `known_commit`."""
    headers: Mapping[str, str]
    """Names in lower case; after a redirect with the commit that the redirect named."""


def fetch(request: Request) -> Answer:
    """Fetches a file. Tries again after transient failures, all within the time that a file of its size has.

    Args:
        request: The file.

    Returns:
        Its content and headers.

    Raises:
        HubNotFoundError: There is no such file.
        HubAccessError: This user may not read it.
        HubUnavailableError: The server cannot be reached, fails, or is too slow.
        HubAnswerError: The answer is too long, is not a file, or leads to another host.
    """
    deadline = Deadline(request.limit)
    return retried(lambda: _attempt(request, deadline), deadline, shown(request.url))


def _attempt(request: Request, deadline: Deadline) -> Answer:
    """Follows redirects as long as they stay on the host: another host could serve anything."""
    url, commit = request.url, ""
    for _ in range(MOST_REDIRECTS):
        answer, status = _ask(request, url, deadline)
        # The Hub names the commit where it redirects; what answers in the end may be a cache.
        commit = commit or answer.headers.get("x-repo-commit", "")
        headers = {**answer.headers, **({"x-repo-commit": commit} if commit else {})}
        known = bool(request.known_commit) and commit == request.known_commit
        if status not in REDIRECTS or known:
            return Answer(None if known else answer.data, headers)
        there, same = led_to(url, headers)
        if not same:
            host = (urlsplit(there).hostname or "")[:100]
            raise HubAnswerError(f"{shown(url)} redirects to another host: {host}")
        url = there
    raise HubAnswerError(f"{shown(request.url)} redirects more than {MOST_REDIRECTS} times")


def _ask(request: Request, url: str, deadline: Deadline) -> tuple[Answer, int]:
    """One answer and its status."""
    reply = answered(url, request.headers, request.what, request.limit, deadline.check)
    if reply.status in REDIRECTS or reply.status == 304:
        return Answer(None, reply.headers), reply.status
    if reply.status != 200:
        raise HubAnswerError(f"{shown(request.url)} answered {reply.status}, which is not a file")
    if len(reply.data) > request.limit:
        raise HubAnswerError(f"{shown(request.url)} is longer than the expected {request.limit} bytes")
    return Answer(reply.data, reply.headers), reply.status
