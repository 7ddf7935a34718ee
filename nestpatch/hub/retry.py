"""One retry loop for every server: transient failures, a growing wait, and what the server asks for with Retry-After."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timezone
from typing import TypeVar

from nestpatch.errors import HubUnavailableError, NestpatchError
from nestpatch.hub.deadline import Deadline, SlowError

WAITS = (0.5, 2.0, 5.0)
"""Seconds before the next attempt, after an answer that broke off or a server in trouble."""
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which another attempt is worthwhile."""

T = TypeVar("T")


class AgainError(Exception):
    """This attempt failed; another one may succeed. `after`: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


def retried(
    work: Callable[[], T],
    deadline: Deadline,
    what: object,
    *,
    waits: Sequence[float] | None = None,
    error: type[NestpatchError] = HubUnavailableError,
) -> T:
    """Runs work until it succeeds, at most once more than there are waits.

    Args:
        work: Raises AgainError where another attempt is worthwhile.
        deadline: The time for all attempts together.
        what: What is read, for messages.
        waits: Seconds before the second attempt, the third, and so on; None: WAITS.
        error: What is raised in the end.

    Returns:
        The result of the work.

    Raises:
        NestpatchError: All attempts failed, or the time is over; of the class `error`.
    """
    left = iter(WAITS if waits is None else waits)
    try:
        while True:
            try:
                return deadline.run(work)
            except AgainError as fault:
                wait = next(left, None)
                if wait is None:
                    raise error(f"cannot read {what}: {fault}") from fault
                deadline.pause(max(wait, fault.after))
    except SlowError as fault:
        raise error(f"cannot read {what}: {fault}") from fault


def retry_after(headers: Mapping[str, str]) -> float:
    """How long a server asks to wait (RFC 9110, section 10.2.3).

    Args:
        headers: Of its answer.

    Returns:
        Seconds; 0 without a Retry-After header, or with one that is neither a number nor a date.
    """
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.replace(".", "", 1).isdecimal():
        return float(value)
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(value)
    except (TypeError, ValueError, OverflowError):  # a year of 20 digits overflows
        return 0.0
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, moment.timestamp() - time.time())
