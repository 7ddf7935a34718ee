"""Writing the touched rows of one pack, and putting them back, with the records that this needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import field
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, PackContentError, UndoError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.threads import beside, meanwhile
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.pack import Pack
from nestpatch.patcher._rollback import sync_files
from nestpatch.patcher._undo import MAGIC, TensorPacker, UndoBlock, UndoReader, restored, undo_block
from nestpatch.patcher.ledger import LedgerEntry, TensorRecord
from nestpatch.patcher.merge import QuantizedMerge, Retention
from nestpatch.patcher.plan import MergedBlock, merged_blocks
from nestpatch.patcher.touched import rows_of, working_bytes
from nestpatch.rows import Rows
from nestpatch.values import dataclass

_SYNC_STRIDE = 8
"""Tensors between two syncs."""
Start = Callable[[Callable[[], None]], object]
"""Starts work in another thread."""


class _TensorLog:
    """What the ledger and the undo record keep of one tensor, collected block by block."""

    def __init__(self, delta: TensorDelta, strength: float) -> None:
        self.delta, self.strength = delta, strength
        self.before, self.after, self.packer, self.retention = sha256(), sha256(), TensorPacker(), Retention()

    def add(self, block: MergedBlock, undo: UndoBlock) -> _TensorLog | None:
        """Adds a block, and what its undoing lacks. Returns the log after the last block, None before."""
        self.before.update(block.old.view(np.uint8).data)
        self.after.update(block.new.view(np.uint8).data)
        self.retention += block.retention
        self.packer.add(undo)
        return self if block.part.stop == self.delta.neurons else None

    def record(self, pack: Pack) -> TensorRecord:
        """The ledger's record. Raises PackContentError when the rows are not those that the pack names as its result."""
        name, retention = self.delta.name, round(self.retention.share, 4) if self.retention.requested else None
        record = TensorRecord(self.delta.neurons, self.before.hexdigest(), self.after.hexdigest(), retention)
        identity = pack.manifest.base.tensors[name]
        from_base = record.before == identity.rows_sha256 and self.strength == 1.0
        # Of quantized rows the result is a hint: another build of the quantizer may round a block differently.
        if from_base and not identity.quantized and record.after != pack.manifest.result[name]:
            raise PackContentError(f"{name}: the merged rows differ from the result that {pack.label} names")
        return record


class _Undone:
    """What the rows of one tensor held before a pack, found block by block."""

    def __init__(self, delta: TensorDelta, entry: LedgerEntry, record: UndoReader, info: TensorInfo) -> None:
        self.delta, self.entry, self.parts = delta, entry, list(info.blocks(delta.neurons, working_bytes(info)))
        self.residuals = record.residuals(delta.name, (info.row_bytes * (part.stop - part.start) for part in self.parts))
        self.found, self.back = sha256(), sha256()

    def undo(self, part: slice, merged: Rows) -> tuple[_Undone, slice, Rows]:
        """(this tensor, the part, its rows before the pack) of the next part, from what its rows hold."""
        difference = np.frombuffer(next(self.residuals), f"<u{merged.dtype.itemsize}").reshape(merged.shape)
        original = restored(merged, difference, self.delta.dense(part.start, part.stop), self.entry.strength)
        self.found.update(merged.view(np.uint8).data)
        self.back.update(original.view(np.uint8).data)
        if part.stop == self.delta.neurons:
            next(self.residuals, None)  # its end closes the file
        return self, part, original

    def check(self) -> None:
        """Raises BaseMismatchError or UndoError, after the last part, unless both digests are those of the ledger."""
        entry, record = self.entry, self.entry.tensors[self.delta.name]
        if (found := self.found.hexdigest()) != record.after:
            raise BaseMismatchError(
                f"{self.delta.name} no longer holds what {entry.label} wrote: rows sha256 {found[:12]}.. "
                f"instead of {record.after[:12]}..",
                advice="Something else changed the model. `nestpatch verify MODEL` names the rows. Nothing was changed now.",
            )
        if self.back.hexdigest() != record.before:
            raise UndoError(f"the undo record of {entry.label} does not restore what {self.delta.name} held before")


@dataclass(frozen=True, eq=False)
class RowWriter:
    """Changes the rows of one model."""

    checkpoint: Checkpoint
    quantized: QuantizedMerge = field(default_factory=QuantizedMerge)
    syncing: bool = True
    """Whether the disk starts to write while the next rows are computed."""
    on_event: OnEvent = ignore
    owner: tuple[int, int] | None = None
    """(user, group) of the new files, if root writes for another user."""

    def merge(self, pack: Pack, strength: float, undo: Path) -> dict[str, TensorRecord]:
        """Merges a pack into the rows, and writes their undo record.

        Args:
            pack: The pack.
            strength: Factor on its deltas.
            undo: The undo record to write. It is synced; the rows are not.

        Returns:
            Tensor name -> the ledger's record.

        Raises:
            PackContentError: The merged rows are not those that the pack names, or leave the range of their dtype.
            QuantizationError: Rows cannot be quantized here.
        """
        records: dict[str, TensorRecord] = {}
        # Closed at once when an error ends the loop, so that no thread waits for it.
        logs = closing(beside(lambda written: written[0].add(*written[1:]), self._merged(pack, strength)))
        with meanwhile() as start, open(undo, "xb") as file, logs as found:
            if self.owner is not None:
                os.fchown(file.fileno(), *self.owner)
            file.write(MAGIC)
            for log in found:
                if log is not None:
                    records[log.delta.name] = log.record(pack)
                    log.packer.write(file)
                    self._report("merge", len(records), pack, log.delta.name, start)
            file.flush()
            os.fsync(file.fileno())
        return records

    def _merged(self, pack: Pack, strength: float) -> Iterator[tuple[_TensorLog, MergedBlock, UndoBlock]]:
        """Writes the merged rows block by block, and yields what is to be recorded of each block."""
        log: _TensorLog | None = None
        for block, change in merged_blocks(pack, pack.deltas, strength, self.checkpoint, self.quantized):
            if log is None or log.delta is not block.delta:
                log = _TensorLog(block.delta, strength)
            self.checkpoint.write_rows(block.delta.name, rows_of(block.delta, block.part), block.new)
            yield log, block, undo_block(block.old, block.new, change, strength)

    def restore(self, pack: Pack, entry: LedgerEntry, undo: Path, gone: frozenset[str] = frozenset()) -> None:
        """Puts back what the rows held before a pack, bit for bit.

        Args:
            pack: The pack.
            entry: Its entry in the ledger.
            undo: Its undo record.
            gone: Names of tensors that hold the earlier rows already.

        Raises:
            BaseMismatchError: Rows do not hold what the pack left.
            UndoError: The record is damaged, or does not lead to what the rows held before.
        """
        reader = UndoReader(undo, [delta.name for delta in pack])
        wanted, number = [delta for delta in pack if delta.name not in gone], len(gone)
        undone = (_Undone(delta, entry, reader, self.checkpoint.info(delta.name)) for delta in wanted)
        rows = closing(beside(lambda read: read[0].undo(*read[1:]), self._read(undone)))
        with meanwhile() as start, rows as found:
            for tensor, part, original in found:
                delta = tensor.delta
                self.checkpoint.write_rows(delta.name, rows_of(delta, part), original)
                if part.stop == delta.neurons:
                    tensor.check()
                    number += 1
                    self._report("undo", number, pack, delta.name, start)

    def _read(self, undone: Iterable[_Undone]) -> Iterator[tuple[_Undone, slice, Rows]]:
        """Reads what the rows of some tensors hold, block by block."""
        for tensor in undone:
            for part in tensor.parts:
                yield tensor, part, self.checkpoint.read_rows(tensor.delta.name, rows_of(tensor.delta, part))

    def _report(self, stage: str, number: int, pack: Pack, name: str, start: Start) -> None:
        """Reports progress, and every few tensors has the disk start to write while the next ones are computed.

        After the last one it writes beside the syncing of the undo record.
        """
        self.on_event(Event(stage, number, len(pack.deltas), name))
        if self.syncing and (number % _SYNC_STRIDE == 0 or number == len(pack.deltas)):
            start(partial(sync_files, self.checkpoint.info(name).files))
