"""Where channels are written: a repository of the Hub, or a folder. Changes appear whole, onto what they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import ChannelReader, FolderReader, HubReader, open_reader, read_regular
from nestpatch.errors import DataError, HubError, HubNotFoundError, PublishError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.hub.client import Reference, Snapshot, client, explained, look_up
from nestpatch.hub.ranges import Meter, RemoteFile
from nestpatch.signing.dsse import MAX_BYTES

CARD = "README.md"
STALE = {409, 412}
"""Statuses with which the Hub says that somebody else was faster."""


class StaleError(Exception):
    """The place has changed since it was looked at."""


@dataclass(frozen=True)
class Head:
    """What a place holds before a change."""

    version: str
    channel: bytes | None
    """None: no channel yet."""
    card: bytes | None


class ChannelWriter(Protocol):
    """A place that a channel can be written to."""

    @property
    def source(self) -> ChannelReader:
        """How it is read."""

    def create(self, *, private: bool) -> None:
        """Makes the place, if there is none."""

    def head(self) -> Head:
        """What is there now."""

    def write(self, head: Head, files: Mapping[str, bytes], message: str) -> str:
        """Writes files by their paths, all or none, and returns the new version.

        Raises StaleError when the place is no longer as `head` says.
        """

    def tag(self, version: str, name: str) -> bool:
        """Names a version; whether that worked. Tags are for people: nothing relies on them."""


@dataclass(frozen=True)
class HubWriter:
    """A model repository."""

    source: HubReader

    def create(self, *, private: bool) -> None:
        """Makes the repository, if there is none."""
        try:
            look_up(self.source.repo_id, endpoint=self.source.endpoint)
        except HubNotFoundError:
            with explained(Reference(self.source.repo_id), self.source.endpoint):
                client(self.source.endpoint).create_repo(self.source.repo_id, private=private, exist_ok=True)

    def head(self) -> Head:
        """The commit that main names now, and the files of that commit."""
        snapshot = look_up(self.source.repo_id, endpoint=self.source.endpoint)
        channel, card = (self._read(snapshot, name) for name in (CHANNEL_FILE, CARD))
        return Head(snapshot.commit, channel, card)

    def _read(self, snapshot: Snapshot, name: str) -> bytes | None:
        if name not in snapshot.files:
            return None
        return RemoteFile(snapshot, name, Meter(), endpoint=self.source.endpoint).read(0, MAX_BYTES)

    def write(self, head: Head, files: Mapping[str, bytes], message: str) -> str:
        """One commit, which the Hub takes only onto the commit that was looked at."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        api = client(self.source.endpoint)
        with explained(Reference(self.source.repo_id), self.source.endpoint):
            try:
                done = api.create_commit(self.source.repo_id, operations, commit_message=message, parent_commit=head.version)
            except HfHubHTTPError as error:
                if error.response.status_code in STALE:
                    raise StaleError from error
                raise
        return str(done.oid)

    def tag(self, version: str, name: str) -> bool:
        """A git tag."""
        with suppress(HubError), explained(Reference(self.source.repo_id), self.source.endpoint):
            client(self.source.endpoint).create_tag(self.source.repo_id, tag=name, revision=version, exist_ok=True)
            return True
        return False


@dataclass(frozen=True)
class FolderWriter:
    """A folder. The channel file is replaced last: until then readers see the old channel, whole."""

    source: FolderReader

    def create(self, *, private: bool) -> None:
        """Makes the folder, if there is none."""
        self.source.folder.mkdir(mode=0o700 if private else 0o777, parents=True, exist_ok=True)

    def head(self) -> Head:
        """What lies there."""
        channel, card = (self._read(name) for name in (CHANNEL_FILE, CARD))
        return Head(_digest(channel), channel, card)

    def _read(self, name: str) -> bytes | None:
        try:
            return read_regular(self.source.folder / name, MAX_BYTES + 1)
        except FileNotFoundError:
            return None

    def write(self, head: Head, files: Mapping[str, bytes], message: str) -> str:  # noqa: ARG002 - folders have no history
        """Each file by rename, the channel last, while other publishers wait."""
        folder = self.source.folder
        with exclusive(folder / ".channel.lock"):
            if _digest(self._read(CHANNEL_FILE)) != head.version:
                raise StaleError
            for path in sorted(files, key=lambda path: path == CHANNEL_FILE):
                file = folder / path
                file.parent.mkdir(parents=True, exist_ok=True)
                sweep_writes(file)
                # What the channel does not name may be left of an interrupted push.
                write_bytes(file, files[path], overwrite=True)
        return _digest(files[CHANNEL_FILE])

    def tag(self, version: str, name: str) -> bool:  # noqa: ARG002 - folders have no tags
        """Folders have none."""
        return False


def _digest(data: bytes | None) -> str:
    return sha256(data or b"").hexdigest()


def open_writer(text: str) -> ChannelWriter:
    """The place that a text names. Raises DataError for what names none, PublishError where nobody can write."""
    source = open_reader(text)
    if isinstance(source, HubReader):
        return HubWriter(source)
    if isinstance(source, FolderReader):
        return FolderWriter(source)
    if source.place.startswith("http"):
        raise PublishError(
            f"{source.place} is a web server, which can only be read",
            advice="Publish into the folder that it serves (file:///folder), or copy a channel there.",
        )
    raise DataError(f"nothing can be published in {source.place}")
