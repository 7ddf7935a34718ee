"""Parts of files on the Hub, by HTTP range requests.

The Hub redirects requests for large files to a CDN, with a signed address. That address is kept for the next part, which saves
the Hub a request each, and renewed when it expires. Every part is checked: status 206, the requested range, its length, the
size of the whole file, and the commit. The content itself is checked by callers, who know digests.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from nestpatch.errors import HubAnswerError
from nestpatch.hub._plain import Reply
from nestpatch.hub._requests import MOST_REDIRECTS, REDIRECTS, answered, led_to
from nestpatch.hub.client import Snapshot, default_endpoint, request_headers, resolve_url, shown
from nestpatch.hub.deadline import Deadline
from nestpatch.hub.retry import AgainError, retried

_BLOCK = 4 << 20
"""Bytes of one request when a whole file is read."""
_LARGE_BLOCK = 16 << 20
"""The same where each request has a connection of its own."""
_EXPIRED = {400, 401, 403, 404, 410}
"""Statuses with which an expired signed address answers."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _ExpiredError(Exception):
    """The kept address is no longer valid."""


@dataclass
class Meter:
    """Counts what was received. Safe to share between threads."""

    bytes: int = 0
    requests: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, received: int) -> None:
        """Counts one answer.

        Args:
            received: Its bytes.
        """
        with self._lock:
            self.bytes += received
            self.requests += 1


class RemoteFile:
    """One file of a snapshot. Several threads may read it at once.

    Args:
        snapshot: The commit that contains it.
        name: Its path in the repository.
        meter: Counts what is received.
        endpoint: Address of the Hub; None: that of HF_ENDPOINT.
        share: Number of parts that are read at the same time, each of which gets its share of the bandwidth.
        lasting: Whether many parts are read, over a connection that stays open.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        name: str,
        meter: Meter | None = None,
        *,
        endpoint: str | None = None,
        share: int = 1,
        lasting: bool = True,
    ) -> None:
        self.snapshot, self.name, self.meter = snapshot, name, meter or Meter()
        self.size: int | None = None
        """Bytes of the whole file; known after the first part."""
        self._share, self._lasting = share, lasting
        self._endpoint = endpoint or default_endpoint()
        self._url = resolve_url(self._endpoint, snapshot.repo_id, snapshot.commit, name)
        self._headers = request_headers()
        self._signed: str | None = None

    def __str__(self) -> str:
        return f"{self.snapshot}/{self.name}"

    def read(self, start: int, stop: int, deadline: Deadline | None = None) -> bytes:
        """Reads bytes [start, stop), or up to the end when the file is shorter and this is the first part.

        Args:
            start: First byte.
            stop: Byte after the last one.
            deadline: The time for the whole file; None: the time that a file of this part's size has.

        Returns:
            The bytes.

        Raises:
            HubNotFoundError: The commit has no such file.
            HubAccessError: This user may not read it.
            HubUnavailableError: The server cannot be reached, fails, or is too slow.
            HubAnswerError: The answer is not the requested range of the requested commit.
        """
        within = deadline or Deadline(stop - start, self._share)
        return retried(lambda: self._attempt(start, stop, within), within, self)

    def read_all(self, size: int, on_block: Callable[[int], None]) -> bytes | None:
        """Reads the whole file in parts.

        Args:
            size: Expected bytes.
            on_block: Called with the number of bytes received so far.

        Returns:
            The content; None when the file has another size, which is then `self.size`.

        Raises:
            HubError: As for `read`.
        """
        deadline, parts = Deadline(size), []
        block = _BLOCK if self._lasting else _LARGE_BLOCK
        for start in range(0, size, block):
            stop = min(start + block, size)
            parts.append(self.read(start, stop, deadline))
            if self.size != size:
                return None
            on_block(stop)
        return b"".join(parts)

    def _attempt(self, start: int, stop: int, deadline: Deadline) -> bytes:
        address = self._signed
        if address is not None:
            try:
                # Without the token: the address itself is the permission, and its server is not the Hub.
                return self._fetch(address, {}, start, stop, deadline, signed=True)
            except _ExpiredError:
                self._signed = None
            except AgainError:
                self._signed = None  # the Hub may know a better address
                raise
        return self._fetch(self._url, self._headers, start, stop, deadline)

    def _fetch(
        self, url: str, headers: Mapping[str, str], start: int, stop: int, deadline: Deadline, *, signed: bool = False
    ) -> bytes:
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        reply, last = self._followed(url, asked, stop - start, deadline, _EXPIRED if signed else ())
        self.meter.add(len(reply.data))
        if signed and reply.status in _EXPIRED:
            raise _ExpiredError
        wanted = self._checked_stop(reply, last, start, stop) - start
        if len(reply.data) != wanted:
            raise AgainError(f"received {len(reply.data)} bytes, expected {wanted}")
        if not last.startswith(f"{self._endpoint}/"):
            self._signed = last
        return reply.data

    def _followed(
        self, url: str, headers: Mapping[str, str], limit: int, deadline: Deadline, passed: Container[int]
    ) -> tuple[Reply, str]:
        """(answer, address that gave it), after redirects."""
        for _ in range(MOST_REDIRECTS + 1):
            reply = answered(url, headers, self.snapshot, limit, deadline.check, lasting=self._lasting, passed=passed)
            commit = reply.headers.get("x-repo-commit", self.snapshot.commit)
            if commit != self.snapshot.commit:
                raise HubAnswerError(f"asked for {self}, the Hub answered with commit {commit[:12]}")
            if reply.status not in REDIRECTS:
                return reply, url
            url, same = led_to(url, reply.headers)
            if not same:
                # The token is for the Hub alone.
                headers = {name: value for name, value in headers.items() if name != "Authorization"}
        raise HubAnswerError(f"{shown(self._endpoint)} redirects more than {MOST_REDIRECTS} times for {self}")

    def _checked_stop(self, reply: Reply, url: str, start: int, stop: int) -> int:
        """The end of the range that was sent: before `stop` only where the file ends there."""
        said = _CONTENT_RANGE.fullmatch(reply.headers.get("content-range", ""))
        if reply.status != 206 or said is None:
            raise HubAnswerError(f"{urlsplit(url).hostname} does not send parts of {self}: status {reply.status}")
        first, last, size = map(int, said.groups())
        if self.size is None:
            self.size = size
        if size != self.size or (first, last + 1) != (start, min(stop, size)):
            raise HubAnswerError(f"asked for bytes {start}-{stop - 1} of {self}, got {said[0]}")
        return last + 1
