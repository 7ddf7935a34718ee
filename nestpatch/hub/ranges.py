"""Parts of files on the Hub, by HTTP range requests.

The Hub redirects requests for large files to a CDN, with a signed address. That address is kept for the next part, which saves
the Hub a request each, and renewed when it expires. Every part is checked: status 206, the requested range, its length, the
size of the whole file, and the commit. The content itself is checked by callers, who know digests.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nestpatch.errors import HubAnswerError
from nestpatch.hub._requests import streamed
from nestpatch.hub.client import Snapshot, client
from nestpatch.hub.deadline import Deadline
from nestpatch.hub.retry import AgainError, retried

_BLOCK = 4 << 20
"""Bytes of one request when a whole file is read."""
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
    """

    def __init__(
        self, snapshot: Snapshot, name: str, meter: Meter | None = None, *, endpoint: str | None = None, share: int = 1
    ) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.snapshot, self.name, self.meter = snapshot, name, meter or Meter()
        self.size: int | None = None
        """Bytes of the whole file; known after the first part."""
        self._share = share
        self._endpoint = client(endpoint).endpoint
        self._url = hf_hub_url(snapshot.repo_id, name, revision=snapshot.commit, endpoint=self._endpoint)
        self._headers = build_hf_headers()
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
        for start in range(0, size, _BLOCK):
            stop = min(start + _BLOCK, size)
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
        from huggingface_hub.utils import hf_raise_for_status

        asked = {**headers, "Range": f"bytes={start}-{stop - 1}"}
        with streamed(url, asked, self.snapshot, self._endpoint, follow_redirects=True) as response:
            if signed and response.status_code in _EXPIRED:
                raise _ExpiredError
            hf_raise_for_status(response)
            for answer in (*response.history, response):
                commit = answer.headers.get("X-Repo-Commit", self.snapshot.commit)
                if commit != self.snapshot.commit:
                    raise HubAnswerError(f"asked for {self}, the Hub answered with commit {commit[:12]}")
            stop = self._checked_stop(response, start, stop)
            data = self._body(response, stop - start, deadline)
            if not str(response.url).startswith(f"{self._endpoint}/"):
                self._signed = str(response.url)
            return data

    def _checked_stop(self, response: Any, start: int, stop: int) -> int:
        """The end of the range that was sent: before `stop` only where the file ends there."""
        said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or said is None:
            raise HubAnswerError(f"{response.url.host} does not send parts of {self}: status {response.status_code}")
        first, last, size = map(int, said.groups())
        if self.size is None:
            self.size = size
        if size != self.size or (first, last + 1) != (start, min(stop, size)):
            raise HubAnswerError(f"asked for bytes {start}-{stop - 1} of {self}, got {said[0]}")
        return last + 1

    def _body(self, response: Any, length: int, deadline: Deadline) -> bytes:
        data = bytearray()
        try:
            for block in response.iter_raw():
                data += block
                deadline.check()
                if len(data) > length:
                    break
        finally:
            self.meter.add(len(data))
        if len(data) != length:
            raise AgainError(f"received {len(data)} bytes, expected {length}")
        return bytes(data)
