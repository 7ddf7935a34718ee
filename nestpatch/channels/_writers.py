"""Where channels are written: a repository of the Hub, or a folder. A change appears whole, on top of what it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeAlias

from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import FolderReader, HubReader, open_reader, read_start
from nestpatch.errors import DataError, HubError, HubNotFoundError, PublishError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.hub.client import Reference, client, explained, look_up
from nestpatch.hub.ranges import RemoteFile
from nestpatch.signing.envelopes import MAX_BYTES

CARD = "README.md"
STALE = {409, 412}
"""Statuses with which the Hub says that another commit was faster."""


class StaleError(Exception):
    """The address has changed since its head was read."""


@dataclass(frozen=True)
class Head:
    """What an address contains before a change."""

    revision: str
    channel: bytes | None
    """None: no channel yet."""
    card: bytes | None


@dataclass(frozen=True)
class HubWriter:
    """A model repository."""

    reader: HubReader
    """How it is read."""

    def create(self, *, private: bool) -> None:
        """Creates the repository, if there is none."""
        repo_id, endpoint = self.reader.name, self.reader.endpoint
        try:
            look_up(repo_id, endpoint=endpoint)
        except HubNotFoundError:
            with explained(Reference(repo_id), endpoint):
                client(endpoint).create_repo(repo_id, private=private, exist_ok=True)

    def head(self) -> Head:
        """The commit that main names now, and the files of that commit."""
        endpoint = self.reader.endpoint
        snapshot = look_up(self.reader.name, endpoint=endpoint)
        channel, card = (
            RemoteFile(snapshot, name, endpoint=endpoint).read(0, MAX_BYTES) if name in snapshot.files else None
            for name in (CHANNEL_FILE, CARD)
        )
        return Head(snapshot.commit, channel, card)

    def write(self, head: Head, files: Mapping[str, bytes], message: str) -> str:
        """Writes files, all or none: one commit, which the Hub accepts only on top of the commit in `head`.

        Args:
            head: What was there when the change was made.
            files: Path -> content.
            message: Of the commit.

        Returns:
            The new revision.

        Raises:
            StaleError: The address has changed since.
            HubError: The Hub cannot be reached, or refuses the change.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        repo_id, endpoint = self.reader.name, self.reader.endpoint
        with explained(Reference(repo_id), endpoint):
            try:
                done = client(endpoint).create_commit(repo_id, operations, commit_message=message, parent_commit=head.revision)
            except HfHubHTTPError as error:
                if error.response.status_code in STALE:
                    raise StaleError from error
                raise
        return str(done.oid)

    def tag(self, revision: str, name: str) -> bool:
        """Tags a revision in git; returns whether that worked. Tags are for people: nothing relies on them."""
        repo_id, endpoint = self.reader.name, self.reader.endpoint
        with suppress(HubError), explained(Reference(repo_id), endpoint):
            client(endpoint).create_tag(repo_id, tag=name, revision=revision, exist_ok=True)
            return True
        return False


@dataclass(frozen=True)
class FolderWriter:
    """A folder. The channel file is replaced last: until then readers see the old channel, whole."""

    reader: FolderReader
    """How it is read."""

    def create(self, *, private: bool) -> None:
        """Creates the folder, if there is none."""
        self.reader.folder.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)

    def head(self) -> Head:
        """The files that are there."""
        channel, card = self._read(CHANNEL_FILE), self._read(CARD)
        return Head(_digest(channel), channel, card)

    def _read(self, name: str) -> bytes | None:
        try:
            return read_start(self.reader.folder / name, MAX_BYTES + 1)
        except FileNotFoundError:
            return None

    def write(self, head: Head, files: Mapping[str, bytes], message: str) -> str:  # noqa: ARG002 - folders have no history
        """Writes each file by rename, the channel last, while other publishers wait. Raises StaleError, as in HubWriter."""
        folder = self.reader.folder
        with exclusive(folder / ".channel.lock"):
            if _digest(self._read(CHANNEL_FILE)) != head.revision:
                raise StaleError
            for path in sorted(files, key=lambda path: path == CHANNEL_FILE):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                sweep_writes(file)
                # What the channel does not list may be left from an interrupted push.
                write_bytes(file, files[path], overwrite=True)
        return _digest(files[CHANNEL_FILE])

    def tag(self, revision: str, name: str) -> bool:  # noqa: ARG002 - folders have no tags
        """Folders have no tags."""
        return False


ChannelWriter: TypeAlias = HubWriter | FolderWriter
"""An address to which a channel can be written."""


def _digest(data: bytes | None) -> str:
    return sha256(data or b"").hexdigest()


def open_writer(text: str) -> ChannelWriter:
    """The writer for an address.

    Args:
        text: The address, as the user wrote it.

    Returns:
        A writer; nothing has been read or written yet.

    Raises:
        DataError: The text is not the address of a channel.
        PublishError: The address can only be read.
    """
    reader = open_reader(text)
    if isinstance(reader, HubReader):
        return HubWriter(reader)
    if isinstance(reader, FolderReader):
        return FolderWriter(reader)
    if reader.address.startswith("http"):
        raise PublishError(
            f"{reader.address} is a web server, which can only be read",
            advice="Publish into the folder that it serves (file:///folder), or copy a channel there.",
        )
    raise DataError(f"cannot publish to {reader.address}")
