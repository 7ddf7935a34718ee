"""Where channels lie: a repository of the Hub, a folder, a web server. All are read by the same few names.

hub://owner/name (or owner/name), file:///folder (or a path with a slash in front), https://host/folder; http:// only on this
machine itself.

By its `place` a source is remembered, printed, and written into ledgers: no place holds a password, a token or a query.
"""

from __future__ import annotations

import base64
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, quote, unquote, urlsplit

from nestpatch.channels.listing import CHANNEL_FILE, ListedFile
from nestpatch.errors import DataError, HubAnswerError, HubNotFoundError, HubUnavailableError, SwappedFileError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.hub.client import SCHEME, Reference, Snapshot, parse_reference, scrubbed, shown
from nestpatch.hub.deadline import Deadline
from nestpatch.hub.fetch import Asking, fetch
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


class ChannelReader(Protocol):
    """A place that a channel can be read from."""

    @property
    def place(self) -> str:
        """By which it is remembered."""

    @property
    def name(self) -> str | None:
        """What its channel has to be called; None where a place has no name of its own."""

    def channel(self, known: str = "") -> Fetched:
        """The channel file, in one request. Raises HubError and its kinds."""

    def read(self, version: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:
        """A file that the channel of that version names; at most one byte longer than it should be. Raises as `channel`."""


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


@dataclass(frozen=True)
class HubReader:
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
            raise HubAnswerError(f"{shown(self.endpoint)} names no commit for {self.repo_id}: {commit[:80]!r}")
        return Fetched(commit, page.data)

    def read(self, version: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:
        """In parts, from the Hub or from where it sends large files."""
        remote = RemoteFile(Snapshot(self.repo_id, version, ()), file.path, Meter(), endpoint=self.endpoint)
        parts: list[bytes] = []
        deadline = Deadline(file.size)
        for start in range(0, file.size, BLOCK):
            stop = min(start + BLOCK, file.size)
            parts.append(remote.read(start, stop, deadline))
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
class WebReader:
    """A folder on a web server. The Hub's token is never sent there; a login comes from the address or from ~/.netrc."""

    url: str
    login: str = field(default="", repr=False)
    """NAME:PASSWORD, from the address that was typed."""
    query: str = field(default="", repr=False)
    """What followed the question mark there."""

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

    def read(self, version: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - a folder has one version
        """The whole file."""
        data, _ = self._fetch(file.path, file.size + 1, {})
        on_event(Event("download", file.size, file.size, file.name))
        return data or b""

    def _fetch(self, path: str, limit: int, headers: Mapping[str, str]) -> tuple[bytes | None, str]:
        url = f"{self.url}/{quote(path)}"
        asked = f"{url}?{self.query}" if self.query else url
        page = fetch(Asking(asked, url, limit, {**headers, **_authorization(self.login or _netrc(self.url))}))
        return page.data, page.headers.get("etag", "")


def _authorization(login: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}


def _netrc(url: str) -> str:
    """NAME:PASSWORD of a host in ~/.netrc or $NETRC. The session of huggingface_hub does not look there."""
    import netrc

    try:
        # No default entry: the host may be one that a ledger names.
        found = netrc.netrc(os.environ.get("NETRC")).hosts.get(urlsplit(url).hostname or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return ""
    return f"{found[0]}:{found[2]}" if found else ""


@dataclass(frozen=True)
class FolderReader:
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

    def read(self, version: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - a folder has one version
        """The whole file."""
        data = self._read(file.path, file.size + 1)
        on_event(Event("download", file.size, file.size, file.name))
        return data

    def _read(self, path: str, most: int) -> bytes:
        file = self.folder / path
        try:
            _require_inside(file, self.folder)
            return read_regular(file, most)
        except FileNotFoundError as error:
            advice = "Check the path, and that the mirror is complete."
            raise HubNotFoundError(f"there is no {file}", advice=advice) from error
        except OSError as error:
            advice = "Check that the folder is mounted and may be read."
            raise HubUnavailableError(f"cannot read {file}: {error.strerror}", advice=advice) from error


def _require_inside(file: Path, folder: Path) -> None:
    """Raises HubAnswerError for a link that leads out of the folder: who filled it may not choose what else is read."""
    there = Path(os.path.realpath(file))
    if not there.is_relative_to(os.path.realpath(folder)):
        advice = "A mirror has to hold the files themselves: copy it with rsync -rL."
        raise HubAnswerError(f"{file} is a link to {there}, which is not in the folder of the channel", advice=advice)


def read_regular(file: Path, most: int) -> bytes:
    """The first bytes of a regular file. Raises HubAnswerError for anything else, without waiting for it, and OSError."""
    # A pipe without a writer would be waited for, a terminal would take over.
    handle = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            advice = "Do not use this folder: channels are made of files. Tell whoever filled it."
            raise HubAnswerError(f"{file} is {_kind_of(mode)}, where a file should be", advice=advice)
        with open(handle, "rb", closefd=False) as opened:
            return opened.read(most)
    finally:
        os.close(handle)


def _kind_of(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "no regular file"


def split_version(text: str) -> tuple[str, str | None]:
    """PLACE[@VERSION], as somebody typed it."""
    place, mark, version = text.rpartition("@")
    return (place, version) if mark and version_problem(version) is None else (text, None)


def open_reader(text: str) -> ChannelReader:
    """The place that a text names, without a version. Raises DataError for what names none."""
    if any(not char.isprintable() for char in text):
        raise DataError(f"a control character is in the place {scrubbed(text)!r}", advice="Type the address again.")
    scheme = text.partition("://")[0].lower()
    if scheme == "file" or text.startswith(("/", "./", "../")):
        return FolderReader(_folder_of(text))
    if scheme in {"http", "https"}:
        return _web(text)
    reference = parse_reference(text)
    if reference is None or reference.revision is not None:
        raise DataError(
            f"{scrubbed(text)!r} names no channel",
            advice="Give owner/name[@VERSION] of the Hub, https://..., or file:///folder.",
        )
    return HubReader(reference.repo_id)


def _folder_of(text: str) -> Path:
    from urllib.request import url2pathname

    address = urlsplit(text)
    path = url2pathname(address.path) if address.scheme == "file" else text
    # Two slashes, or two backslashes, begin the name of a server where the system has such.
    if (address.scheme == "file" and address.netloc not in {"", "localhost"}) or re.match(r"[/\\]{2}", path):
        raise DataError(f"{text} names a folder of another machine", advice="Write file:///folder, with three slashes.")
    return Path(path).absolute()


def _web(text: str) -> WebReader:
    """A folder of a web server; its place has nothing that may be secret. Raises DataError."""
    if re.search(r"[\s\\]", text):
        raise DataError(f"a space or a backslash is in the address {shown(text)}", advice="Write %20 for a space.")
    try:
        address = urlsplit(text)
        port = address.port
    except ValueError as error:
        raise _odd(text) from error
    if not address.hostname or port == 0:
        raise _odd(text)
    if address.scheme == "http" and address.hostname not in LOOPBACK:
        advice = "Use https://. Plain http:// is for servers on this machine alone."
        raise DataError(f"{shown(text)} is not encrypted", advice=advice)
    place = f"{address.scheme}://{shown(text).partition('://')[2]}".rstrip("/")
    return WebReader(place, _login(address), address.query)


def _odd(text: str) -> DataError:
    # What stands where a port should be may be a password: it is not repeated.
    scheme = text.partition("://")[0]
    advice = "Write https://HOST/FOLDER, or https://HOST:PORT/FOLDER with a port from 1 to 65535."
    return DataError(f"the {scheme}:// address of the channel has no host, or a port that is none", advice=advice)


def _login(address: SplitResult) -> str:
    """NAME:PASSWORD of an address; empty for none."""
    if not address.username and not address.password:
        return ""
    return f"{unquote(address.username or '')}:{unquote(address.password or '')}"
