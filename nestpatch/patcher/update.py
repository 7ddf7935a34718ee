"""Bringing a model to what its channels want, each channel in one transaction. Nothing is applied unproven."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.channels.follow import Followed, download, follow
from nestpatch.channels.readers import open_reader
from nestpatch.channels.rules import Decision, GoBack, Stay, Upgrade, choose, decide
from nestpatch.errors import ChannelError, FileSystemError, NestpatchError, PublisherError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import passed
from nestpatch.hub.client import shown
from nestpatch.patcher.held import look, missing
from nestpatch.patcher.inplace import apply_in_place, follow_channel, revert
from nestpatch.patcher.kept import load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model, recover_model
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.steps import Judge
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class Updated:
    """What one channel meant for a model."""

    channel: str
    state: str
    """"current": nothing to do; "available": --check found something to do; "updated"; "failed": see `error`."""
    before: str
    """The version of the channel's patch that was applied; empty for none, and where it failed."""
    after: str
    """The one that is or should be; empty for the base, and where it failed."""
    reason: str = ""
    """Why the applied version was revoked; why it failed."""
    steps: tuple[str, ...] = ()
    serial: int = 0
    expires: str = ""
    error: str = ""
    """The class of errors.py that refused the channel, or could not reach it; empty where none did."""
    advice: str = ""
    """The way out of that."""


def update(
    model: str | Path,
    policy: Policy,
    channels: Sequence[str] = (),
    *,
    check: bool = False,
    allow_unsigned: bool = False,
    **quantized: Any,
) -> tuple[Updated, ...]:
    """Brings a model to what its channels want, each in one transaction. With `check`, only tells.

    `channels`: places, without versions; none: those that the model follows. `means` go to `apply_in_place`: base, dither,
    allow_overlap, on_event. All channels are tried: one that is refused or cannot be reached is reported as "failed", for
    whatever `follow`, `download` and `apply_in_place` raise, and the model is as the channels before it left it.
    Raises ChannelError when the model follows no channel, DataError for a text that names no place.
    """
    if not check and os.path.lexists(state_dir_of(model).journal):
        recover_model(model, policy=policy)
    open_checkpoint(model)
    ledger = _ledger_of(model, check=check)
    # What was typed may hold credentials; a place does not.
    typed = {reader.address: reader for reader in map(open_reader, channels)}
    wanted = list(typed) or ledger.follows
    if not wanted:
        raise _follows_nothing(model, ledger)
    results = []
    for channel in dict.fromkeys(wanted):
        try:
            followed = follow(typed.get(channel) or open_reader(channel), policy, model, allow_unsigned=allow_unsigned)
            results.append(_bring(Path(model), followed, policy, check=check, **quantized))
        except (NestpatchError, OSError) as error:
            results.append(_failed(channel, error))
    return tuple(results)


def _failed(channel: str, error: NestpatchError | OSError) -> Updated:
    named = error if isinstance(error, NestpatchError) else FileSystemError(str(error))
    return Updated(shown(channel), "failed", "", "", str(named), error=type(named).__name__, advice=named.advice)


def _ledger_of(model: str | Path, *, check: bool) -> Ledger:
    """The ledger; for a command that only looks, of a model in which no change was interrupted."""
    return read_ledger(open_model(model)[1] if check else state_dir_of(model))


def _follows_nothing(model: str | Path, ledger: Ledger) -> ChannelError:
    if ledger.offered:
        return ChannelError(
            f"the ledger that came with {model} names {', '.join(ledger.offered)}, and nobody here has agreed to follow that: "
            "nothing was asked of it",
            advice="If you want its updates: nestpatch update MODEL --channel PLACE",
        )
    advice = "Name one with --channel owner/name, or apply a version of one: nestpatch apply MODEL hub://owner/name --in-place"
    return ChannelError(f"{model} follows no channel", advice=advice)


def _bring(model: Path, followed: Followed, policy: Policy, *, check: bool, **quantized: Any) -> Updated:
    channel, place = followed.accepted.channel, followed.reader.address
    entry = _applied(model, followed, policy, check=check)
    decision = decide(channel, (entry.version, entry.pack_id) if entry else None)
    reason = decision.reason if isinstance(decision, GoBack) else ""
    if isinstance(decision, Stay) and entry is not None and (lack := _lack(model, entry, quantized.get("base"))):
        decision, reason = Upgrade(choose(channel, entry.version)), lack
    before = entry.version if entry else ""
    target = decision.pack if not isinstance(decision, Stay) else None
    after = before if isinstance(decision, Stay) else target.version if target else ""
    steps: tuple[str, ...] = ()
    if not check:
        steps = _carry_out(model, followed, entry, decision, policy, **quantized)
    state = "current" if isinstance(decision, Stay) else "available" if check else "updated"
    return Updated(place, state, before, after, reason, steps, channel.serial, channel.expires)


def _applied(model: Path, followed: Followed, policy: Policy, *, check: bool) -> LedgerEntry | None:
    """The entry of the channel's patch, which has to be of the channel's own publisher. Raises PublisherError."""
    entry = next((entry for entry in _ledger_of(model, check=check).applied if entry.name == followed.pack_name), None)
    if entry is None:
        return None
    listed = entry.pack_id in {pack.file.sha256 for pack in followed.accepted.channel.packs}
    roots = {key.key_id for key in followed.accepted.line}
    publishers = Judge(policy, model).publishers(state_dir_of(model), entry)
    # Anybody can list another publisher's pack, and then withdraw it.
    if roots & publishers or (listed and not publishers):
        return entry
    lack = "another publisher signed" if publishers else f"{followed.reader.address} never published"
    raise PublisherError(
        f"the ledger of {model} names {entry.label} (sha256 {entry.pack_id[:12]}..), which {lack}: "
        f"{followed.reader.address} has no say over it",
        advice="Take it off first: nestpatch revert MODEL. Then update again.",
    )


def _lack(model: Path, entry: LedgerEntry, base: Checkpoint | None) -> str:
    """Why an applied pack has to be applied again; empty where the rows hold it as they should.

    Raises BaseMismatchError where they hold neither it nor what was there before.
    """
    checkpoint, state_dir = open_model(model)
    applied = read_ledger(state_dir).applied
    if entry.pack_id in missing(look(checkpoint, state_dir, applied, load_packs(state_dir, applied), base)):
        return "its rows were not in the model"
    if entry.strength != _strength(entry):
        return f"it came with the model at strength {entry.strength:g}, which nobody here has asked for"
    return ""


def _strength(entry: LedgerEntry | None) -> float:
    """At which strength a channel's patch is applied: that which a user of this machine once chose, else in full."""
    return entry.strength if entry is not None and not entry.foreign else 1.0


def _carry_out(
    model: Path,
    followed: Followed,
    entry: LedgerEntry | None,
    decision: Decision,
    policy: Policy,
    *,
    base: Checkpoint | None = None,
    dither: bool = False,
    allow_overlap: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[str, ...]:
    if isinstance(decision, Stay):
        follow_channel(model, followed.reader.address, policy)
        return ()
    if decision.pack is None:
        only = entry.pack_id if entry else None
        return revert(model, policy=policy, base=base, dither=dither, only=only, on_event=on_event).steps
    new = passed(download(followed, decision.pack, on_event=on_event))
    return apply_in_place(
        model,
        new,
        policy=policy,
        strength=_strength(entry),
        allow_downgrade=isinstance(decision, GoBack),
        allow_overlap=allow_overlap,
        base=base,
        dither=dither,
        on_event=on_event,
    ).steps
