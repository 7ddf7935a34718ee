"""One GET request, by whichever HTTP library suits: what fetch.py and ranges.py share."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from urllib.parse import urljoin, urlsplit

from nestpatch.errors import HubAnswerError
from nestpatch.hub._plain import Reply, collected, get, suits, wanted
from nestpatch.hub.client import Reference, Snapshot, explained, first_line, http_library, network_error, shown
from nestpatch.hub.retry import TRANSIENT, AgainError, retry_after

REDIRECTS = {301, 302, 303, 307, 308}
MOST_REDIRECTS = 4


def answered(
    url: str,
    headers: Mapping[str, str],
    what: Reference | Snapshot | str,
    limit: int,
    check: Callable[[], None],
    *,
    lasting: bool = False,
    passed: Container[int] = (),
) -> Reply:
    """One GET request: by the standard library where that can make it, else by the HTTP library of huggingface_hub.

    Args:
        url: The full address; may contain credentials.
        headers: Headers to send.
        what: What is asked for, for messages.
        limit: Bytes of the body that are wanted at most; what is longer is cut soon after.
        check: Called between reads; raises where the time is over.
        lasting: Whether more requests to this host follow, so that a connection which stays open is worth its library.
        passed: Statuses of 400 or more that are returned.

    Returns:
        The answer, whose status is below 400 or one of `passed`. Redirects are not followed.

    Raises:
        AgainError: The connection broke, or the status is transient.
        HubError: Another status of 400 or more.
    """
    from huggingface_hub import constants

    reply = None
    if not lasting and suits(url, headers):
        reply = get(url, headers, limit, constants.HF_HUB_DOWNLOAD_TIMEOUT, check)
    if reply is None:
        reply = _by_library(url, headers, what, limit, check)
    if reply.status in TRANSIENT:
        pause = retry_after({"Retry-After": reply.headers.get("retry-after", "")})
        raise AgainError(f"the server answered {reply.status}", pause)
    if reply.status >= 400 and reply.status not in passed:
        _raise_for(reply, url, what)
    return reply


def _by_library(
    url: str, headers: Mapping[str, str], what: Reference | Snapshot | str, limit: int, check: Callable[[], None]
) -> Reply:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    # Compressed bytes would have another length than the server says.
    asked, wait = {**headers, "Accept-Encoding": "identity"}, constants.HF_HUB_DOWNLOAD_TIMEOUT
    with explained(what, _server(url)):
        try:
            with get_session().stream("GET", url, headers=asked, timeout=wait, follow_redirects=False) as response:
                data = collected(response.iter_raw(), wanted(response.status_code, limit), check)
                return Reply(response.status_code, {name.lower(): value for name, value in response.headers.items()}, data)
        except network_error() as error:
            raise AgainError(first_line(error)) from error


def led_to(url: str, headers: Mapping[str, str]) -> tuple[str, bool]:
    """Where an answer with a status of REDIRECTS leads.

    Args:
        url: The address that gave it.
        headers: Of the answer, names in lower case.

    Returns:
        (full address, whether it is on the same server).
    """
    there = urljoin(url, headers.get("location", ""))
    return there, urlsplit(there)[:2] == urlsplit(url)[:2]


def _server(url: str) -> str:
    """The server of an address, for messages."""
    parts = urlsplit(shown(url))
    return f"{parts.scheme}://{parts.netloc}"


def _raise_for(reply: Reply, url: str, what: Reference | Snapshot | str) -> None:
    """Raises the HubError that huggingface_hub sees in an answer with a status of 400 or more."""
    from huggingface_hub.utils import hf_raise_for_status

    library = http_library()
    # The body is here as a whole, whatever these said about the way it came.
    kept = {
        name: value
        for name, value in reply.headers.items()
        if name not in {"content-encoding", "content-length", "transfer-encoding"}
    }
    with explained(what, _server(url)):
        request = library.Request("GET", url)
        hf_raise_for_status(library.Response(reply.status, headers=kept, content=reply.data, request=request))
    raise HubAnswerError(f"{shown(url)} answered {reply.status}")
