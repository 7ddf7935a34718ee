"""The verb `update`: bringing a model to what its channels offer, each channel in one transaction.

Every pack passes the gate before it is applied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.channels.follow import Followed, download, follow
from nestpatch.channels.rules import Decision, GoBack, Stay, Upgrade, choose, decide
from nestpatch.channels.shared import SharedReader, SharedReaders, Stop
from nestpatch.errors import ChannelError, NestpatchError, PublisherError, named
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import passed, policy_of
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
    """The result of one channel for a model."""

    address: str
    """Of the channel."""
    state: str
    """"current": nothing to do; "available": `check` found something to do; "updated"; "failed": see `error`."""
    before: str
    """The version of the channel's pack that was applied; empty for none, and after a failure."""
    after: str
    """The version that is applied now, or should be; empty for the base, and after a failure."""
    reason: str = ""
    """Why the applied version was yanked; why the update failed."""
    steps: tuple[str, ...] = ()
    serial: int = 0
    expires: str = ""
    error: str = ""
    """Name of the error class in errors.py; empty without a failure."""
    advice: str = ""
    """What to do about the failure."""

    def as_json(self) -> dict[str, Any]:
        """The channel for `--json`."""
        return {
            "address": self.address,
            "state": self.state,
            "before": self.before,
            "after": self.after,
            "reason": self.reason,
            "steps": list(self.steps),
            "serial": self.serial,
            "expires": self.expires,
            "error": self.error,
            "advice": self.advice,
        }


def update(
    model: str | Path,
    channels: Sequence[str] = (),
    *,
    policy: Policy | None = None,
    check: bool = False,
    allow_unsigned: bool = False,
    allow_overlap: bool = False,
    base: Checkpoint | None = None,
    dither: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[Updated, ...]:
    """Brings a model to what its channels offer, each channel in one transaction.

    All channels are tried. One that is refused or cannot be reached is returned as "failed", with the error that `follow`,
    `download` or `apply_in_place` raised, and the model is as the channels before it left it.

    Args:
        model: The model to patch in place.
        channels: Channels without versions; empty means those that the model follows.
        policy: Whose signatures count; None means the policy of this user and this machine.
        check: Only reports what there is to do, and changes nothing.
        allow_unsigned: Accepts channels and packs that too few trusted keys have signed.
        allow_overlap: Adds a pack to others that change the same rows.
        base: The float model, to make quantized rows from exactly.
        dither: Adds noise before quantized rows are rounded.
        on_event: Receives progress.

    Returns:
        One value per channel.

    Raises:
        ChannelError: The model follows no channel, and none was given.
        DataError: A text does not name a channel.
        CheckpointError: The model cannot be read.
        StateError: The ledger is broken, or an interrupted change cannot be ended.
    """
    readers = SharedReaders(Stop())
    given = list(map(readers.open, channels))
    task = Task(policy_of(policy), check, allow_unsigned, allow_overlap, base, dither, on_event)
    return task.update(Path(model), given, readers)


@dataclass(frozen=True, eq=False)
class Task:
    """What is the same for all models that are updated together: the arguments of `update`."""

    policy: Policy
    check: bool = False
    allow_unsigned: bool = False
    allow_overlap: bool = False
    base: Checkpoint | None = None
    dither: bool = False
    on_event: OnEvent = ignore

    def update(self, model: Path, given: Sequence[SharedReader], readers: SharedReaders) -> tuple[Updated, ...]:
        """Brings one model to what its channels offer.

        Args:
            model: The model to patch in place.
            given: The channels, of `readers`; empty means those that the model follows.
            readers: The readers of the command.

        Returns:
            One value per channel.

        Raises:
            NestpatchError: As `update`.
        """
        if not self.check and os.path.lexists(state_dir_of(model).journal):
            recover_model(model, policy=self.policy)
        open_checkpoint(model)
        work = _Work(self, model)
        ledger = work.ledger()
        wanted = dict.fromkeys([reader.address for reader in given] or ledger.follows)
        if not wanted:
            raise _follows_nothing(model, ledger)
        for channel in wanted:
            with suppress(NestpatchError):  # raised again below
                readers.open(channel).begin()
        results = []
        for channel in wanted:
            try:
                # A channel as given may contain credentials; its address does not, and leads to the reader that has them.
                followed = follow(readers.open(channel), self.policy, model, allow_unsigned=self.allow_unsigned)
                results.append(work.bring(followed))
            except (NestpatchError, OSError) as error:
                why = named(error)
                failed = Updated(shown(channel), "failed", "", "", str(why), error=type(why).__name__, advice=why.advice)
                results.append(failed)
        return tuple(results)


def _follows_nothing(model: str | Path, ledger: Ledger) -> ChannelError:
    if ledger.offered:
        return ChannelError(
            f"{model} follows no channel: its ledger came with the model and names {', '.join(ledger.offered)}, "
            "which was not contacted because this user has not agreed to follow it",
            advice="If you want its updates: nestpatch update MODEL --channel CHANNEL",
        )
    advice = "Name one with --channel owner/name, or apply a version of one: nestpatch apply MODEL hub://owner/name --in-place"
    return ChannelError(f"{model} follows no channel", advice=advice)


@dataclass(frozen=True, eq=False)
class _Work:
    """An update of one model: what is the same for all of its channels."""

    task: Task
    model: Path

    def ledger(self) -> Ledger:
        """The ledger; with `check`, of a model in which no change was interrupted."""
        return read_ledger(open_model(self.model)[1] if self.task.check else state_dir_of(self.model))

    def bring(self, followed: Followed) -> Updated:
        """Brings the model to what one channel offers. Its errors become results of `update`."""
        channel, address = followed.accepted.channel, followed.reader.address
        entry = self._applied(followed)
        decision = decide(channel, (entry.version, entry.pack_id) if entry else None)
        reason = decision.reason if isinstance(decision, GoBack) else ""
        if isinstance(decision, Stay) and entry is not None and (lack := self._lack(entry)):
            decision, reason = Upgrade(choose(channel, entry.version)), lack
        before = entry.version if entry else ""
        target = decision.pack if not isinstance(decision, Stay) else None
        after = before if isinstance(decision, Stay) else target.version if target else ""
        steps = () if self.task.check else self._carry_out(followed, entry, decision)
        state = "current" if isinstance(decision, Stay) else "available" if self.task.check else "updated"
        return Updated(address, state, before, after, reason, steps, channel.serial, channel.expires)

    def _applied(self, followed: Followed) -> LedgerEntry | None:
        """The entry of the channel's pack, which must be of the channel's own publisher. Raises PublisherError."""
        packs = followed.accepted.channel.packs  # all of one name
        entry = next((entry for entry in self.ledger().applied if packs and entry.name == packs[0].name), None)
        if entry is None:
            return None
        listed = entry.pack_id in {pack.file.sha256 for pack in packs}
        roots = {key.key_id for key in followed.accepted.line}
        publishers = Judge(self.task.policy, self.model).publishers(state_dir_of(self.model), entry)
        # A channel can list another publisher's pack, and then withdraw it.
        if roots & publishers or (listed and not publishers):
            return entry
        address = followed.reader.address
        lack = "another publisher signed" if publishers else f"{address} never published"
        raise PublisherError(
            f"the ledger of {self.model} names {entry.label} (sha256 {entry.pack_id[:12]}..), which {lack}: "
            f"{address} may not change it",
            advice="Revert it first (nestpatch revert MODEL), then update again.",
        )

    def _lack(self, entry: LedgerEntry) -> str:
        """Why an applied pack has to be applied again; empty where the rows hold it as they should.

        Raises BaseMismatchError where they hold neither the pack nor what was there before.
        """
        checkpoint, state_dir = open_model(self.model)
        applied = read_ledger(state_dir).applied
        if entry.pack_id in missing(look(checkpoint, state_dir, applied, load_packs(state_dir, applied), self.task.base)):
            return "its rows were not in the model"
        if entry.foreign and entry.strength != 1:
            return f"it came with the model at strength {entry.strength:g}, which this user has not chosen"
        return ""

    def _carry_out(self, followed: Followed, entry: LedgerEntry | None, decision: Decision) -> tuple[str, ...]:
        if isinstance(decision, Stay):
            follow_channel(self.model, followed.reader.address, self.task.policy)
            return ()
        if decision.pack is None:
            only = entry.pack_id if entry else None
            return revert(
                self.model,
                policy=self.task.policy,
                base=self.task.base,
                dither=self.task.dither,
                only=only,
                on_event=self.task.on_event,
            ).steps
        done = download(followed, decision.pack, on_event=self.task.on_event)
        return apply_in_place(
            self.model,
            passed(done.result, done.origin),
            policy=self.task.policy,
            # The strength that a user of this machine once chose, else in full.
            strength=entry.strength if entry is not None and not entry.foreign else 1.0,
            allow_downgrade=isinstance(decision, GoBack),
            allow_overlap=self.task.allow_overlap,
            base=self.task.base,
            dither=self.task.dither,
            on_event=self.task.on_event,
        ).steps
