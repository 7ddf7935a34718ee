"""Bringing a model to what its channels want, each channel in one transaction. Nothing is applied unproven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import ChannelError, FileSystemError, NestpatchError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.interface import Checkpoint
from nestpatch.gate import passed
from nestpatch.hub.channel import Decision, GoBack, Stay, decide
from nestpatch.hub.client import shown
from nestpatch.hub.follow import Followed, download, follow
from nestpatch.hub.sources import open_source
from nestpatch.patcher.inplace import apply_in_place, follow_channel, revert
from nestpatch.patcher.ledger import Entry, read_ledger
from nestpatch.patcher.recovery import open_model
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
    **means: Any,
) -> tuple[Updated, ...]:
    """Brings a model to what its channels want, each in one transaction. With `check`, only tells.

    `channels`: places, without versions; none: those that the model follows. `means` go to `apply_in_place`: base, dither,
    allow_overlap, on_event. All channels are tried: one that is refused or cannot be reached is reported as "failed", for
    whatever `follow`, `download` and `apply_in_place` raise, and the model is as the channels before it left it.
    Raises ChannelError when the model follows no channel, DataError for a text that names no place.
    """
    _, place = open_model(model)
    ledger = read_ledger(place.ledger)
    # What was typed may hold credentials; a place does not.
    typed = {source.place: source for source in map(open_source, channels)}
    wanted = list(typed) or ledger.follows
    if not wanted:
        advice = (
            "Name one with --channel owner/name, or apply a version of one: nestpatch apply MODEL hub://owner/name --in-place"
        )
        raise ChannelError(f"{model} follows no channel", advice=advice)
    results = []
    for channel in dict.fromkeys(wanted):
        try:
            followed = follow(typed.get(channel) or open_source(channel), policy, model, allow_unsigned=allow_unsigned)
            entry = next((entry for entry in read_ledger(place.ledger).applied if entry.name == followed.patch_id), None)
            results.append(_bring(Path(model), followed, entry, check=check, **means))
        except (NestpatchError, OSError) as error:
            results.append(_failed(channel, error))
    return tuple(results)


def _failed(channel: str, error: NestpatchError | OSError) -> Updated:
    named = error if isinstance(error, NestpatchError) else FileSystemError(str(error))
    return Updated(shown(channel), "failed", "", "", str(named), error=type(named).__name__, advice=named.advice)


def _bring(model: Path, followed: Followed, entry: Entry | None, *, check: bool, **means: Any) -> Updated:
    channel, place = followed.admitted.channel, followed.source.place
    decision = decide(channel, (entry.version, entry.pack_id) if entry else None)
    before = entry.version if entry else ""
    target = decision.patch if not isinstance(decision, Stay) else None
    after = before if isinstance(decision, Stay) else target.version if target else ""
    reason = decision.reason if isinstance(decision, GoBack) else ""
    steps: tuple[str, ...] = ()
    if not check:
        steps = _carry_out(model, followed, entry, decision, **means)
    state = "current" if isinstance(decision, Stay) else "available" if check else "updated"
    return Updated(place, state, before, after, reason, steps, channel.serial, channel.expires)


def _carry_out(
    model: Path,
    followed: Followed,
    entry: Entry | None,
    decision: Decision,
    *,
    base: Checkpoint | None = None,
    dither: bool = False,
    allow_overlap: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[str, ...]:
    if isinstance(decision, Stay):
        follow_channel(model, followed.source.place)
        return ()
    if decision.patch is None:
        return revert(model, base=base, dither=dither, only=entry.pack_id if entry else None, on_event=on_event).steps
    new = passed(download(followed, decision.patch, on_event=on_event))
    return apply_in_place(
        model,
        new,
        strength=entry.strength if entry else 1.0,
        allow_downgrade=isinstance(decision, GoBack),
        allow_overlap=allow_overlap,
        base=base,
        dither=dither,
        on_event=on_event,
    ).steps
