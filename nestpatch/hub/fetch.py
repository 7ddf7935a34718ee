"""Small files over HTTP, in one request each: whole, in time, from the very host that was asked, or not at all.

Uses the session of huggingface_hub, for its proxies, its certificates and HF_HUB_OFFLINE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from nestpatch.errors import HubAnswerError, HubUnavailableError
from nestpatch.hub import ranges
from nestpatch.hub.client import Reference, Snapshot, explained, first_line, network_error, shown
from nestpatch.hub.deadline import Deadline, SlowError

MOVED = {301, 302, 303, 307, 308}
MOST_MOVES = 4


@dataclass(frozen=True)
class Page:
    """An answer."""

    data: bytes | None
    """None: the server says that nothing is new."""
    headers: Mapping[str, str]
    """Names in lower case; of an answer after a redirect, with the commit that the redirect named."""


class _AgainError(Exception):
    """This answer is no good, the next one may be."""


@dataclass(frozen=True)
class Asking:
    """One file that is asked for, perhaps several times."""

    url: str
    """May hold credentials: `shown` has none."""
    what: Reference | Snapshot | str
    """For messages."""
    limit: int
    """Bytes, at most."""
    headers: Mapping[str, str]
    known_commit: str = ""
    """Of the Hub: an answer from this commit need not be read."""

    @property
    def shown(self) -> str:
        """The address for messages."""
        return shown(self.url)


def fetch(asking: Asking) -> Page:
    """Fetches a file. Asks again after servers in trouble and broken answers, all in the time that a file of its size has.

    Raises HubNotFoundError, HubAccessError, HubUnavailableError, HubAnswerError.
    """
    waits, deadline = iter(ranges.WAITS), Deadline(asking.limit)
    try:
        while True:
            try:
                return deadline.run(lambda: _follow(asking, deadline))
            except _AgainError as fault:
                wait = next(waits, None)
                if wait is None:
                    raise HubUnavailableError(f"cannot read {asking.shown}: {fault}") from fault
                deadline.pause(wait)
    except SlowError as fault:
        raise HubUnavailableError(f"cannot read {asking.shown}: {fault}") from fault


def _follow(asking: Asking, deadline: Deadline) -> Page:
    """Follows redirects, as long as they stay on the host: another one could hold whatever it likes."""
    url = asking.url
    commit: dict[str, str] = {}
    for _ in range(MOST_MOVES):
        page, status = _ask(asking, url, deadline)
        # The Hub names the commit where it redirects; what answers in the end may be a cache.
        commit = commit or {name: value for name, value in page.headers.items() if name == "x-repo-commit"}
        headers = {**page.headers, **commit}
        if status not in MOVED or _is_known(headers, asking):
            return Page(None if _is_known(headers, asking) else page.data, headers)
        url = _next(url, headers.get("location", ""))
    raise HubAnswerError(f"{asking.shown} leads from one address to the next")


def _is_known(headers: Mapping[str, str], asking: Asking) -> bool:
    return bool(asking.known_commit) and headers.get("x-repo-commit") == asking.known_commit


def _next(url: str, location: str) -> str:
    there = urljoin(url, location)
    if urlsplit(there)[:2] != urlsplit(url)[:2]:
        raise HubAnswerError(f"{shown(url)} sends its readers to another host: {(urlsplit(there).hostname or '')[:100]}")
    return there


def _ask(asking: Asking, url: str, deadline: Deadline) -> tuple[Page, int]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    # Unpacked bytes would have another length than the server says.
    headers, wait = {**asking.headers, "Accept-Encoding": "identity"}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with explained(asking.what, urlsplit(shown(url)).netloc):
        try:
            with get_session().stream("GET", url, headers=headers, timeout=wait, follow_redirects=False) as response:
                return _received(response, asking, deadline)
        except HfHubHTTPError:
            raise
        except network_error() as error:
            raise _AgainError(first_line(error)) from error


def _received(response: Any, asking: Asking, deadline: Deadline) -> tuple[Page, int]:
    from huggingface_hub.utils import hf_raise_for_status

    status, headers = response.status_code, {name.lower(): value for name, value in response.headers.items()}
    if status in ranges.PASSING:
        raise _AgainError(f"the server answered {status}")
    if status in MOVED or status == 304:
        return Page(None, headers), status
    hf_raise_for_status(response)
    if status != 200:
        raise HubAnswerError(f"{asking.shown} answered {status}, which is no file")
    data = bytearray()
    for block in response.iter_raw():
        data += block
        deadline.check()
        if len(data) > asking.limit:
            raise HubAnswerError(f"{asking.shown} is longer than the {asking.limit} bytes that were expected")
    return Page(bytes(data), headers), status
