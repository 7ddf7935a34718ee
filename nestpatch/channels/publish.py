"""Publishing: push a version, withdraw one, renew a channel. Each is signed anew and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from nestpatch.channels._card import ELSEWHERE, MARK, model_card
from nestpatch.channels._release import (
    DAYS,
    add,
    hand_over,
    issue,
    listed,
    new_channel,
    require_next_number,
    revoke,
    stands,
    with_signatures,
)
from nestpatch.channels._writers import CARD, ChannelWriter, Head, StaleError, open_writer
from nestpatch.channels.follow import utc_now
from nestpatch.channels.listing import CHANNEL_FILE, Channel, ListedStatus, parse, payload
from nestpatch.channels.memory import Memory, held, judged, recall, recall_channel, remember
from nestpatch.channels.readers import ChannelReader
from nestpatch.channels.rules import Gate, Seen, latest
from nestpatch.errors import ChannelKeyError, PublishError, RollbackError, SerialJumpError, VersionError
from nestpatch.formats import nest
from nestpatch.pack import Manifest
from nestpatch.signing import bundle
from nestpatch.signing.keys import PrivateKey, PublicKey
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import SUFFIX, Signed, judge_signatures, read_signatures

ATTEMPTS = 8
"""Before publishing gives way to others who publish at the same time."""
STALE_PLACE = (
    "Nothing was published. Put the newest channel back there: a repository's history has it. If the key was stolen, and the "
    "newer one is not yours: put your own last channel back, remove what this user remembers of it (docs/fleet.md), and hand "
    "it over: nestpatch renew REPO --key OLD --new-key NEW"
)


@dataclass(frozen=True)
class Change:
    """What is to be published next."""

    channel: Channel
    key: PrivateKey
    """That signs it."""
    message: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    tag: str = ""
    manifest: Manifest | None = None
    """Of the version that is added."""
    standing: bool = False
    """It is there already: nothing is to be written."""


Edit: TypeAlias = Callable[[Channel], Change]


@dataclass(frozen=True)
class Published:
    """A change that stands."""

    place: str
    version: str
    """Of the place: the commit."""
    channel: str
    serial: int
    expires: str
    latest: str
    """Version number; empty when none is active."""
    done: str
    """For people."""
    tag: str
    """Empty where there is none."""


def push(
    pack: str | Path, place: str, key: PrivateKey, *, days: int = DAYS, private: bool = False, name: str | None = None
) -> Published:
    """Publishes a pack as the next version of a channel, with the signatures beside it and the publisher's own.

    A place that does not exist is made (`private`: for the owner alone), and a first channel with this key as its root;
    `name` is for a channel in a folder. A pack that stands there already, with the signatures beside it, is left as it is.
    Raises VersionError for a version that was published with other content or withdrawn, ChannelKeyError when the channel has
    another root key, RollbackError when this user has seen a newer state of the channel, BadSignatureError, PublishError,
    PackError, HubError.
    """
    file, site = Path(pack), open_writer(place)
    signatures = read_signatures(file)
    data = nest.read_bytes(file)
    outcome = judge_signatures(
        data, signatures, Policy((TrustedKey("publisher", key.public),)), file=file.name, allow_unsigned=True
    )
    suffixes = {signature.removeprefix(file.name): content for signature, content in signatures.items()}
    manifest = outcome.pack.manifest
    if not isinstance(outcome, Signed):  # by this key
        free = SUFFIX if SUFFIX not in suffixes else f".{key.public.key_id[:12]}{SUFFIX}"
        suffixes[free] = bundle.sign(outcome.pack_id, f"{manifest.name}.nest", key)
    entry, files = listed(manifest, data, suffixes)

    own = [sha256(content).hexdigest() for content in signatures.values()]

    def edit(channel: Channel) -> Change:
        if stands(channel, entry, own):
            return Change(channel, key, f"{entry.label} is published already", standing=True)
        return Change(add(channel, entry), key, f"publish {entry.label}", files, f"v{entry.version}", manifest)

    site.create(private=private)
    return _publish(site, edit, key, days, fresh=name or site.source.name or manifest.name)


def yank(place: str, version: str, reason: str, key: PrivateKey, *, days: int = DAYS) -> Published:
    """Revokes a version: who has it applied goes back. Its files stay, for those who ask what it was.

    One that is revoked already, for this very reason, is left as it is.
    Raises VersionError, RevokedError, ChannelKeyError, PublishError, HubError.
    """

    def edit(channel: Channel) -> Change:
        if any((p.version, p.status, p.reason) == (version, ListedStatus.REVOKED, reason) for p in channel.packs):
            # An attempt before this one was written, and its process died before it could say so.
            return Change(channel, key, f"{version} is revoked already: {reason}", standing=True)
        return Change(revoke(channel, version, reason), key, f"revoke {version}: {reason}")

    return _publish(open_writer(place), edit, key, days)


def renew(place: str, key: PrivateKey, new_key: PrivateKey | None = None, *, days: int = DAYS) -> Published:
    """Signs a channel anew for some more days; with `new_key`, hands it over to that key, which also signs what stands.

    Raises ChannelKeyError, PublishError, HubError.
    """

    def edit(channel: Channel) -> Change:
        if new_key is None:
            return Change(channel, key, "renew the channel")
        files = _signed_anew(channel, new_key)
        handed = with_signatures(hand_over(channel, key, new_key), files)
        flat = {path: content for group in files.values() for path, content in group.items()}
        return Change(handed, new_key, f"hand the channel over to {new_key.public.key_id[:12]}", flat)

    return _publish(open_writer(place), edit, key, days)


def _signed_anew(channel: Channel, key: PrivateKey) -> dict[str, dict[str, bytes]]:
    """The new key's signatures of all versions that stand: version -> path -> content."""
    suffix, found = f".{key.public.key_id[:12]}{SUFFIX}", {}
    for pack in channel.packs:
        path = f"{pack.file.path}{suffix}"
        if pack.status is not ListedStatus.REVOKED and path not in {file.path for file in pack.signatures}:
            found[pack.version] = {path: bundle.sign(pack.file.sha256, pack.file.name, key)}
    return found


def _publish(site: ChannelWriter, edit: Edit, key: PrivateKey, days: int, *, fresh: str | None = None) -> Published:
    place = site.source.place
    for _ in range(ATTEMPTS):
        head = site.head()
        current, roots = _current(site, head, key, fresh)
        change = edit(current)
        if change.standing:
            _remember(place, current, roots, head.version, head.channel or b"")
            return _published(place, head.version, current, change.message)
        require_next_number(change.channel)
        channel, data = issue(change.channel, change.key, utc_now(), days)
        files = {**change.files, **_card(site, head, channel, change.manifest), CHANNEL_FILE: data}
        try:
            version = site.write(head, files, f"{change.message} (number {channel.serial})")
        except StaleError:
            continue
        _remember(place, channel, roots, version, data)
        tag = change.tag if change.tag and site.tag(version, change.tag) else ""
        return _published(place, version, channel, change.message, tag)
    raise PublishError(f"others publish in {place} at the same time: {ATTEMPTS} attempts came too late")


def _published(place: str, version: str, channel: Channel, done: str, tag: str = "") -> Published:
    best = latest(channel)
    newest = best.version if best else ""
    return Published(place, version, channel.name, channel.serial, channel.expires, newest, done, tag)


def _current(site: ChannelWriter, head: Head, key: PrivateKey, fresh: str | None) -> tuple[Channel, tuple[PublicKey, ...]]:
    """The channel that a change is made to, by the same rules as for its readers, and its root keys; it may have expired."""
    source = site.source
    if head.channel is None:
        return _new(source, key, fresh), (key.public,)
    told = f"the channel at {source.place}"
    root = parse(head.channel, told)[1].root
    if root != key.public:
        raise ChannelKeyError(
            f"{told} has the root key {root.key_id[:12]}..; this one is {key.public.key_id[:12]}..",
            advice="Publish with that key, or let it hand the channel over: nestpatch renew REPO --key OLD --new-key NEW",
        )
    gate = Gate(Policy((TrustedKey("publisher", key.public),)), utc_now(), name=source.name, allow_expired=True)
    try:
        with held():
            admitted = judged(gate, source.place, head.channel, told)
    except (RollbackError, SerialJumpError) as error:
        raise type(error)(str(error), advice=STALE_PLACE) from error
    return admitted.channel, admitted.seen.roots


def _new(source: ChannelReader, key: PrivateKey, fresh: str | None) -> Channel:
    known = recall(source.place)
    if known is not None:
        raise RollbackError(f"{source.place} had a channel, number {known.seen.serial}, and has none now", advice=STALE_PLACE)
    if fresh is None:
        raise VersionError(f"there is no channel at {source.place}", advice="`nestpatch push` starts one.")
    seen = recall_channel(key.public.key_id, fresh)
    if seen is not None:
        raise PublishError(
            f"this key has the channel {fresh}, number {seen.serial}, at another place than {source.place}",
            advice="Copy its folder there, or publish where it is. A second channel needs a name or a key of its own.",
        )
    return new_channel(fresh, key.public)


def _card(site: ChannelWriter, head: Head, channel: Channel, manifest: Manifest | None) -> dict[str, bytes]:
    """README.md, unless somebody wrote one of their own."""
    if head.card is not None and MARK.encode() not in head.card:
        return {}
    best = latest(channel)
    if best is not None and (manifest is None or manifest.version != best.version):
        data = site.source.read(head.version, best.file)
        best.file.check(data, site.source.place)
        manifest = nest.decode(data).manifest
    address = site.source.place if site.source.name else ELSEWHERE
    return {CARD: model_card(channel, manifest, address).encode("utf-8")}


def _remember(place: str, channel: Channel, roots: tuple[PublicKey, ...], version: str, data: bytes) -> None:
    """The publisher has seen what it published: an older channel would be a rollback. `roots`: before the change."""
    roots = roots if roots[-1] == channel.root else (*roots, channel.root)
    digest = sha256(payload(channel)).hexdigest()
    remember(place, Memory(Seen(channel.name, channel.serial, digest, roots), version, data))
