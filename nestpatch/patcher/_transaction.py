"""One change of a model: all of its steps happen, or none.

Order on disk: journal (synced) -> rows and undo records (synced) -> ledger (renamed: this is the commit) -> journal removed.
A process that dies before the commit leaves a journal by which the rows are rolled back. A process that dies after the commit
leaves the journal of a transaction that the ledger names already: it is only removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.errors import BusyError, InPlaceError, JournalError, OutputError, OverlapError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import new_place, sync_folder
from nestpatch.files.copying import copy_file
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.pack import utc_now
from nestpatch.patcher._journal import Region, read_journal, remove_journal, write_journal
from nestpatch.patcher._rollback import files_of, roll_back, sync_files
from nestpatch.patcher._row_writer import RowWriter
from nestpatch.patcher.chain import Action, Link, Step
from nestpatch.patcher.copies import fingerprint
from nestpatch.patcher.kept import keep
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger, write_ledger
from nestpatch.patcher.merge import QuantizedMerge, require_retention
from nestpatch.patcher.plan import make_plan, measure
from nestpatch.patcher.recovery import remove_temporary_files, remove_undo_records, require_writable
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.steps import PlannedSteps
from nestpatch.rows import united
from nestpatch.signing.subject import Origin


def detach(checkpoint: Checkpoint) -> Checkpoint:
    """Copies each weight file that is a link or has other names; the copy replaces the link in one step.

    The copy keeps mode, owner, times and extended attributes where this user may set them.

    Args:
        checkpoint: The model.

    Returns:
        The model, opened again.

    Raises:
        BusyError: A file was changed under its other name while it was copied. The link is then left in place.
        OutputError: A copy cannot be written.
    """
    for file in checkpoint.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            with new_place(file, overwrite=True) as sibling:
                before = fingerprint([file])
                copy_file(file, sibling)
                if fingerprint([file]) != before:
                    raise BusyError(f"{file.resolve()} was changed while it was copied")
                status = file.stat()
                if hasattr(os, "chown"):
                    with suppress(PermissionError):
                        os.chown(sibling, status.st_uid, status.st_gid)
                shutil.copystat(file, sibling)
                # The only difference: the model's own file must be writable for its owner.
                sibling.chmod(status.st_mode & 0o7777 | 0o200)
                with open(sibling, "rb") as handle:
                    os.fsync(handle.fileno())
    return checkpoint.reopen(checkpoint.path)


@dataclass(eq=False)
class Transaction:
    """A change of a model. The lock must be held, and no journal may be left."""

    state_dir: StateDir
    checkpoint: Checkpoint
    planned: PlannedSteps
    """The steps, their packs, and what the rows lack already."""
    allow_base_mismatch: bool = False
    on_event: OnEvent = ignore
    journaled: bool = True
    """False for a copy, which is thrown away when anything fails."""
    quantized: QuantizedMerge = field(default_factory=QuantizedMerge)
    """How quantized rows are computed."""
    detach: bool = False
    """Whether links are replaced with copies first."""
    final: StateDir | None = None
    """Where the state will be in the end, for a copy that gets its name when it is complete."""

    def run(self, ledger: Ledger) -> Ledger:
        """Carries out the steps.

        Args:
            ledger: What is applied now.

        Returns:
            The new ledger, which has been written.

        Raises:
            BaseMismatchError: Rows are not the base of a pack, or not what an undone pack left. The model is as before.
            UndoError: An undo record is damaged or missing. The model is as before.
            InPlaceError: The files cannot be changed where they are. The message says whether the change was committed.
            JournalError: The change failed and could not be rolled back. The journal is left.
        """
        # glibc then reuses freed blocks of up to this size instead of unmapping them, which saves a fifth of the time
        # (bench/patch.py): its threshold is the size of the largest freed block. This one is never touched: it costs no memory.
        np.empty((32 << 20) - (64 << 10), np.uint8)
        identity, names, steps = secrets.token_hex(8), sorted(self.planned.tensor_names), self.planned.steps
        before = {entry.pack_id: entry for entry in ledger.applied}
        self._prepare(names)
        makes = tuple(f"{identity}-{s.link.pack_id[:16]}" for s in steps if s.action in (Action.APPLY, Action.REDO))
        retires = tuple(entry.undo for entry in ledger.applied if entry.pack_id in self.planned.undone)
        if self.journaled:
            self._open_journal(identity, makes, retires)
        try:
            for number, step in enumerate(steps):
                # The first check was made by `_prepare`, under the same lock. A copy is newer than that: it is checked again.
                if number == 0 and step.action is Action.CHECK and self.journaled:
                    continue
                ledger = self._do(step, ledger, identity, before)
            if self.journaled:
                sync_files(files_of(self.checkpoint, names))
                sync_folder(self.state_dir.folder)
            ledger = replace(ledger, transaction=identity).following(self.planned.origin.channel)
            write_ledger(self.state_dir, ledger, self.final)
        except BaseException as error:
            if self.journaled:
                self._close_journal(error, identity, makes)
            raise
        # Committed: what cannot be removed now is removed by the next recovery.
        remove_undo_records(self.state_dir, retires)
        if self.journaled:
            with suppress(OSError):
                remove_journal(self.state_dir.journal)
        remove_temporary_files(self.state_dir, self.checkpoint)
        return ledger

    def check_first(self) -> None:
        """Makes the check that the change begins with, if it begins with one: the most common error is a wrong base.

        Raises:
            BaseMismatchError: The model is not the base of the pack.
            QuantizationError: Quantized rows would lose the pack's change.
        """
        if self.planned.steps and self.planned.steps[0].action is Action.CHECK:
            self._check(self.planned.steps[0].link)

    def _prepare(self, names: Sequence[str]) -> None:
        """Makes all checks that precede the first write, then replaces links if that was requested."""
        if not self.detach:
            require_writable(self.checkpoint, names)
        self.check_first()
        if self.detach:
            self.checkpoint = detach(self.checkpoint)
            require_writable(self.checkpoint, names)
            # The lock of this model does not cover the other names of its files: they may have been changed meanwhile.
            self.check_first()

    def _open_journal(self, identity: str, makes: Sequence[str], retires: Sequence[str]) -> None:
        """Writes the journal of the rows that the steps touch, each tensor once."""
        touched: dict[str, list[Any]] = {}
        for pack_id in dict.fromkeys(step.link.pack_id for step in self.planned.steps):
            for delta in self.planned.packs[pack_id]:
                touched.setdefault(delta.name, []).append(delta.rows.astype(np.int64))
        unions = {name: united(rows) if len(rows) > 1 else rows[0] for name, rows in touched.items()}
        regions = [Region(self.checkpoint.info(name), rows) for name, rows in sorted(unions.items())]
        try:
            write_journal(self.state_dir, identity, self.checkpoint, regions, makes=makes, retires=retires)
        except OSError as error:
            with suppress(OSError):
                remove_journal(self.state_dir.journal)
            raise InPlaceError(f"cannot write the journal {self.state_dir.journal}: {error.strerror}") from error

    def _close_journal(self, cause: BaseException, identity: str, makes: Sequence[str]) -> None:
        """Rolls the rows back after an error, unless the change was committed."""
        if read_ledger(self.state_dir).transaction == identity:
            # Only what follows the commit failed: the next command that writes does it again.
            if isinstance(cause, (OSError, OutputError)):
                raise InPlaceError(
                    f"the change is made, but the disk did not confirm it: {cause}",
                    advice="When the disk works again, `nestpatch verify MODEL` shows which state the model is in.",
                ) from cause
            return
        try:
            journal = read_journal(self.state_dir)
            if journal is not None:
                roll_back(journal, self.checkpoint)
            remove_undo_records(self.state_dir, makes)
            remove_journal(self.state_dir.journal)
            remove_temporary_files(self.state_dir, self.checkpoint)
        except OSError as error:
            raise JournalError(
                f"the change failed ({cause}), and could not be rolled back now: {error.strerror}",
                advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the disk works again.",
            ) from cause
        if isinstance(cause, OSError):
            raise InPlaceError(f"cannot change the model: {cause.strerror or cause}") from cause

    @property
    def _writer(self) -> RowWriter:
        return RowWriter(self.checkpoint, self.quantized, self.journaled, self.on_event, self.state_dir.owner)

    def _do(self, step: Step, ledger: Ledger, identity: str, before: Mapping[str, LedgerEntry]) -> Ledger:
        now = utc_now()
        if step.action is Action.CHECK:
            self._check(step.link)
            return ledger
        if step.action is Action.UNDO:
            entry = next(entry for entry in ledger.applied if entry.link == step.link)
            gone = self.planned.missing.get(entry.pack_id, frozenset())
            self._writer.restore(self.planned.packs[entry.pack_id], entry, self.state_dir.undo(entry.undo), gone)
            kept = tuple(other for other in ledger.applied if other is not entry)
            return replace(ledger, applied=kept).with_event("found missing" if gone else "undone", entry, now)
        old = before[step.link.pack_id] if step.action is Action.REDO else None
        entry = self._apply(step.link, identity, now, old)
        return replace(ledger, applied=(*ledger.applied, entry)).with_event("applied", entry, now)

    def _check(self, link: Link) -> None:
        """Checks that a pack can be applied to the model as it is now."""
        pack = self.planned.packs[link.pack_id]
        make_plan(pack, self.checkpoint, link.strength, allow_mismatch=self.allow_base_mismatch, base=self.quantized.base)
        for codec in {self.checkpoint.info(delta.name).coding for delta in pack}:
            codec.require()
        if self.quantized.base is None:
            require_retention(measure(pack, link.strength, self.checkpoint, self.quantized), pack.label)

    def _apply(self, link: Link, identity: str, now: str, old: LedgerEntry | None) -> LedgerEntry:
        """Writes the rows of a pack. `old`: its entry so far, if it is applied again on top of another pack."""
        pack = self.planned.packs[link.pack_id]
        if old is not None:
            # Quantized rows are computed from the base and one pack, so they would lose what another pack added.
            quantized = [delta.name for delta in pack if not self.checkpoint.info(delta.name).plain]
            if quantized:
                raise OverlapError(
                    f"{quantized[0]} is stored quantized: packs that share rows cannot be stacked in it",
                    advice="Revert the other pack first, or apply both to the float model and quantize it again.",
                )
        entry = LedgerEntry(
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
            signers=old.signers if old else self.planned.origin.signers,
            roots=old.roots if old else self.planned.origin.roots,
            foreign=bool(old and old.foreign),
        )
        keep(self.state_dir, pack, link.pack_id, Origin() if old else self.planned.origin)
        entry = replace(entry, tensors=self._writer.merge(pack, link.strength, self.state_dir.undo(entry.undo)))
        return replace(entry, rounding=self.quantized.source) if entry.retention is not None else entry
