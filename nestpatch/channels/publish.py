"""Publishing: push a version, yank one, renew a channel. Each change is signed anew, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.channels._memory import Memory, accepted, held, keep, memory_file, recall, recall_channel
from nestpatch.channels._release import (
    DAYS,
    MARK,
    THIS_FOLDER,
    add,
    hand_over,
    issue,
    listed,
    mark_yanked,
    model_card,
    require_next_number,
)
from nestpatch.channels._writers import CARD, ChannelWriter, Head, StaleError, open_writer
from nestpatch.channels.listing import CHANNEL_FILE, Channel, ListedStatus, parse, payload
from nestpatch.channels.readers import ChannelReader
from nestpatch.channels.rules import ChannelRules, SeenChannel, latest
from nestpatch.errors import ChannelKeyError, PublishError, RollbackError, SerialJumpError, VersionError
from nestpatch.formats import nest
from nestpatch.pack import Manifest, utc_now
from nestpatch.signing.envelopes import Bundle
from nestpatch.signing.keys import PrivateKey, PublicKey
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import SUFFIX, VerifiedPack, check_signatures, read_signatures

ATTEMPTS = 8
"""How often a change is made again because another publisher was faster."""
_RESTORE = (
    "Nothing was published. Put the newest channel back there: a repository's history has it. If the key was stolen, and the "
    "newer one is not yours: put your own last channel back, remove what this user remembers of it (docs/fleet.md), and hand "
    "it over: nestpatch renew CHANNEL --key OLD --new-key NEW"
)


@dataclass(frozen=True)
class Published:
    """The state of a channel after `push`, `yank` or `renew`."""

    address: str
    """Of the channel."""
    revision: str
    """The state of the address: a commit, or the digest of the channel file."""
    name: str
    """Of the channel."""
    serial: int
    expires: str
    latest: str
    """Version number; empty when no version is active."""
    changed: bool
    """Whether something was written; False when it was published already."""
    message: str
    """What was done, for people."""
    tag: str
    """The tag that was set; empty where there is none."""

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "address": self.address,
            "revision": self.revision,
            "name": self.name,
            "serial": self.serial,
            "expires": self.expires,
            "latest": self.latest,
            "changed": self.changed,
            "message": self.message,
            "tag": self.tag,
        }


@dataclass(frozen=True)
class _Change:
    """The next state of a channel."""

    channel: Channel
    key: PrivateKey
    """The key that signs it."""
    message: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    tag: str = ""
    manifest: Manifest | None = None
    """Of the version that is added."""
    needed: bool = True
    """False: it is published already, nothing is written."""


_Edit: TypeAlias = Callable[[Channel], _Change]


def push(
    pack_file: str | Path,
    address: str,
    key: PrivateKey,
    *,
    days: int = DAYS,
    private: bool = False,
    name: str | None = None,
) -> Published:
    """Publishes a pack as the next version of a channel, with the signatures beside it and the publisher's own.

    A repository or folder that does not exist is created, and a first channel with this key as its root key. Pushing the same
    bytes again changes nothing and is not an error.

    Args:
        pack_file: The .nest file.
        address: The channel: owner/name on the Hub, or a folder (file:///folder or a path that starts with /, ./ or ../).
        key: The channel's root key. It also signs the pack, unless its signature is already beside the file.
        days: How long the channel is valid after this.
        private: Creates a new repository or folder for its owner only.
        name: Name of a new channel in a folder; None: that of the pack.

    Returns:
        The state of the channel.

    Raises:
        DataError: The text is not the address of a channel.
        VersionError: The version was published with other content, without one of these signatures, or was yanked.
        ChannelError: The channel has another root key, is older than what this user has seen of it, or cannot be written.
        BadSignatureError: A signature beside the file is wrong.
        PackError: The file is not a pack.
        HubError: The Hub cannot be reached, or refuses the change.
    """
    file, writer = Path(pack_file), open_writer(address)
    signatures = read_signatures(file)
    data = nest.read_bytes(file)
    publisher = Policy((TrustedKey("publisher", key.public),))
    result = check_signatures(data, signatures, publisher, file=file.name, allow_unsigned=True)
    suffixes = {signature.removeprefix(file.name): content for signature, content in signatures.items()}
    manifest = result.pack.manifest
    if not isinstance(result, VerifiedPack):  # not signed by this key
        free = SUFFIX if SUFFIX not in suffixes else f".{key.public.key_id[:12]}{SUFFIX}"
        suffixes[free] = Bundle.write(result.pack_id, f"{manifest.name}.nest", key)
    entry, files = listed(manifest, data, suffixes)
    # Two signatures of one key differ, and the channel's key has signed every published version.
    others = [
        sha256(content).hexdigest()
        for source, content in signatures.items()
        if Bundle.parse(content, source).key_id != key.public.key_id
    ]

    def edit(channel: Channel) -> _Change:
        same = [p for p in channel.packs if p.order == entry.order and p.file.sha256 == entry.file.sha256]
        standing = same and same[0].status is not ListedStatus.YANKED
        if standing and set(others) <= {file.sha256 for file in same[0].signatures}:
            return _Change(channel, key, f"{entry.label} is already published", needed=False)
        return _Change(add(channel, entry), key, f"publish {entry.label}", files, f"v{entry.version}", manifest)

    writer.create(private=private)
    return _publish(writer, edit, key, days, fresh=name or writer.reader.name or manifest.name)


def yank(address: str, version: str, reason: str, key: PrivateKey, *, days: int = DAYS) -> Published:
    """Withdraws a version: models that have it go back with their next update. Its files stay, so that they can be examined.

    Yanking again for the same reason changes nothing and is not an error.

    Args:
        address: The channel.
        version: The version number.
        reason: Why, in one line, for those who have it.
        key: The channel's root key.
        days: How long the channel is valid after this.

    Returns:
        The state of the channel.

    Raises:
        DataError: The text is not the address of a channel.
        VersionError: There is no such version, or no channel.
        YankedError: It was yanked before, for another reason.
        ChannelError: The channel has another root key, is older than what this user has seen of it, or cannot be written.
        HubError: The Hub cannot be reached, or refuses the change.
    """

    def edit(channel: Channel) -> _Change:
        if any((p.version, p.status, p.reason) == (version, ListedStatus.YANKED, reason) for p in channel.packs):
            # An earlier attempt was written, and its process died before it could say so.
            return _Change(channel, key, f"{version} is already yanked: {reason}", needed=False)
        return _Change(mark_yanked(channel, version, reason), key, f"yank {version}: {reason}")

    return _publish(open_writer(address), edit, key, days)


def renew(address: str, key: PrivateKey, new_key: PrivateKey | None = None, *, days: int = DAYS) -> Published:
    """Signs a channel again before it expires, or hands it over to a new key.

    Args:
        address: The channel.
        key: The channel's root key.
        new_key: The next root key. It also signs all versions that are not yanked.
        days: How long the channel is valid after this.

    Returns:
        The state of the channel.

    Raises:
        DataError: The text is not the address of a channel.
        VersionError: There is no channel.
        ChannelError: The channel has another root key, is older than what this user has seen of it, or cannot be written.
        HubError: The Hub cannot be reached, or refuses the change.
    """

    def edit(channel: Channel) -> _Change:
        if new_key is None:
            return _Change(channel, key, "renew the channel")
        suffix = f".{new_key.public.key_id[:12]}{SUFFIX}"
        files = {
            pack.version: {f"{pack.file.path}{suffix}": Bundle.write(pack.file.sha256, pack.file.name, new_key)}
            for pack in channel.packs
            if pack.status is not ListedStatus.YANKED
            and f"{pack.file.path}{suffix}" not in {file.path for file in pack.signatures}
        }
        handed = hand_over(channel, key, new_key, files)
        flat = {path: content for group in files.values() for path, content in group.items()}
        return _Change(handed, new_key, f"hand the channel over to {new_key.public.key_id[:12]}", flat)

    return _publish(open_writer(address), edit, key, days)


def _publish(writer: ChannelWriter, edit: _Edit, key: PrivateKey, days: int, *, fresh: str | None = None) -> Published:
    """Makes a change, again on top of the newest channel where another publisher was faster."""
    address = writer.reader.address
    for _ in range(ATTEMPTS):
        head = writer.head()
        current, roots = _current(writer.reader, head, key, fresh)
        change = edit(current)
        channel, data, revision, tag = current, head.channel or b"", head.revision, ""
        if change.needed:
            require_next_number(change.channel)
            channel, data = issue(change.channel, change.key, utc_now(), days)
            files = {**change.files, **_card(writer.reader, head, channel, change.manifest), CHANNEL_FILE: data}
            try:
                revision = writer.write(head, files, f"{change.message} (number {channel.serial})")
            except StaleError:
                continue
        # The publisher has seen what it published: an older channel would be a rollback.
        roots = roots if roots[-1] == channel.root else (*roots, channel.root)
        seen = SeenChannel(channel.name, channel.serial, sha256(payload(channel)).hexdigest(), roots)
        with held():
            keep(address, Memory(seen, revision, data))
        if change.needed and change.tag and writer.tag(revision, change.tag):
            tag = change.tag
        best = latest(channel)
        newest = best.version if best else ""
        facts = (channel.name, channel.serial, channel.expires, newest, change.needed, change.message, tag)
        return Published(address, revision, *facts)
    raise PublishError(f"other publishers changed {address} at the same time: gave up after {ATTEMPTS} attempts")


def _current(reader: ChannelReader, head: Head, key: PrivateKey, fresh: str | None) -> tuple[Channel, tuple[PublicKey, ...]]:
    """The channel to change, by the rules that its readers apply, and its root keys; it may have expired."""
    if head.channel is None:
        return _new(reader, key, fresh), (key.public,)
    source = f"the channel at {reader.address}"
    root = parse(head.channel, source)[1].root
    if root != key.public:
        raise ChannelKeyError(
            f"{source} has the root key {root.key_id[:12]}..; this key is {key.public.key_id[:12]}..",
            advice="Publish with that key, or let it hand the channel over: nestpatch renew CHANNEL --key OLD --new-key NEW",
        )
    rules = ChannelRules(Policy((TrustedKey("publisher", key.public),)), utc_now(), name=reader.name, allow_expired=True)
    try:
        with held():
            found = accepted(rules, reader.address, head.channel, source)
    except (RollbackError, SerialJumpError) as error:
        raise type(error)(str(error), advice=_RESTORE) from error
    return found.channel, found.seen.roots


def _new(reader: ChannelReader, key: PrivateKey, fresh: str | None) -> Channel:
    known = recall(reader.address)
    if known is not None:
        raise RollbackError(f"{reader.address} had a channel, number {known.seen.serial}, and has none now", advice=_RESTORE)
    if fresh is None:
        raise VersionError(f"there is no channel at {reader.address}", advice="`nestpatch push` starts one.")
    seen = recall_channel(memory_file(key.public.key_id, fresh), fresh)
    if seen is not None:
        raise PublishError(
            f"this key has the channel {fresh}, number {seen.serial}, at another address than {reader.address}",
            advice="Copy its folder there, or publish where it is. A second channel needs a name or a key of its own.",
        )
    return Channel(fresh, key.public)


def _card(reader: ChannelReader, head: Head, channel: Channel, manifest: Manifest | None) -> dict[str, bytes]:
    """README.md, unless the publisher wrote one."""
    if head.card is not None and MARK.encode() not in head.card:
        return {}
    best = latest(channel)
    if best is not None and (manifest is None or manifest.version != best.version):
        data = reader.read(head.revision, best.file)
        best.file.check(data, reader.address)
        manifest = nest.decode(data).manifest
    # A folder has another path on every machine, and the publisher's own path is not published.
    return {CARD: model_card(channel, manifest, reader.address if reader.name else THIS_FOLDER).encode("utf-8")}
