"""Where channels are read: a repository of the Hub, a folder, or a web server.

Addresses are hub://owner/name (or owner/name), file:///folder (or a path that starts with /, ./ or ../) and https://host/folder;
http:// is for this machine only. A reader's `address` is remembered, printed and written into ledgers, so it never contains a
password, a token or a query.
"""

from __future__ import annotations

import base64
import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol
from urllib.parse import SplitResult, quote, unquote, urlsplit

from nestpatch.channels.listing import CHANNEL_FILE, ListedFile
from nestpatch.errors import DataError, HubAnswerError, HubNotFoundError, HubUnavailableError, SwappedFileError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import open_regular
from nestpatch.hub.client import (
    SCHEME,
    Reference,
    Snapshot,
    default_endpoint,
    looks_local,
    request_headers,
    resolve_url,
    scrubbed,
    shown,
)
from nestpatch.hub.fetch import Request, fetch
from nestpatch.hub.ranges import RemoteFile
from nestpatch.pack import version_problem
from nestpatch.signing.envelopes import MAX_BYTES

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(frozen=True)
class ChannelFile:
    """The channel file at an address, as it is now."""

    revision: str
    """Identifies one state of the address: a commit, an ETag, a digest."""
    data: bytes | None
    """None: nothing is new since the known revision."""


@dataclass(frozen=True)
class HubReader:
    """A model repository. Its main branch is looked up once; everything else is read from that commit."""

    name: str
    """owner/name, which is also the name that its channel must have."""
    endpoint: str = field(default_factory=default_endpoint)

    @property
    def address(self) -> str:
        """hub://owner/name: how it is remembered and shown."""
        return f"{SCHEME}{self.name}"

    def channel(self, known: str = "") -> ChannelFile:
        """Reads the channel file, in one request: the commit and the file come in one answer.

        Args:
            known: The last known revision.

        Returns:
            The revision, and the file if it is new.

        Raises:
            HubError: The file cannot be read.
        """
        url = resolve_url(self.endpoint, self.name, "main", CHANNEL_FILE)
        answer = fetch(Request(url, Reference(self.name), MAX_BYTES, request_headers(), known))
        commit = answer.headers.get("x-repo-commit", "")
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubAnswerError(f"{shown(self.endpoint)} names no commit for {self.name}: {commit[:80]!r}")
        return ChannelFile(commit, answer.data)

    def read(self, revision: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:
        """Reads a file that the channel of a revision lists, in parts, from the Hub or from its CDN.

        Args:
            revision: The revision of the channel.
            file: The file.
            on_event: Receives the progress.

        Returns:
            Its content, unchecked, at most one byte longer than listed.

        Raises:
            HubError: The file cannot be read.
            SwappedFileError: Its size on the Hub is not the listed one.
        """
        remote = RemoteFile(Snapshot(self.name, revision, ()), file.path, endpoint=self.endpoint, lasting=False)
        data = remote.read_all(file.size, lambda done: on_event(Event("download", done, file.size, file.name)))
        if data is None:
            raise SwappedFileError(f"{remote} has {remote.size} bytes; the channel lists {file.size}")
        return data


@dataclass(frozen=True)
class WebReader:
    """A folder on a web server. The Hub's token is never sent there; a login comes from the address or from ~/.netrc."""

    address: str
    login: str = field(default="", repr=False)
    """NAME:PASSWORD of the address that the user typed."""
    query: str = field(default="", repr=False)
    """What followed the question mark there."""
    name = None
    """Its address does not require a name of the channel."""

    def channel(self, known: str = "") -> ChannelFile:
        """Reads the channel file, as HubReader does. Asks with the ETag, where the server had one."""
        data, etag = self._fetch(CHANNEL_FILE, MAX_BYTES, {"If-None-Match": known} if known else {})
        return ChannelFile(etag if data is not None else known, data)

    def read(self, revision: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - there is one state
        """Reads a listed file, as HubReader does."""
        data, _ = self._fetch(file.path, file.size + 1, {})
        on_event(Event("download", file.size, file.size, file.name))
        return data or b""

    def _fetch(self, path: str, limit: int, headers: Mapping[str, str]) -> tuple[bytes | None, str]:
        """(content, ETag); the content is None where nothing is new."""
        url = f"{self.address}/{quote(path)}"
        login = self.login or _netrc_login(self.address)
        if login:
            headers = {**headers, "Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}
        answer = fetch(Request(f"{url}?{self.query}" if self.query else url, url, limit, headers))
        return answer.data, answer.headers.get("etag", "")


def _netrc_login(url: str) -> str:
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
    """A folder on this machine: a mirror for machines without a network, or a network share."""

    folder: Path
    name = None
    """Its address does not require a name of the channel."""

    @property
    def address(self) -> str:
        """file:///folder."""
        return self.folder.as_uri()

    def channel(self, known: str = "") -> ChannelFile:
        """Reads the channel file, as HubReader does. It is read each time, and compared by its digest."""
        data = self._read(CHANNEL_FILE, MAX_BYTES + 1)
        revision = sha256(data).hexdigest()
        return ChannelFile(revision, None if revision == known else data)

    def read(self, revision: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:  # noqa: ARG002 - there is one state
        """Reads a listed file, as HubReader does."""
        data = self._read(file.path, file.size + 1)
        on_event(Event("download", file.size, file.size, file.name))
        return data

    def _read(self, path: str, most: int) -> bytes:
        file = self.folder / path
        try:
            # Whoever filled the folder must not choose what else is read.
            there = Path(os.path.realpath(file))
            if not there.is_relative_to(os.path.realpath(self.folder)):
                advice = "A mirror has to contain the files themselves: copy it with rsync -rL."
                raise HubAnswerError(f"{file} is a link to {there}, which is outside of the channel's folder", advice=advice)
            return read_start(file, most)
        except FileNotFoundError as error:
            advice = "Check the path, and that the mirror is complete."
            raise HubNotFoundError(f"there is no {file}", advice=advice) from error
        except OSError as error:
            advice = "Check that the folder is mounted and readable."
            raise HubUnavailableError(f"cannot read {file}: {error.strerror}", advice=advice) from error


class ChannelReader(Protocol):
    """An address from which a channel can be read."""

    @property
    def name(self) -> str | None:
        """The name that its channel must have; None: its address does not require one."""

    @property
    def address(self) -> str:
        """How it is remembered and shown."""

    def channel(self, known: str = "") -> ChannelFile:
        """Reads the channel file; `known` is the last known revision."""

    def read(self, revision: str, file: ListedFile, on_event: OnEvent = ignore) -> bytes:
        """Reads a file that the channel of a revision lists; its content is unchecked."""


def read_start(file: Path, most: int) -> bytes:
    """Reads the first bytes of a file, without waiting for a pipe or a device.

    Args:
        file: Its path.
        most: Bytes to read at most.

    Returns:
        The bytes.

    Raises:
        HubAnswerError: It is not a regular file.
        OSError: It is missing or cannot be read.
    """
    try:
        with open_regular(file) as opened:
            return opened.read(most)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EISDIR}:
            raise
        advice = "Do not use this folder: channels consist of files. Tell whoever maintains it."
        raise HubAnswerError(f"{file}: {error.strerror}", advice=advice) from error


def split_version(text: str) -> tuple[str, str | None]:
    """Splits ADDRESS[@VERSION].

    Args:
        text: What the user wrote.

    Returns:
        The address, and the version or None.
    """
    address, mark, version = text.rpartition("@")
    return (address, version) if mark and version_problem(version) is None else (text, None)


def open_reader(text: str) -> ChannelReader:
    """The reader for an address.

    Args:
        text: An address without a version, as the user wrote it.

    Returns:
        A reader; nothing has been read yet.

    Raises:
        DataError: The text is not the address of a channel, or looks like a path.
    """
    if any(not char.isprintable() for char in text):
        raise DataError(f"the address {scrubbed(text)!r} contains a control character", advice="Type the address again.")
    scheme = text.partition("://")[0].lower()
    if scheme == "file" or text.startswith(("/", "./", "../")):
        return FolderReader(_folder_of(text))
    if scheme in {"http", "https"}:
        return _web_reader(text)
    reference = Reference.parse(text)
    if reference is None or reference.revision is not None:
        raise DataError(
            f"{scrubbed(text)!r} is not the address of a channel",
            advice="Give owner/name[@VERSION] of the Hub, https://host/folder, or file:///folder.",
        )
    if looks_local(text):
        raise DataError(
            f"{text!r} looks like a path, and could also be a repository of the Hub",
            advice=f"Write ./{text} for the folder, or {SCHEME}{text} for the repository.",
        )
    return HubReader(reference.repo_id)


def _folder_of(text: str) -> Path:
    from urllib.request import url2pathname

    address = urlsplit(text)
    path = url2pathname(address.path) if address.scheme == "file" else text
    # Two slashes, or two backslashes, begin the name of a server where the system has such names.
    if (address.scheme == "file" and address.netloc not in {"", "localhost"}) or re.match(r"[/\\]{2}", path):
        raise DataError(f"{text} names a folder of another machine", advice="Write file:///folder, with three slashes.")
    return Path(path).absolute()


def _web_reader(text: str) -> WebReader:
    if re.search(r"[\s\\]", text):
        raise DataError(f"the address {shown(text)} contains a space or a backslash", advice="Write %20 for a space.")
    try:
        address: SplitResult | None = urlsplit(text)
        port = address.port if address else None
    except ValueError:
        address, port = None, None
    if address is None or not address.hostname or port == 0:
        # What stands where a port should be may be a password: it is not repeated.
        raise DataError(
            f"the {text.partition('://')[0]}:// address of the channel has no host, or an invalid port",
            advice="Write https://HOST/FOLDER, or https://HOST:PORT/FOLDER with a port from 1 to 65535.",
        )
    if address.scheme == "http" and address.hostname not in _LOOPBACK:
        advice = "Use https://. Plain http:// is for servers on this machine only."
        raise DataError(f"{shown(text)} is not encrypted", advice=advice)
    login = f"{unquote(address.username or '')}:{unquote(address.password or '')}"
    public = f"{address.scheme}://{shown(text).partition('://')[2]}".rstrip("/")
    return WebReader(public, "" if login == ":" else login, address.query)
