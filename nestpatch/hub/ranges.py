"""Parts of files on the Hub, by HTTP range requests.

Large files lie on a CDN: the Hub sends a client there with a signed address. That address is kept for the next part, which
saves the Hub a request each, and asked for again when it expires. Every part is checked: status 206, the range that was asked
for, its length, the size of the whole, and the commit. What it contains is for the caller to check, who knows digests.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import Any

from nestpatch.errors import HubAnswerError, HubUnavailableError
from nestpatch.hub.client import Snapshot, client, explained, first_line, network_error
from nestpatch.hub.deadline import Deadline, SlowError

WAITS = (0.5, 2.0, 5.0)
"""Seconds before a part is asked for again, after an answer that broke off or a server in trouble."""
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which it is worth asking again."""
EXPIRED = {400, 401, 403, 404, 410}
"""Statuses with which a signed address ends its life."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class _AgainError(Exception):
    """This answer is no good, the next one may be."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _ExpiredError(Exception):
    """The kept address is no good any more."""


class Meter:
    """Counts what was received. Several threads may add to it."""

    def __init__(self) -> None:
        self.bytes = 0
        self.requests = 0
        self._lock = threading.Lock()

    def add(self, received: int) -> None:
        """One answer."""
        with self._lock:
            self.bytes += received
            self.requests += 1


class RemoteFile:
    """One file of a snapshot. Several threads may read it at once.

    `share`: parts that are read at the same time, each of which has only its share of the line.
    """

    def __init__(self, snapshot: Snapshot, name: str, meter: Meter, *, endpoint: str | None = None, share: int = 1) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        self.snapshot, self.name, self.meter = snapshot, name, meter
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
        """Bytes [start, stop), or up to the end when the file is shorter and this is the first part.

        `deadline`: of the whole file; None: this part has the time that a file of its size has.
        Raises HubNotFoundError, HubAccessError, HubUnavailableError, HubAnswerError.
        """
        waits, within = iter(WAITS), deadline or Deadline(stop - start, self._share)
        try:
            while True:
                try:
                    return within.run(lambda: self._read_once(start, stop, within))
                except _AgainError as fault:
                    wait = next(waits, None)
                    if wait is None:
                        raise HubUnavailableError(f"cannot read {self}: {fault}") from fault
                    within.pause(max(wait, fault.after))
        except SlowError as fault:
            raise HubUnavailableError(f"cannot read {self}: {fault}") from fault

    def _read_once(self, start: int, stop: int, deadline: Deadline) -> bytes:
        address = self._signed
        if address is None:
            return self._fetch(self._url, self._headers, start, stop, deadline)
        try:
            # Without the token: the address itself is the permission, and its server is not the Hub.
            return self._fetch(address, {}, start, stop, deadline, signed=True)
        except _ExpiredError:
            self._signed = None
            return self._fetch(self._url, self._headers, start, stop, deadline)
        except _AgainError:
            self._signed = None  # the Hub may know a better place
            raise

    def _fetch(
        self, url: str, headers: Mapping[str, str], start: int, stop: int, deadline: Deadline, *, signed: bool = False
    ) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import get_session

        # Unpacked bytes would have another length than the range.
        asked = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with explained(self.snapshot, self._endpoint):
            try:
                with get_session().stream("GET", url, headers=asked, timeout=wait, follow_redirects=True) as response:
                    return self._received(response, start, stop, deadline, signed=signed)
            except HfHubHTTPError:
                raise
            except network_error() as error:
                raise _AgainError(first_line(error)) from error

    def _received(self, response: Any, start: int, stop: int, deadline: Deadline, *, signed: bool) -> bytes:
        from huggingface_hub.utils import hf_raise_for_status

        status = response.status_code
        if status in PASSING:
            raise _AgainError(f"the server answered {status}", _retry_after(response.headers))
        if signed and status in EXPIRED:
            raise _ExpiredError
        hf_raise_for_status(response)
        self._check_commit(response)
        stop = self._check_range(response, start, stop)
        data = self._body(response, stop - start, deadline)
        if not str(response.url).startswith(f"{self._endpoint}/"):
            self._signed = str(response.url)
        return data

    def _check_commit(self, response: Any) -> None:
        for answer in (*response.history, response):
            commit = answer.headers.get("X-Repo-Commit", self.snapshot.commit)
            if commit != self.snapshot.commit:
                raise HubAnswerError(f"asked for {self}, the Hub answered with commit {commit[:12]}")

    def _check_range(self, response: Any, start: int, stop: int) -> int:
        """The end of the range that was sent: earlier than asked for only where the file ends there."""
        said = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or said is None:
            raise HubAnswerError(f"{response.url.host} sends no parts of {self}: status {response.status_code}")
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
            raise _AgainError(f"{len(data)} bytes came where {length} were announced")
        return bytes(data)


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("Retry-After", "")
    return float(text) if text.isdecimal() else 0.0
