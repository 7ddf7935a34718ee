"""Where channels lie: a repository of the Hub, a folder, a web server. All are read by the same few names.

hub://owner/name (or owner/name), file:///folder (or a path with a slash in front), https://host/folder; http:// only on this
machine itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit

from nestpatch.errors import DataError, HubAnswerError, HubNotFoundError, HubUnavailableError, SwappedFileError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.hub.client import SCHEME, Reference, Snapshot, parse_reference
from nestpatch.hub.fetch import Asking, fetch
from nestpatch.hub.listing import CHANNEL_FILE, File
from nestpatch.hub.ranges import Meter, RemoteFile
from nestpatch.pack import version_problem
from nestpatch.signing.dsse import MAX_BYTES

BLOCK = 4 << 20
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class Fetched:
    """A channel file as it lies there now."""

    version: str
    """Tells one state of the place from another: a commit, an ETag, a digest."""
    data: bytes | None
    """None: nothing is new since the version that was known."""


class Source(Protocol):
    """A place that a channel can be read from."""

    @property
    def place(self) -> str:
        """By which it is remembered."""

    @property
    def name(self) -> str | None:
        """What its channel has to be called; None where a place has no name of its own."""

    def channel(self, known: str = "") -> Fetched:
        """The channel file, in one request. Raises HubError and its kinds."""

    def read(self, version: str, file: File, on_event: OnEvent = ignore) -> bytes:
        """A file that the channel of that version names; at most one byte longer than it should be. Raises as `channel`."""


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@dataclass(frozen=True)
class HubSource:
    """A model repository. Its main branch is asked for once; everything else is read from that very commit."""

    repo_id: str
    endpoint: str = field(default_factory=_endpoint)

    @property
    def place(self) -> str:
        return f"{SCHEME}{self.repo_id}"

    @property
    def name(self) -> str | None:
        return self.repo_id

    def channel(self, known: str = "") -> Fetched:
        """The commit and the file come in one answer."""
        url = f"{self.endpoint}/{quote(self.repo_id)}/resolve/main/{CHANNEL_FILE}"
        page = fetch(Asking(url, Reference(self.repo_id), MAX_BYTES, _greeting(), known))
        commit = page.headers.get("x-repo-commit", "")
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubAnswerError(f"{self.endpoint} names no commit for {self.repo_id}: {commit[:80]!r}")
        return Fetched(commit, page.data)

    def read(self, version: str, file: File, on_event: OnEvent = ignore) -> bytes:
        """In parts, from the Hub or from where it sends large files."""
        remote = RemoteFile(Snapshot(self.repo_id, version, ()), file.path, Meter(), endpoint=self.endpoint)
        parts: list[bytes] = []
        for start in range(0, file.size, BLOCK):
            stop = min(start + BLOCK, file.size)
            parts.append(remote.read(start, stop))
            if remote.size != file.size:
                raise SwappedFileError(f"{remote} has {remote.size} bytes; the channel names one of {file.size}")
            on_event(Event("download", stop, file.size, file.name))
        return b"".join(parts)


def _greeting() -> dict[str, str]:
    """The user's token, and who asks. What huggingface_hub sends can cost a request of its own, to know its callers."""
    from huggingface_hub import get_token

    from nestpatch import __version__

    token = get_token()
    return {"User-Agent": f"nestpatch/{__version__}"} | ({"Authorization": f"Bearer {token}"} if token else {})


@dataclass(frozen=True)
class WebSource:
    """A folder on a web server. Nobody's token is sent there."""

    url: str

    @property
    def place(self) -> str:
        return self.url

    @property
    def name(self) -> str | None:
        return None

    def channel(self, known: str = "") -> Fetched:
        """Asks with the ETag, where the server had one."""
        page = self._fetch(CHANNEL_FILE, MAX_BYTES, {"If-None-Match": known} if known else {})
        return Fetched(page[1] if page[0] is not None else known, page[0])

    def read(self, version: str, file: File, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - a folder has one version
        """The whole file."""
        data, _ = self._fetch(file.path, file.size + 1, {})
        on_event(Event("download", file.size, file.size, file.name))
        return data or b""

    def _fetch(self, path: str, limit: int, headers: Mapping[str, str]) -> tuple[bytes | None, str]:
        url = f"{self.url}/{quote(path)}"
        page = fetch(Asking(url, url, limit, headers))
        return page.data, page.headers.get("etag", "")


@dataclass(frozen=True)
class FolderSource:
    """A folder on this machine: a mirror for machines without a network, or a share."""

    folder: Path

    @property
    def place(self) -> str:
        return self.folder.as_uri()

    @property
    def name(self) -> str | None:
        return None

    def channel(self, known: str = "") -> Fetched:
        """Read each time."""
        data = self._read(CHANNEL_FILE, MAX_BYTES + 1)
        version = sha256(data).hexdigest()
        return Fetched(version, None if version == known else data)

    def read(self, version: str, file: File, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - a folder has one version
        """The whole file."""
        data = self._read(file.path, file.size + 1)
        on_event(Event("download", file.size, file.size, file.name))
        return data

    def _read(self, path: str, most: int) -> bytes:
        file = self.folder / path
        try:
            with open(file, "rb") as opened:
                return opened.read(most)
        except FileNotFoundError as error:
            advice = "Check the path, and that the mirror is complete."
            raise HubNotFoundError(f"there is no {file}", advice=advice) from error
        except OSError as error:
            advice = "Check that the folder is mounted and may be read."
            raise HubUnavailableError(f"cannot read {file}: {error.strerror}", advice=advice) from error


def split_version(text: str) -> tuple[str, str | None]:
    """PLACE[@VERSION], as somebody typed it."""
    place, mark, version = text.rpartition("@")
    return (place, version) if mark and version_problem(version) is None else (text, None)


def open_source(text: str) -> Source:
    """The place that a text names, without a version. Raises DataError for what names none."""
    address = urlsplit(text)
    if address.scheme == "file" or text.startswith(("/", "./", "../")):
        from urllib.request import url2pathname

        path = url2pathname(address.path) if address.scheme == "file" else text
        if address.scheme == "file" and address.netloc not in {"", "localhost"}:
            raise DataError(f"{text} names a folder of another machine", advice="Write file:///folder, with three slashes.")
        return FolderSource(Path(path).absolute())
    if address.scheme == "https" or (address.scheme == "http" and address.hostname in LOOPBACK):
        return WebSource(text.rstrip("/"))
    if address.scheme == "http":
        raise DataError(f"{text} is not encrypted", advice="Use https://. Plain http:// is for servers on this machine alone.")
    reference = parse_reference(text)
    if reference is None or reference.revision is not None:
        raise DataError(
            f"{text!r} names no channel", advice="Give owner/name[@VERSION] of the Hub, https://..., or file:///folder."
        )
    return HubSource(reference.repo_id)
