"""GET requests with one retry loop, and small files: complete, in time, from the host that was asked, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from nestpatch.errors import HubAnswerError, HubUnavailableError
from nestpatch.hub._deadline import Deadline, SlowError
from nestpatch.hub.client import Reference, Snapshot, explained, first_line, network_error, shown

_REDIRECTS = {301, 302, 303, 307, 308}
_MOST_REDIRECTS = 4


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
    for _ in range(_MOST_REDIRECTS):
        answer, status = _ask(request, url, deadline)
        # The Hub names the commit where it redirects; what answers in the end may be a cache.
        commit = commit or answer.headers.get("x-repo-commit", "")
        headers = {**answer.headers, **({"x-repo-commit": commit} if commit else {})}
        known = bool(request.known_commit) and commit == request.known_commit
        if status not in _REDIRECTS or known:
            return Answer(None if known else answer.data, headers)
        there = urljoin(url, headers.get("location", ""))
        if urlsplit(there)[:2] != urlsplit(url)[:2]:
            host = (urlsplit(there).hostname or "")[:100]
            raise HubAnswerError(f"{shown(url)} redirects to another host: {host}")
        url = there
    raise HubAnswerError(f"{shown(request.url)} redirects more than {_MOST_REDIRECTS} times")


def _ask(request: Request, url: str, deadline: Deadline) -> tuple[Answer, int]:
    """One answer and its status."""
    from huggingface_hub.utils import hf_raise_for_status

    host = urlsplit(shown(url)).netloc
    with streamed(url, request.headers, request.what, host, follow_redirects=False) as response:
        status, headers = response.status_code, {name.lower(): value for name, value in response.headers.items()}
        if status in _REDIRECTS or status == 304:
            return Answer(None, headers), status
        hf_raise_for_status(response)
        if status != 200:
            raise HubAnswerError(f"{shown(request.url)} answered {status}, which is not a file")
        data = bytearray()
        for block in response.iter_raw():
            data += block
            deadline.check()
            if len(data) > request.limit:
                raise HubAnswerError(f"{shown(request.url)} is longer than the expected {request.limit} bytes")
        return Answer(bytes(data), headers), status


WAITS = (0.5, 2.0, 5.0)
"""Seconds before the next attempt, after an answer that broke off or a server in trouble."""
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which another attempt is worthwhile."""

T = TypeVar("T")


class AgainError(Exception):
    """This attempt failed; another one may succeed. `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def retried(work: Callable[[], T], deadline: Deadline, what: object) -> T:
    """Runs work until it succeeds, at most once more than WAITS has entries.

    Args:
        work: Raises AgainError where another attempt is worthwhile.
        deadline: The time for all attempts together.
        what: What is read, for messages.

    Returns:
        The result of the work.

    Raises:
        HubUnavailableError: All attempts failed, or the time is over.
    """
    waits = iter(WAITS)
    try:
        while True:
            try:
                return deadline.run(work)
            except AgainError as fault:
                wait = next(waits, None)
                if wait is None:
                    raise HubUnavailableError(f"cannot read {what}: {fault}") from fault
                deadline.pause(max(wait, fault.after))
    except SlowError as fault:
        raise HubUnavailableError(f"cannot read {what}: {fault}") from fault


@contextmanager
def streamed(
    url: str, headers: Mapping[str, str], what: Reference | Snapshot | str, endpoint: str, *, follow_redirects: bool
) -> Iterator[Any]:
    """One GET request, whose body is read inside the block.

    Args:
        url: The full address; may contain credentials.
        headers: Headers to send.
        what: What is asked for, for messages.
        endpoint: The server, for messages.
        follow_redirects: Whether the HTTP library follows redirects.

    Yields:
        The response of httpx.

    Raises:
        AgainError: The connection broke, or the status is transient.
        HubError: huggingface_hub raised an error, here or inside the block.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    # Compressed bytes would have another length than the server says.
    asked, wait = {**headers, "Accept-Encoding": "identity"}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with explained(what, endpoint):
        try:
            with get_session().stream("GET", url, headers=asked, timeout=wait, follow_redirects=follow_redirects) as response:
                if response.status_code in _TRANSIENT:
                    after = response.headers.get("Retry-After", "")
                    seconds = float(after) if after.isdecimal() else 0.0
                    raise AgainError(f"the server answered {response.status_code}", seconds)
                yield response
        except HfHubHTTPError:
            raise
        except network_error() as error:
            raise AgainError(first_line(error)) from error
