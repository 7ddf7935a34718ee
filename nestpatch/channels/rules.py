"""The rules of channels. No file, no network and no clock: bytes, what was seen before and the time come in, decisions go out.

A reader accepts a channel that fulfils these rules, in this order:

- It has the name that its address requires (on the Hub), and the name that this address had before.
- It is signed by its root key. At first that is a key that the user trusts for the model; from then on it is the key that was
  seen last, or one to which that key has handed the channel over, signed, step by step. Of two keys to which the same key has
  handed it over, the one that was seen first stays.
- The user still trusts one of these keys: removing trust ends updates.
- It is not older than what this user has seen of the channel, at whatever address (rollback). The order is that of (epoch,
  number): the epoch counts the hand-overs, the number the changes since the last one. A hand-over starts the numbers again, so
  that no number which a thief of the old key has shown blocks the new key. One number of one epoch means one content
  (equivocation).
- Its number is at most MAX_JUMP above the last seen number of its epoch, and at most MAX_FIRST where none was seen.
- It was issued at most CLOCK_TOLERANCE seconds in the future: with a clock that is behind, expiry proves nothing.
- It has not expired: an old copy cannot be served for ever (freeze).
- The latest version is the highest active one; prereleases count only where nothing else is active.
- Files are those that the channel lists, by size and SHA-256, and a pack is what the channel states (swapped files).
- A yanked version is not handed out, and models that have it go back to the latest one, or to the base.
- A model never goes to a lower version for any other reason.

A channel is the same channel at every address if a root key that was seen for its name is its root key or has handed it over
to that key. So a mirror cannot serve what is older than what another address has shown, and a new address forgets nothing.

Which signatures a pack itself needs is decided by the user's policy (signing/trust.py); a key to which a channel was handed
over counts there in place of the key that the user trusts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import sha256
from typing import TypeAlias

from nestpatch.channels.listing import MAX_FIRST, Channel, ListedPack, ListedStatus, base_digest
from nestpatch.errors import (
    ChannelKeyError,
    ClockError,
    EquivocationError,
    ExpiredError,
    ForeignChannelError,
    RollbackError,
    SerialJumpError,
    SwappedFileError,
    VersionError,
    YankedError,
)
from nestpatch.pack import TIME_FORMAT, Manifest
from nestpatch.signing.envelopes import Envelope
from nestpatch.signing.keys import PublicKey
from nestpatch.signing.subject import NO_MODEL, Subject
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.version import Version

MAX_JUMP = 100_000
"""How far a number may be above the last seen one: a change every ten minutes for nearly two years."""
CLOCK_TOLERANCE = 300
"""Seconds that the reader's clock may be behind the publisher's."""


@dataclass(frozen=True)
class SeenChannel:
    """The newest state of a channel that this user has seen."""

    name: str
    serial: int
    digest: str
    """SHA-256 of the signed payload."""
    roots: tuple[PublicKey, ...]
    """The root keys since the first contact; the last one is the current one."""

    @property
    def order(self) -> tuple[int, int]:
        """(epoch, serial number): newer states are greater."""
        return len(self.roots) - 1, self.serial


@dataclass(frozen=True)
class AcceptedChannel:
    """A channel that fulfils the rules."""

    channel: Channel
    seen: SeenChannel
    """What has to be remembered of it."""
    policy: Policy
    """The user's policy, with the root key in place of the trusted key from which it descends."""
    line: tuple[PublicKey, ...]
    """The root keys, from the first that this user trusts or has seen to the current one."""


@dataclass(frozen=True)
class ChannelRules:
    """The rules for one reader at one time."""

    policy: Policy
    now: str
    """UTC, in the form of TIME_FORMAT."""
    subject: Subject = NO_MODEL
    """The model that the channel is for, as the user names it."""
    name: str | None = None
    """Required name of the channel; None: any, but always the same."""
    seen: SeenChannel | None = None
    """What was seen before; None at the first contact."""
    allow_unsigned: bool = False
    """Accepts a channel whose key is not trusted, as long as the key stays the same."""
    allow_expired: bool = False
    """For the publisher, who has to renew it."""

    def accept(self, envelope: Envelope, channel: Channel, source: str) -> AcceptedChannel:
        """Applies the rules to a channel.

        Args:
            envelope: The signed envelope.
            channel: Its content.
            source: What it is, for messages.

        Returns:
            The channel, and what has to be remembered of it.

        Raises:
            ChannelError: A rule is violated; the class says which.
        """
        for expected in (self.name, self.seen.name if self.seen else None):
            if expected not in {None, channel.name}:
                raise ForeignChannelError(f"{source} is the channel {channel.name}, expected {expected}")
        roots = self._roots(envelope, channel, source)
        line = (*self._ancestors(channel, roots[0]), *roots)
        found = [self.policy.find(key.key_id) for key in line]
        if not self.allow_unsigned and not any(trusted and self._covers(trusted, channel) for trusted in found):
            raise ChannelKeyError(f"{source} is known here, but its key is not, or no longer, trusted here for this model")
        seen = SeenChannel(channel.name, channel.serial, sha256(envelope.payload).hexdigest(), roots)
        self._require_order(channel, seen, source)
        self._require_time(channel, source)
        return AcceptedChannel(channel, seen, inherit(self.policy, line), line)

    def _roots(self, envelope: Envelope, channel: Channel, source: str) -> tuple[PublicKey, ...]:
        """The root keys up to the current one, those that were seen before first."""
        trail, known = self._trail(channel, source), self.seen.roots if self.seen else ()
        valid = trail[-1] == channel.root and envelope.signed_by(channel.root)
        if valid and trail[: len(known)] == known:
            return trail
        if valid and trail == known[: len(trail)]:
            raise RollbackError(
                f"{source} is signed by {channel.root.key_id[:12]}.., from before that key handed the channel over; "
                f"{known[-1].key_id[:12]}.. was seen as its root key"
            )
        current = (known or trail)[-1]
        raise ChannelKeyError(
            f"{source} is not signed by its root key {current.key_id[:12]}.., nor by one to which that key handed it over",
            advice="Do not use this channel. If the publisher lost the key, a new channel has to be set up and trusted.",
        )

    def _trail(self, channel: Channel, source: str) -> tuple[PublicKey, ...]:
        """The keys from the first that was seen, or is trusted, to the current one."""
        if self.seen is not None:
            return channel.walk(self.seen.roots[0])
        for trusted in self.policy.keys:
            trail = channel.walk(trusted.key)
            if self._covers(trusted, channel) and trail[-1] == channel.root:
                return trail
        if self.allow_unsigned:
            return (channel.root,)
        raise ChannelKeyError(f"{source} is signed by {channel.root.key_id[:12]}.., which is not trusted here")

    def _ancestors(self, channel: Channel, first: PublicKey) -> tuple[PublicKey, ...]:
        """Trusted keys before the first one that was seen: the channel was then met through a later key."""
        for trusted in self.policy.keys:
            line = channel.walk(trusted.key)
            if self._covers(trusted, channel) and first in line:
                return line[: line.index(first)]
        return ()

    def _covers(self, trusted: TrustedKey, channel: Channel) -> bool:
        """Whether a key counts for the model and a base of the channel. Each pack is checked by its own base afterwards."""
        bases = {pack.base_model for pack in channel.packs}
        subjects = [replace(self.subject, base=base) for base in bases] or [self.subject]
        return any(subject.is_covered(trusted.models) for subject in subjects)

    def _require_order(self, channel: Channel, now: SeenChannel, source: str) -> None:
        """`now`: what would be remembered. Its epoch is at least the known one, since its root keys continue from there."""
        known = self.seen if self.seen and len(self.seen.roots) == len(now.roots) else None
        if known is not None and now.serial < known.serial:
            raise RollbackError(f"{source} has number {now.serial} of {channel.issued}; {known.serial} was seen before")
        if known is not None and now.serial == known.serial and now.digest != known.digest:
            raise EquivocationError(f"{source} has number {now.serial}, which was seen before with other content")
        most = MAX_FIRST if known is None else known.serial + MAX_JUMP
        if now.serial > most:
            before = "none was seen before" if known is None else f"{known.serial} was seen before"
            raise SerialJumpError(f"{source} has number {now.serial}; {before}, and at most {most} could follow")

    def _require_time(self, channel: Channel, source: str) -> None:
        issued, now = (datetime.strptime(text, TIME_FORMAT) for text in (channel.issued, self.now))  # noqa: DTZ007 - UTC
        if (issued - now).total_seconds() > CLOCK_TOLERANCE:
            raise ClockError(f"{source} was issued at {channel.issued}; this machine's clock says that it is {self.now}")
        if channel.expires <= self.now and not self.allow_expired:
            raise ExpiredError(f"{source}, number {channel.serial}, expired at {channel.expires}; now it is {self.now}")


def inherit(policy: Policy, roots: tuple[PublicKey, ...]) -> Policy:
    """Puts the current root key of a channel in place of the trusted key from which it descends.

    Args:
        policy: The user's policy.
        roots: The root keys of the channel, the current one last.

    Returns:
        The policy in which the current key counts where the trusted one did.
    """
    heir = roots[-1]
    trusted = next((found for key in reversed(roots) if (found := policy.find(key.key_id))), None)
    if trusted is None or trusted.key == heir:
        return policy
    old = trusted.key.key_id
    rules = tuple(replace(r, keys=tuple(heir.key_id if text == old else text for text in r.keys)) for r in policy.rules)
    return Policy(tuple(replace(t, key=heir) if t is trusted else t for t in policy.keys), rules)


def latest(channel: Channel) -> ListedPack | None:
    """Finds the version that every model should have.

    Args:
        channel: The channel.

    Returns:
        The highest active version, a prerelease only where nothing else is active; None when no version is active.
    """
    active = [pack for pack in channel.packs if pack.status is ListedStatus.ACTIVE]
    finished = [pack for pack in active if not pack.order.prerelease]
    return max(finished or active, key=lambda pack: pack.order, default=None)


def choose(channel: Channel, version: str | None = None) -> ListedPack:
    """Finds a version.

    Args:
        channel: The channel.
        version: Its number; None: the latest.

    Returns:
        The entry of the version.

    Raises:
        VersionError: There is no such version, or none is active.
        YankedError: The version was yanked.
    """
    if version is None:
        found = latest(channel)
        if found is None:
            raise VersionError(f"no version of {channel.name} is active", advice="Wait for the publisher's next version.")
        return found
    for pack in channel.packs:
        if pack.version == version:
            if pack.status is ListedStatus.YANKED:
                raise YankedError(f"{pack.label} was yanked by its publisher: {pack.reason or 'no reason given'}")
            return pack
    known = ", ".join(pack.version for pack in channel.packs if pack.status is not ListedStatus.YANKED) or "none"
    raise VersionError(f"{channel.name} has no version {version}", advice=f"Available versions: {known}.")


@dataclass(frozen=True)
class Stay:
    """Nothing to do."""


@dataclass(frozen=True)
class Upgrade:
    """Go to a higher version, or apply the first one."""

    pack: ListedPack


@dataclass(frozen=True)
class GoBack:
    """The applied version was yanked."""

    pack: ListedPack | None
    """What to apply instead; None: no version is left, go to the base."""
    reason: str


Decision: TypeAlias = Stay | Upgrade | GoBack


def decide(channel: Channel, applied: tuple[str, str] | None) -> Decision:
    """What a model that follows the channel should do.

    Args:
        channel: The channel.
        applied: (version, pack id) of the channel's pack in the model; None: not applied.

    Returns:
        The decision.
    """
    best = latest(channel)
    if applied is None:
        return Stay() if best is None else Upgrade(best)
    version, pack_id = applied
    yanked = next((p for p in channel.packs if p.file.sha256 == pack_id and p.status is ListedStatus.YANKED), None)
    if best is not None and (Version.parse(version) < best.order or pack_id in best.supersedes):
        return Upgrade(best)
    return Stay() if yanked is None else GoBack(best, yanked.reason)


def require_as_listed(pack: ListedPack, manifest: Manifest, address: str) -> None:
    """Checks that a pack is what the channel states.

    Args:
        pack: The entry in the channel.
        manifest: The manifest of the pack that was downloaded.
        address: Address of the channel, for messages.

    Raises:
        SwappedFileError: Name, version or base differ.
    """
    listed = (pack.name, pack.version, pack.base_sha256)
    if (manifest.name, manifest.version, base_digest(manifest)) != listed:
        raise SwappedFileError(
            f"{address} lists {pack.label} for {pack.base_model}, but contains {manifest.name} {manifest.version} "
            f"for {manifest.base.model_id} there"
        )
