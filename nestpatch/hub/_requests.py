"""GET requests with one retry loop: what fetch.py and ranges.py share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from nestpatch.errors import HubUnavailableError
from nestpatch.hub._deadline import Deadline, SlowError
from nestpatch.hub.client import Reference, Snapshot, explained, first_line, network_error

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
