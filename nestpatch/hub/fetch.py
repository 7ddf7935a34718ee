"""Small files over HTTP, in one request each: whole, from the very host that was asked, or not at all.

Uses the session of huggingface_hub, for its proxies, its certificates and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from nestpatch.errors import HubAnswerError, HubUnavailableError
from nestpatch.hub import ranges
from nestpatch.hub.client import Reference, Snapshot, explained, network_error

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
    what: Reference | Snapshot | str
    """For messages."""
    limit: int
    """Bytes, at most."""
    headers: Mapping[str, str]
    known_commit: str = ""
    """Of the Hub: an answer from this commit need not be read."""


def fetch(asking: Asking) -> Page:
    """Fetches a file. Asks again after servers in trouble and broken answers.

    Raises HubNotFoundError, HubAccessError, HubUnavailableError, HubAnswerError.
    """
    waits = iter(ranges.WAITS)
    while True:
        try:
            return _follow(asking)
        except _AgainError as fault:
            wait = next(waits, None)
            if wait is None:
                raise HubUnavailableError(f"cannot read {asking.url}: {fault}") from fault
            time.sleep(wait)


def _follow(asking: Asking) -> Page:
    """Follows redirects, as long as they stay on the host: another one could hold whatever it likes."""
    url = asking.url
    commit: dict[str, str] = {}
    for _ in range(MOST_MOVES):
        page, status = _ask(asking, url)
        # The Hub names the commit where it redirects; what answers in the end may be a cache.
        commit = commit or {name: value for name, value in page.headers.items() if name == "x-repo-commit"}
        headers = {**page.headers, **commit}
        if status not in MOVED or _is_known(headers, asking):
            return Page(None if _is_known(headers, asking) else page.data, headers)
        url = _next(url, headers.get("location", ""))
    raise HubAnswerError(f"{asking.url} leads from one address to the next")


def _is_known(headers: Mapping[str, str], asking: Asking) -> bool:
    return bool(asking.known_commit) and headers.get("x-repo-commit") == asking.known_commit


def _next(url: str, location: str) -> str:
    there = urljoin(url, location)
    if urlsplit(there)[:2] != urlsplit(url)[:2]:
        raise HubAnswerError(f"{url} sends its readers to another host: {urlsplit(there).netloc[:100]}")
    return there


def _ask(asking: Asking, url: str) -> tuple[Page, int]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import get_session

    # Unpacked bytes would have another length than the server says.
    headers, wait = {**asking.headers, "Accept-Encoding": "identity"}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with explained(asking.what, urlsplit(url).netloc):
        try:
            with get_session().stream("GET", url, headers=headers, timeout=wait, follow_redirects=False) as response:
                return _received(response, asking)
        except HfHubHTTPError:
            raise
        except network_error() as error:
            raise _AgainError(str(error) or type(error).__name__) from error


def _received(response: Any, asking: Asking) -> tuple[Page, int]:
    from huggingface_hub.utils import hf_raise_for_status

    status, headers = response.status_code, {name.lower(): value for name, value in response.headers.items()}
    if status in ranges.PASSING:
        raise _AgainError(f"the server answered {status}")
    if status in MOVED or status == 304:
        return Page(None, headers), status
    hf_raise_for_status(response)
    if status != 200:
        raise HubAnswerError(f"{asking.url} answered {status}, which is no file")
    data = bytearray()
    for block in response.iter_raw():
        data += block
        if len(data) > asking.limit:
            raise HubAnswerError(f"{asking.url} is longer than the {asking.limit} bytes that were expected")
    return Page(bytes(data), headers), status
