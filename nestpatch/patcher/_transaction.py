"""One change of a model in place: all of its steps happen, or none.

Order on disk: journal (synced) -> rows and undo records (synced) -> ledger (renamed: this is the commit) -> journal removed.
A process that dies before the commit leaves a journal that rolls the rows back; one that dies after it leaves a journal of a
transaction that the ledger already names, which is then just removed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.errors import BusyError, InPlaceError, JournalError, OutputError, OverlapError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import new_place, sync_folder
from nestpatch.files.copying import copy_file
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.patcher._journal import Region, files_of, read_journal, remove_journal, roll_back, sync_files, write_journal
from nestpatch.patcher._row_writer import RowWriter
from nestpatch.patcher.chain import Action, Link, Step
from nestpatch.patcher.kept import keep
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger, write_ledger
from nestpatch.patcher.merge import QuantizedMerge, require_retention
from nestpatch.patcher.plan import make_plan, measure
from nestpatch.patcher.recovery import require_writable, retire, sweep
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.steps import PlannedSteps
from nestpatch.signing.subject import Origin


def detach(checkpoint: Checkpoint) -> Checkpoint:
    """Copies each weight file that is a link or has other names; the copy takes the link's place at once.

    It keeps mode, owner, times and extended attributes, as far as this user may set them.

    Raises BusyError when a file was changed by its other name while it was copied; it is then as it was.
    """
    for file in checkpoint.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            with new_place(file, overwrite=True) as sibling:
                before = _state(file)
                copy_file(file, sibling)
                if _state(file) != before:
                    raise BusyError(f"{file.resolve()} was changed while it was copied")
                _copy_status(file, sibling)
                with open(sibling, "rb") as handle:
                    os.fsync(handle.fileno())
    return checkpoint.reopen(checkpoint.path)


def _state(file: Path) -> tuple[int, int, int]:
    """Changes when something is written to the file."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _copy_status(source: Path, target: Path) -> None:
    status = source.stat()
    if hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)
    # The one thing that changes: the model's own file has to be writable for its owner.
    target.chmod(status.st_mode & 0o7777 | 0o200)


def _keep_heap() -> None:
    """Makes glibc reuse freed blocks of up to this size instead of unmapping them: a fifth less time (bench/patch.py).

    Its threshold follows the largest block that was freed; this one is never touched, so it costs no memory.
    """
    np.empty((32 << 20) - (64 << 10), np.uint8)


@dataclass(eq=False)
class Transaction:
    """A change under way. The lock must be held, and leftovers recovered."""

    state_dir: StateDir
    checkpoint: Checkpoint
    planned: PlannedSteps
    """The steps, their packs, and what is missing in the rows already."""
    allow_base_mismatch: bool = False
    on_event: OnEvent = ignore
    journaled: bool = True
    """False where the files are nobody's yet: a copy that is thrown away when anything fails."""
    quantized: QuantizedMerge = field(default_factory=QuantizedMerge)
    """For rows that are stored quantized."""
    detach: bool = False
    """Whether links are replaced by files of the model's own first."""
    final: StateDir | None = None
    """Where the state will be in the end, for a copy that gets its name when it is complete."""

    @property
    def _changer(self) -> RowWriter:
        return RowWriter(self.checkpoint, self.quantized, self.journaled, self.on_event, self.state_dir.owner)

    def run(self, ledger: Ledger) -> Ledger:
        """Carries the steps out and returns the new ledger.

        Raises BaseMismatchError, UndoError or InPlaceError; then everything is as before.
        """
        _keep_heap()
        identity, before = secrets.token_hex(8), {entry.pack_id: entry for entry in ledger.applied}
        names, steps = sorted(self.planned.names), self.planned.steps
        self._prepare(names)
        retired = tuple(entry.undo for entry in ledger.applied if entry.pack_id in self.planned.undone)
        if self.journaled:
            self._open_journal(identity, retired)
        try:
            for number, step in enumerate(steps):
                # A check that comes first has been made, under the same lock. A copy is checked again: it was made since.
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
                self._close_journal(error, identity)
            raise
        # Committed: what cannot be removed now is removed by the next recovery.
        retire(self.state_dir, retired)
        if self.journaled:
            with suppress(OSError):
                remove_journal(self.state_dir.journal)
        sweep(self.state_dir, self.checkpoint)
        return ledger

    def check_first(self) -> None:
        """The check that a change of this kind begins with, if it does: the common case is a wrong base. Raises as `check`."""
        if self.planned.steps and self.planned.steps[0].action is Action.CHECK:
            self.check(self.planned.steps[0].link)

    def _prepare(self, names: Sequence[str]) -> None:
        """All that can be refused before anything is written anywhere; then links are replaced, where that was asked for."""
        if not self.detach:
            require_writable(self.checkpoint, names)
        self.check_first()
        if self.detach:
            from nestpatch.patcher._transaction import detach

            self.checkpoint = detach(self.checkpoint)
            require_writable(self.checkpoint, names)
            # No lock of this model kept others from changing the files by their other names since.
            self.check_first()

    def _made(self, identity: str) -> tuple[str, ...]:
        """The undo records that the steps write."""
        return tuple(
            f"{identity}-{step.link.pack_id[:16]}" for step in self.planned.steps if step.action in (Action.APPLY, Action.REDO)
        )

    def _open_journal(self, identity: str, retired: Sequence[str]) -> None:
        makes = self._made(identity)
        try:
            write_journal(self.state_dir, identity, self.checkpoint, self._regions(), makes=makes, retires=retired)
        except OSError as error:
            with suppress(OSError):
                remove_journal(self.state_dir.journal)
            raise InPlaceError(f"cannot write the journal {self.state_dir.journal}: {error.strerror}") from error

    def _close_journal(self, cause: BaseException, identity: str) -> None:
        if read_ledger(self.state_dir).transaction == identity:
            # The commit stands; only what follows it failed, and the next command does that.
            if isinstance(cause, (OSError, OutputError)):
                raise InPlaceError(
                    f"the change is made, but the disk did not confirm it: {cause}",
                    advice="When the disk works again, `nestpatch verify MODEL` tells which state the model is in.",
                ) from cause
            return
        try:
            journal = read_journal(self.state_dir)
            if journal is not None:
                roll_back(journal, self.checkpoint)
            retire(self.state_dir, self._made(identity))
            remove_journal(self.state_dir.journal)
            sweep(self.state_dir, self.checkpoint)
        except OSError as error:
            raise JournalError(
                f"the change failed ({cause}), and could not be rolled back now: {error.strerror}",
                advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the disk works again.",
            ) from cause
        if isinstance(cause, OSError):
            raise InPlaceError(f"cannot change the model: {cause.strerror or cause}") from cause

    def _regions(self) -> list[Region]:
        """The rows that the steps touch, each tensor once."""
        touched: dict[str, list[Any]] = {}
        for pack_id in dict.fromkeys(step.link.pack_id for step in self.planned.steps):
            for delta in self.planned.packs[pack_id]:
                touched.setdefault(delta.name, []).append(delta.rows.astype(np.int64))
        unions = {name: np.unique(np.concatenate(rows)) if len(rows) > 1 else rows[0] for name, rows in touched.items()}
        return [Region(self.checkpoint.info(name), rows) for name, rows in sorted(unions.items())]

    def _do(self, step: Step, ledger: Ledger, identity: str, before: Mapping[str, LedgerEntry]) -> Ledger:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if step.action is Action.CHECK:
            self.check(step.link)
            return ledger
        if step.action is Action.UNDO:
            entry = next(entry for entry in ledger.applied if entry.link == step.link)
            gone = self.planned.missing.get(entry.pack_id, frozenset())
            self._changer.restore(self.planned.packs[entry.pack_id], entry, self.state_dir.undo(entry.undo), gone)
            kept = tuple(other for other in ledger.applied if other is not entry)
            return replace(ledger, applied=kept).with_event("found missing" if gone else "undone", entry, now)
        if step.action is Action.REDO:
            self._require_floats(step.link)
        old = before.get(step.link.pack_id) if step.action is Action.REDO else None
        entry = self._apply(step.link, identity, now, old)
        return replace(ledger, applied=(*ledger.applied, entry)).with_event("applied", entry, now)

    def _require_floats(self, link: Link) -> None:
        """Quantized rows are made of the base and one pack; what another one added to them would be lost."""
        names = (delta.name for delta in self.planned.packs[link.pack_id])
        if odd := next((name for name in names if not self.checkpoint.info(name).plain), None):
            raise OverlapError(
                f"{odd} is stored quantized: packs that share rows cannot be stacked in it",
                advice="Revert the other pack first, or apply both to the float model and quantize it anew.",
            )

    def check(self, link: Link) -> None:
        """Whether a pack can be applied to the model as it is now.

        Raises BaseMismatchError when that is not the pack's base, QuantizationError when quantized rows would lose the pack.
        """
        pack = self.planned.packs[link.pack_id]
        make_plan(pack, self.checkpoint, link.strength, allow_mismatch=self.allow_base_mismatch, base=self.quantized.base)
        for codec in {self.checkpoint.info(delta.name).coding for delta in pack}:
            codec.require()
        if self.quantized.base is None:
            require_retention(measure(pack, link.strength, self.checkpoint, self.quantized), pack.label)

    def _apply(self, link: Link, identity: str, now: str, old: LedgerEntry | None) -> LedgerEntry:
        pack = self.planned.packs[link.pack_id]
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
        entry = replace(entry, tensors=self._changer.merge(pack, link.strength, self.state_dir.undo(entry.undo)))
        return replace(entry, rounding=self.quantized.source) if entry.retention is not None else entry
