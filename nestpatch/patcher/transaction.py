"""One change of a model in place: all of its steps happen, or none.

Order on disk: journal (synced) -> rows and undo records (synced) -> ledger (renamed: this is the commit) -> journal removed.
A process that dies before the commit leaves a journal that rolls the rows back; one that dies after it leaves a journal of a
transaction that the ledger already names, which is then just removed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.errors import BaseMismatchError, InPlaceError, JournalError, OutputError, PackContentError, UndoError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import sync_folder
from nestpatch.formats.interface import Checkpoint, row_blocks
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack, TensorDelta
from nestpatch.patcher.chain import Do, Link, Step
from nestpatch.patcher.journal import Region, read_transaction, remove_journal, roll_back, sync_files, write_journal
from nestpatch.patcher.ledger import Entry, Ledger, TensorRecord, read_ledger, write_ledger
from nestpatch.patcher.place import Place, locked, place_of
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.threads import beside, meanwhile
from nestpatch.patcher.undo import TensorPacker, UndoReader, UndoWriter, checksums, residual, restored
from nestpatch.rows import FloatArray, Rows, merge

SYNC_STRIDE = 8
"""Tensors between two syncs."""


@dataclass(frozen=True)
class Recovery:
    """What a leftover journal led to."""

    action: str
    """"none", "rolled back", "finished" or "nothing was changed"."""


def recover(place: Place, checkpoint: Checkpoint) -> Recovery:
    """Ends an interrupted transaction: rolls it back, or finishes it when it was already committed. The lock must be held.

    Raises JournalError when the journal does not fit the model.
    """
    try:
        return _recover(place, checkpoint)
    except OSError as error:
        raise JournalError(
            f"an interrupted change of {checkpoint.path} cannot be ended: {error.strerror or error} ({error.filename})",
            advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the files can be written again.",
        ) from error


def _recover(place: Place, checkpoint: Checkpoint) -> Recovery:
    action = "none"
    if place.journal.exists():
        transaction = read_transaction(place.journal)
        if transaction is None:
            action = "nothing was changed"
        elif transaction == read_ledger(place.ledger).transaction:
            action = "finished"
        else:
            roll_back(place.journal, checkpoint)
            action = "rolled back"
        remove_journal(place.journal)
    _sweep(place, checkpoint, read_ledger(place.ledger))
    return Recovery(action)


def _sweep(place: Place, checkpoint: Checkpoint, ledger: Ledger) -> None:
    """Removes undo records that no applied entry needs, and temporary files of interrupted writes. The lock must be held.

    What cannot be removed now is no harm: the next command tries again.
    """
    needed = {place.undo(entry.undo) for entry in ledger.applied}
    patterns = [(place.folder, "*.undo"), (place.folder, ".*.tmp")]
    # The temporary names of formats/atomic.py, for the files that are replaced as a whole.
    patterns += [(file.parent, f".{escape(file.name)}.????????.tmp") for file in (place.ledger, *checkpoint.files)]
    with suppress(OSError):
        for folder, pattern in patterns:
            for file in folder.glob(pattern):
                if file not in needed:
                    file.unlink(missing_ok=True)


def open_model(path: str | Path) -> tuple[Checkpoint, Place]:
    """Opens a model for any command. An interrupted transaction is rolled back or finished first.

    Raises BusyError while another process writes the model, CheckpointError, JournalError.
    """
    checkpoint, place = open_checkpoint(path), place_of(path)
    if place.journal.exists():
        with locked(place):
            recover(place, checkpoint)
    return checkpoint, place


def recover_model(path: str | Path) -> Recovery:
    """Ends an interrupted transaction, if there is one.

    Raises BusyError while another process writes the model, JournalError when the journal does not fit it.
    """
    checkpoint, place = open_checkpoint(path), place_of(path)
    if not place.folder.exists():
        return Recovery("none")
    with locked(place):
        return recover(place, checkpoint)


def require_writable(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Raises InPlaceError when a file with these tensors is a link, has other names, or cannot be written."""
    for file in sorted({checkpoint.info(name).file for name in names}):
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


class _Change:
    """What one tensor held before and after, as the ledger and the undo record tell it."""

    def __init__(self, name: str, rows: int, strength: float) -> None:
        self.name, self.rows, self.strength = name, rows, strength
        self.before, self.after, self.packer = sha256(), sha256(), TensorPacker()

    @staticmethod
    def record(block: _Block) -> _Change | None:
        """Adds a block; gives the change when it was the last one."""
        change, old, new = block.change, block.old, block.new
        change.before.update(old.view(np.uint8).data)
        change.after.update(new.view(np.uint8).data)
        change.packer.add(residual(old, new, block.dense, change.strength), checksums(old), checksums(new))
        return change if block.last else None

    @property
    def outcome(self) -> TensorRecord:
        return TensorRecord(self.rows, self.before.hexdigest(), self.after.hexdigest())


@dataclass(frozen=True, eq=False)
class _Block:
    """Some rows of a change: [rows, in_features]."""

    change: _Change
    old: Rows
    new: Rows
    dense: FloatArray
    last: bool


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

    def run(self, ledger: Ledger, steps: Sequence[Step]) -> Ledger:
        """Carries the steps out and returns the new ledger.

        Raises BaseMismatchError, UndoError or InPlaceError; then everything is as before.
        """
        _keep_heap()
        identity = secrets.token_hex(8)
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
                ledger = self._do(step, ledger, identity)
            if self.journaled:
                sync_files(sorted({self.checkpoint.info(name).file for name in names}))
                sync_folder(self.place.folder)
            ledger = replace(ledger, transaction=identity)
            write_ledger(self.place.ledger, ledger)
        except BaseException as error:
            if self.journaled:
                self._close_journal(error, identity)
            raise
        if self.journaled:
            # Committed: a journal that cannot be removed now is removed by the next command.
            with suppress(OSError):
                remove_journal(self.place.journal)
        _sweep(self.place, self.checkpoint, ledger)
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
            _sweep(self.place, self.checkpoint, read_ledger(self.place.ledger))
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

    def _do(self, step: Step, ledger: Ledger, identity: str) -> Ledger:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        if step.do is Do.CHECK:
            self.check(step.link)
            return ledger
        if step.do is Do.UNDO:
            entry = next(entry for entry in ledger.applied if entry.link == step.link)
            self._undo(entry)
            kept = tuple(other for other in ledger.applied if other is not entry)
            return replace(ledger, applied=kept).with_event("undone", entry, now)
        old = next((entry for entry in ledger.applied if entry.link == step.link), None)
        entry = self._apply(step.link, identity, now, mismatch=bool(old and old.base_mismatch_allowed))
        return replace(ledger, applied=(*ledger.applied, entry)).with_event("applied", entry, now)

    def check(self, link: Link) -> None:
        """Raises BaseMismatchError when the model, as it is now, is not the base of a pack."""
        make_plan(self.packs[link.pack_id], self.checkpoint, link.strength, allow_mismatch=self.allow_base_mismatch)

    def _apply(self, link: Link, identity: str, now: str, *, mismatch: bool) -> Entry:
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
            base_mismatch_allowed=mismatch or self.allow_base_mismatch,
        )
        records = {}
        kept = self.place.pack(link.pack_id)
        if not kept.exists():
            nest.write(pack, kept)
        with meanwhile() as start, open(self.place.undo(entry.undo), "wb") as file:
            writer = UndoWriter(file)
            for change in beside(_Change.record, self._merge(pack, link.strength)):
                if change is None:
                    continue
                records[change.name] = change.outcome
                self._keep_promise(pack, change.name, change.outcome, link.strength)
                writer.tensor(change.packer.finish())
                self._tell("merge", len(records), pack, start)
            file.flush()
            os.fsync(file.fileno())
        return replace(entry, tensors=records)

    def _tell(self, stage: str, number: int, pack: Pack, start: Callable[[Callable[[], None]], None]) -> None:
        """Progress; and from time to time lets the disk begin to write, while the next tensors are worked on."""
        name = pack.deltas[number - 1].name
        self.on_event(Event(stage, number, len(pack.deltas), name))
        if self.journaled and number % SYNC_STRIDE == 0:
            start(partial(sync_files, [self.checkpoint.info(name).file]))

    def _keep_promise(self, pack: Pack, name: str, record: TensorRecord, strength: float) -> None:
        """Where a pack says what the merge must give, it must have given that."""
        promised = record.before == pack.manifest.base.tensors[name].rows_sha256 and strength == 1.0
        if promised and record.after != pack.manifest.result[name]:
            raise PackContentError(f"{name}: the merged rows are not those that {pack.label} promises")

    def _merge(self, pack: Pack, strength: float) -> Iterator[_Block]:
        """Writes the merged rows, block by block; gives what there is to record of each."""
        for delta in pack:
            change = _Change(delta.name, delta.neurons, strength)
            for part in row_blocks(delta.neurons, self.checkpoint.info(delta.name).row_bytes):
                rows = delta.rows[part].astype(np.int64)
                dense = delta.dense(part.start, part.stop)
                old = self.checkpoint.read_rows(delta.name, rows)
                new = merge(old, dense, strength)
                self.checkpoint.write_rows(delta.name, rows, new)
                yield _Block(change, old, new, dense, last=part.stop == delta.neurons)

    def _undo(self, entry: Entry) -> None:
        pack = self.packs[entry.pack_id]
        reader = UndoReader(self.place.undo(entry.undo), [delta.name for delta in pack])
        with meanwhile() as start:
            for number, delta in enumerate(pack, start=1):
                self._restore(delta, entry, reader)
                self._tell("undo", number, pack, start)

    def _restore(self, delta: TensorDelta, entry: Entry, reader: UndoReader) -> None:
        info, record = self.checkpoint.info(delta.name), entry.tensors[delta.name]
        parts = list(row_blocks(delta.neurons, info.row_bytes))
        residuals = reader.residuals(delta.name, (info.row_bytes * (part.stop - part.start) for part in parts))
        found, back = sha256(), sha256()
        for part, data in zip(parts, residuals, strict=True):
            rows = delta.rows[part].astype(np.int64)
            merged = self.checkpoint.read_rows(delta.name, rows)
            lacking = np.frombuffer(data, f"<u{merged.dtype.itemsize}").reshape(merged.shape)
            original = restored(merged, lacking, delta.dense(part.start, part.stop), entry.strength)
            self.checkpoint.write_rows(delta.name, rows, original)
            found.update(merged.view(np.uint8).data)
            back.update(original.view(np.uint8).data)
        if found.hexdigest() != record.after:
            raise BaseMismatchError(
                f"{delta.name} no longer holds what {entry.label} wrote: rows sha256 {found.hexdigest()[:12]}.. "
                f"instead of {record.after[:12]}..",
                advice="Something else changed the model. `nestpatch verify MODEL` names the rows. Nothing was changed now.",
            )
        if back.hexdigest() != record.before:
            raise UndoError(f"the undo record of {entry.label} does not give back what {delta.name} held")
