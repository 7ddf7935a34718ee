"""One change of a model in place: all of its steps happen, or none.

Order on disk: journal (synced) -> rows and undo records (synced) -> ledger (renamed: this is the commit) -> journal removed.
A process that dies before the commit leaves a journal that rolls the rows back; one that dies after it leaves a journal of a
transaction that the ledger already names, which is then just removed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.errors import InPlaceError, JournalError, OutputError, OverlapError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import sync_folder
from nestpatch.formats.interface import Checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.chain import Do, Link, Step
from nestpatch.patcher.changes import Changer
from nestpatch.patcher.journal import Region, remove_journal, roll_back, sync_files, write_journal
from nestpatch.patcher.ledger import Entry, Ledger, read_ledger, write_ledger
from nestpatch.patcher.merging import Means, require_gain
from nestpatch.patcher.place import Place
from nestpatch.patcher.plan import make_plan, measure
from nestpatch.patcher.recovery import sweep
from nestpatch.signing.origin import Origin


def require_writable(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Raises InPlaceError when a file with these tensors is a link, has other names, or cannot be written."""
    for file in sorted({file for name in names for file in checkpoint.info(name).files}):
        if file.is_symlink():
            raise InPlaceError(
                f"{file} is a link to {file.resolve()}, as in a Hub cache: changing it would change other models too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to replace the link by a file of its own first.",
            )
        if file.stat().st_nlink > 1:
            raise InPlaceError(
                f"{file} has another name elsewhere (a hard link): changing it would change that model too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to give the model a file of its own first.",
            )
        if not os.access(file, os.R_OK | os.W_OK):
            raise InPlaceError(f"{file} cannot be written by this user")


def _keep_heap() -> None:
    """Makes glibc reuse freed blocks of up to this size instead of unmapping them: a fifth less time (bench/patch.py).

    Its threshold follows the largest block that was freed; this one is never touched, so it costs no memory.
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)


@dataclass(eq=False)
class Transaction:
    """A change under way. The lock must be held, and leftovers recovered."""

    place: Place
    checkpoint: Checkpoint
    packs: Mapping[str, Pack]
    """Pack id -> pack, for every step."""
    allow_base_mismatch: bool = False
    on_event: OnEvent = ignore
    journaled: bool = True
    """False where the files are nobody's yet: a copy that is thrown away when anything fails."""
    means: Means = field(default_factory=Means)
    """For rows that are stored quantized."""
    origin: Origin = field(default_factory=Origin)
    """Of the pack that is applied; what is only put back keeps its own."""

    @property
    def _changer(self) -> Changer:
        return Changer(self.checkpoint, self.means, self.journaled, self.on_event)

    def run(self, ledger: Ledger, steps: Sequence[Step]) -> Ledger:
        """Carries the steps out and returns the new ledger.

        Raises BaseMismatchError, UndoError or InPlaceError; then everything is as before.
        """
        _keep_heap()
        identity, before = secrets.token_hex(8), {entry.pack_id: entry for entry in ledger.applied}
        names = {delta.name for step in steps for delta in self.packs[step.link.pack_id]}
        require_writable(self.checkpoint, sorted(names))
        if steps and steps[0].do is Do.CHECK:
            # The common case: a wrong base is refused before anything is written anywhere.
            self.check(steps[0].link)
        if self.journaled:
            self._open_journal(identity, steps)
        try:
            for number, step in enumerate(steps):
                # A check that comes first has been made, under the same lock. A copy is checked again: it was made since.
                if number == 0 and step.do is Do.CHECK and self.journaled:
                    continue
                ledger = self._do(step, ledger, identity, before)
            if self.journaled:
                sync_files(sorted({file for name in names for file in self.checkpoint.info(name).files}))
                sync_folder(self.place.folder)
            ledger = replace(ledger, transaction=identity).following(self.origin.channel)
            write_ledger(self.place.ledger, ledger)
        except BaseException as error:
            if self.journaled:
                self._close_journal(error, identity)
            raise
        if self.journaled:
            # Committed: a journal that cannot be removed now is removed by the next command.
            with suppress(OSError):
                remove_journal(self.place.journal)
        sweep(self.place, self.checkpoint, ledger)
        return ledger

    def _open_journal(self, identity: str, steps: Sequence[Step]) -> None:
        try:
            write_journal(self.place.journal, identity, self.checkpoint, self._regions(steps))
        except OSError as error:
            with suppress(OSError):
                remove_journal(self.place.journal)
            raise InPlaceError(f"cannot write the journal {self.place.journal}: {error.strerror}") from error

    def _close_journal(self, cause: BaseException, identity: str) -> None:
        if read_ledger(self.place.ledger).transaction == identity:
            # The commit stands; only what follows it failed, and the next command does that.
            if isinstance(cause, (OSError, OutputError)):
                raise InPlaceError(
                    f"the change is made, but the disk did not confirm it: {cause}",
                    advice="When the disk works again, `nestpatch verify MODEL` tells which state the model is in.",
                ) from cause
            return
        try:
            roll_back(self.place.journal, self.checkpoint)
            remove_journal(self.place.journal)
            sweep(self.place, self.checkpoint, read_ledger(self.place.ledger))
        except OSError as error:
            raise JournalError(
                f"the change failed ({cause}), and could not be rolled back now: {error.strerror}",
                advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the disk works again.",
            ) from cause
        if isinstance(cause, OSError):
            raise InPlaceError(f"cannot change the model: {cause.strerror or cause}") from cause

    def _regions(self, steps: Sequence[Step]) -> list[Region]:
        """The rows that the steps touch, each tensor once."""
        touched: dict[str, list[Any]] = {}
        for pack_id in dict.fromkeys(step.link.pack_id for step in steps):
            for delta in self.packs[pack_id]:
                touched.setdefault(delta.name, []).append(delta.rows.astype(np.int64))
        unions = {name: np.unique(np.concatenate(rows)) if len(rows) > 1 else rows[0] for name, rows in touched.items()}
        return [Region(self.checkpoint.info(name), rows) for name, rows in sorted(unions.items())]

    def _do(self, step: Step, ledger: Ledger, identity: str, before: Mapping[str, Entry]) -> Ledger:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if step.do is Do.CHECK:
            self.check(step.link)
            return ledger
        if step.do is Do.UNDO:
            entry = next(entry for entry in ledger.applied if entry.link == step.link)
            self._changer.restore(self.packs[entry.pack_id], entry, self.place.undo(entry.undo))
            kept = tuple(other for other in ledger.applied if other is not entry)
            return replace(ledger, applied=kept).with_event("undone", entry, now)
        if step.do is Do.REDO:
            self._require_floats(step.link)
        old = before.get(step.link.pack_id) if step.do is Do.REDO else None
        entry = self._apply(step.link, identity, now, old)
        return replace(ledger, applied=(*ledger.applied, entry)).with_event("applied", entry, now)

    def _require_floats(self, link: Link) -> None:
        """Quantized rows are made of the base and one pack; what another one added to them would be lost."""
        names = (delta.name for delta in self.packs[link.pack_id])
        if odd := next((name for name in names if not self.checkpoint.info(name).plain), None):
            raise OverlapError(
                f"{odd} is stored quantized: packs that share rows cannot be stacked in it",
                advice="Revert the other pack first, or apply both to the float model and quantize it anew.",
            )

    def check(self, link: Link) -> None:
        """Whether a pack can be applied to the model as it is now.

        Raises BaseMismatchError when that is not the pack's base, QuantizationError when quantized rows would lose the pack.
        """
        pack = self.packs[link.pack_id]
        make_plan(pack, self.checkpoint, link.strength, allow_mismatch=self.allow_base_mismatch, base=self.means.base)
        for codec in {self.checkpoint.info(delta.name).coding for delta in pack}:
            codec.require()
        if self.means.base is None:
            require_gain(measure(pack, link.strength, self.checkpoint, self.means), pack.label)

    def _apply(self, link: Link, identity: str, now: str, old: Entry | None) -> Entry:
        pack = self.packs[link.pack_id]
        entry = Entry(
            pack_id=link.pack_id,
            name=link.name,
            version=link.version,
            strength=link.strength,
            when=now,
            tool=f"nestpatch {__version__}",
            transaction=identity,
            tensors={},
            supersedes=link.supersedes,
            requires=link.requires,
            base_mismatch_allowed=self.allow_base_mismatch or bool(old and old.base_mismatch_allowed),
            signers=old.signers if old else self.origin.signers,
        )
        kept = self.place.pack(link.pack_id)
        if not kept.exists():
            nest.write(pack, kept)
        entry = replace(entry, tensors=self._changer.merge(pack, link.strength, self.place.undo(entry.undo)))
        return replace(entry, rounding=self.means.told) if entry.gain is not None else entry
