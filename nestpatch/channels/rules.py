"""The rules of channels. No file, no network and no clock: bytes, what is remembered and the time come in, decisions go out.

Whoever follows a channel holds to these rules, in this order:

- It has the name of the place that it was asked of (on the Hub), and the name that this place had before.
- It is signed by its root key. At first that is a key that the user trusts for the model; from then on it is the key that was
  seen last, or one to which that key has handed the channel down, signed, step by step. Of two keys to which the same key has
  handed it down, the one that was seen first stays.
- The user still trusts one of these keys: taking trust away ends updates.
- It is not older than what this user has seen of the channel, at whatever place (rollback). The order is that of (epoch,
  number): the epoch counts the hand-overs, the number the changes since the last one. A hand-over starts the numbers again, so
  that no number which a thief of the old key may show stands in the way of the new key. One number of one epoch means one
  content (equivocation).
- Its number is at most MAX_JUMP above the one that was seen last in its epoch, and at most MAX_FIRST where none was seen.
- It was issued at most CLOCK_TOLERANCE seconds in the future: with a clock that is behind, expiry proves nothing.
- It has not expired: an old copy cannot be served for ever (freeze).
- The latest version is the highest that is active; prereleases only where nothing else is active.
- Files are those that the channel names, by size and SHA-256, and a pack is what the channel says of it (swapped files).
- A revoked version is not handed out, and who has it applied goes back to the latest one, or to the base.
- A model never goes to a lower version for any other reason.

A channel is the same channel, wherever it lies, when a root key that is remembered of it under its name is its root key or has
handed it down to that. So a mirror cannot serve what is older than what another place has shown, and a new address forgets
nothing.

What a pack's own signatures have to be, the user's policy says (signing/trust.py); a key that was handed a channel down counts
there in the place of the one that the user trusts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from typing import TypeAlias

from nestpatch.channels.listing import MAX_FIRST, TIME, Channel, ListedPack, ListedStatus, base_digest, parse
from nestpatch.errors import (
    ChannelKeyError,
    ClockError,
    EquivocationError,
    ExpiredError,
    ForeignChannelError,
    RevokedError,
    RollbackError,
    SerialJumpError,
    SwappedFileError,
    VersionError,
)
from nestpatch.pack import Manifest
from nestpatch.signing.dsse import Envelope
from nestpatch.signing.keys import PublicKey
from nestpatch.signing.subject import NO_MODEL, Subject
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.version import Version

MAX_JUMP = 100_000
"""Numbers that a channel may have gone ahead since it was seen last: a change every ten minutes for nearly two years."""
CLOCK_TOLERANCE = 300
"""Seconds that the clock of the reader may be behind that of the publisher."""


@dataclass(frozen=True)
class Seen:
    """What is remembered of a channel."""

    name: str
    serial: int
    digest: str
    """SHA-256 of what was signed."""
    roots: tuple[PublicKey, ...]
    """The root keys since the first contact; the last one is in office."""

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, serial number): what is newer is greater."""
        return len(self.roots) - 1, self.serial

    def is_of(self, channel: Channel) -> bool:
        """Whether this is remembered of that channel: one of the root keys is its own, or handed it down to that."""
        return channel.name == self.name and any(channel.walk(key)[-1] == channel.root for key in self.roots)


@dataclass(frozen=True)
class Admitted:
    """A channel that may be followed."""

    channel: Channel
    seen: Seen
    """To be remembered from now on."""
    policy: Policy
    """The user's, with the root key in the place of the trusted key that it comes from."""
    line: tuple[PublicKey, ...]
    """The root keys from the first one that this user trusts or remembers to the one in office."""


@dataclass(frozen=True)
class Gate:
    """Lets channels in by the rules."""

    policy: Policy
    now: str
    """UTC, as channels have it."""
    subject: Subject = NO_MODEL
    """What the user calls the model that this is for."""
    name: str | None = None
    """Of the channel; None: whatever it was the first time."""
    seen: Seen | None = None
    allow_unsigned: bool = False
    """Lets in a channel whose key nobody trusts, as long as it stays with that key."""
    allow_expired: bool = False
    """For its publisher, who has to renew it."""

    def admit(self, data: bytes, source: str) -> Admitted:
        """The channel of a file. Raises a ChannelError that says which rule it breaks."""
        return self.judge(*parse(data, source), source)

    def judge(self, envelope: Envelope, channel: Channel, source: str) -> Admitted:
        """The same for a file that was read already."""
        self._require_name(channel, source)
        roots = self._roots(envelope, channel, source)
        line = (*self._ancestors(channel, roots[0]), *roots)
        policy = self._require_trust(channel, line, source)
        seen = Seen(channel.name, channel.serial, sha256(envelope.payload).hexdigest(), roots)
        self._require_order(channel, seen, source)
        self._require_time(channel, source)
        return Admitted(channel, seen, policy, line)

    def _roots(self, envelope: Envelope, channel: Channel, source: str) -> tuple[PublicKey, ...]:
        """The root keys up to the one in office, those that were known before first."""
        trail, known = self._trail(channel, source), self.seen.roots if self.seen else ()
        sound = trail[-1] == channel.root and envelope.signed_by(channel.root)
        if sound and trail[: len(known)] == known:
            return trail
        if sound and trail == known[: len(trail)]:
            raise RollbackError(
                f"{source} is signed by {channel.root.key_id[:12]}.., from before that key handed the channel down; "
                f"{known[-1].key_id[:12]}.. was seen in office"
            )
        office = (known or trail)[-1]
        raise ChannelKeyError(
            f"{source} is not signed by its root key {office.key_id[:12]}.., nor by one to which that was handed down",
            advice="Do not use this channel. If the publisher lost the key, a new channel has to be set up and trusted.",
        )

    def _trail(self, channel: Channel, source: str) -> tuple[PublicKey, ...]:
        """The keys from the first that is known to the one in office."""
        if self.seen is not None:
            return channel.walk(self.seen.roots[0])
        for trusted in self.policy.keys:
            trail = channel.walk(trusted.key)
            if self._covers(trusted, channel) and trail[-1] == channel.root:
                return trail
        if self.allow_unsigned:
            return (channel.root,)
        raise ChannelKeyError(f"{source} is signed by {channel.root.key_id[:12]}.., which is not trusted here")

    def _require_trust(self, channel: Channel, line: tuple[PublicKey, ...], source: str) -> Policy:
        """The policy with the key in office in the place of the one that is trusted."""
        found = [self.policy.find(key.key_id) for key in line]
        if not self.allow_unsigned and not any(trusted and self._covers(trusted, channel) for trusted in found):
            raise ChannelKeyError(f"{source} is followed, but its key is no longer trusted here for this model")
        return inherit(self.policy, line)

    def _ancestors(self, channel: Channel, first: PublicKey) -> tuple[PublicKey, ...]:
        """Trusted keys that had the channel before the first one that is remembered: it was met through a later key then."""
        for trusted in self.policy.keys:
            line = channel.walk(trusted.key)
            if self._covers(trusted, channel) and first in line:
                return line[: line.index(first)]
        return ()

    def _covers(self, trusted: TrustedKey, channel: Channel) -> bool:
        """Whether a key counts for the model and a base of the channel's. Each pack is judged by its own base afterwards."""
        bases = {pack.base_model for pack in channel.packs}
        return any(trusted.covers(self.subject.of(base)) for base in bases) if bases else trusted.covers(self.subject)

    def _require_name(self, channel: Channel, source: str) -> None:
        for expected in (self.name, self.seen.name if self.seen else None):
            if expected not in {None, channel.name}:
                raise ForeignChannelError(f"{source} is the channel {channel.name}, where {expected} should be")

    def _require_order(self, channel: Channel, now: Seen, source: str) -> None:
        """`now`: what would be remembered. Its epoch is at least the known one, since its root keys go on from there."""
        known = self.seen if self.seen and len(self.seen.roots) == len(now.roots) else None
        if known is not None and now.serial < known.serial:
            raise RollbackError(f"{source} has number {now.serial} of {channel.issued}; {known.serial} was seen before")
        if known is not None and now.serial == known.serial and now.digest != known.digest:
            raise EquivocationError(f"{source} has number {now.serial}, as one that was seen before and said something else")
        most = MAX_FIRST if known is None else known.serial + MAX_JUMP
        if now.serial > most:
            before = "none was seen before" if known is None else f"{known.serial} was seen before"
            raise SerialJumpError(f"{source} has number {now.serial}; {before}, and at most {most} could follow")

    def _require_time(self, channel: Channel, source: str) -> None:
        if (_time(channel.issued) - _time(self.now)).total_seconds() > CLOCK_TOLERANCE:
            raise ClockError(f"{source} was issued at {channel.issued}; this machine's clock says that it is {self.now}")
        if channel.expires <= self.now and not self.allow_expired:
            raise ExpiredError(f"{source}, number {channel.serial}, was good until {channel.expires}; now it is {self.now}")


def _time(text: str) -> datetime:
    return datetime.strptime(text, TIME)  # noqa: DTZ007 - UTC by its Z


def inherit(policy: Policy, roots: tuple[PublicKey, ...]) -> Policy:
    """A policy in which the last of the root keys counts where the trusted one among them did."""
    heir = roots[-1]
    trusted = next((found for key in reversed(roots) if (found := policy.find(key.key_id))), None)
    if trusted is None or trusted.key == heir:
        return policy
    old = trusted.key.key_id
    rules = tuple(replace(r, keys=tuple(heir.key_id if text == old else text for text in r.keys)) for r in policy.rules)
    return Policy(tuple(replace(t, key=heir) if t is trusted else t for t in policy.keys), rules)


def latest(channel: Channel) -> ListedPack | None:
    """The version that everybody should have."""
    active = [pack for pack in channel.packs if pack.status is ListedStatus.ACTIVE]
    finished = [pack for pack in active if not pack.order.prerelease]
    return max(finished or active, key=lambda pack: pack.order, default=None)


def choose(channel: Channel, version: str | None = None) -> ListedPack:
    """A version by its number, or the latest. Raises VersionError, RevokedError."""
    if version is None:
        found = latest(channel)
        if found is None:
            raise VersionError(f"no version of {channel.name} is active", advice="Wait for the publisher's next version.")
        return found
    for pack in channel.packs:
        if pack.version == version:
            if pack.status is ListedStatus.REVOKED:
                raise RevokedError(f"{pack.label} was revoked by its publisher: {pack.reason or 'no reason given'}")
            return pack
    known = ", ".join(pack.version for pack in channel.packs if pack.status is not ListedStatus.REVOKED) or "none"
    raise VersionError(f"{channel.name} has no version {version}", advice=f"Versions that stand: {known}.")


@dataclass(frozen=True)
class Stay:
    """Nothing to do."""


@dataclass(frozen=True)
class Upgrade:
    """Go to a higher version, or apply the first one."""

    pack: ListedPack


@dataclass(frozen=True)
class GoBack:
    """What is applied was revoked."""

    pack: ListedPack | None
    """None: no version is left, only the base."""
    reason: str


Decision: TypeAlias = Stay | Upgrade | GoBack


def decide(channel: Channel, applied: tuple[str, str] | None) -> Decision:
    """What a model should do that has (version, pack id) of the channel's patch applied, or none of it."""
    best = latest(channel)
    if applied is None:
        return Stay() if best is None else Upgrade(best)
    version, pack_id = applied
    revoked = next((p for p in channel.packs if p.file.sha256 == pack_id and p.status is ListedStatus.REVOKED), None)
    if best is not None and (Version.parse(version) < best.order or pack_id in best.supersedes):
        return Upgrade(best)
    return Stay() if revoked is None else GoBack(best, revoked.reason)


def require_as_listed(pack: ListedPack, manifest: Manifest, place: str) -> None:
    """Raises SwappedFileError unless a pack is what the channel says of it."""
    listed = (pack.id, pack.version, pack.base_sha256)
    if (manifest.name, manifest.version, base_digest(manifest)) != listed:
        raise SwappedFileError(
            f"{place} lists {pack.label} for {pack.base_model}, but holds {manifest.name} {manifest.version} "
            f"for {manifest.base.model_id} there"
        )
