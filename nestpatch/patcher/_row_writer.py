"""The rows of one pack, written and put back, with what has to be recorded of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.errors import BaseMismatchError, PackContentError, UndoError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.threads import beside, meanwhile
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.pack import Pack, TensorDelta
from nestpatch.patcher._journal import sync_files
from nestpatch.patcher._undo import TensorPacker, UndoReader, UndoWriter, checksums, residual, restored
from nestpatch.patcher.ledger import LedgerEntry, TensorRecord
from nestpatch.patcher.merge import QuantizedMerge, Retention, rows_of
from nestpatch.patcher.plan import MergedBlock, merged_blocks

SYNC_STRIDE = 8
"""Tensors between two syncs."""
Start = Callable[[Callable[[], None]], object]


class _Record:
    """What one tensor held before and after, as the ledger and the undo record tell it."""

    def __init__(self, delta: TensorDelta, strength: float) -> None:
        self.delta, self.strength = delta, strength
        self.before, self.after, self.packer, self.retention = sha256(), sha256(), TensorPacker(), Retention()

    def add(self, block: MergedBlock) -> _Record | None:
        """Adds a block; gives the record when it was the last one."""
        old, new, part = block.old, block.new, block.part
        self.before.update(old.view(np.uint8).data)
        self.after.update(new.view(np.uint8).data)
        self.retention += block.retention
        change = self.delta.dense(part.start, part.stop)
        self.packer.add(residual(old, new, change, self.strength), checksums(old), checksums(new))
        return self if part.stop == self.delta.neurons else None

    @property
    def outcome(self) -> TensorRecord:
        retention = round(self.retention.share, 4) if self.retention.asked else None
        return TensorRecord(self.delta.neurons, self.before.hexdigest(), self.after.hexdigest(), retention)


@dataclass(frozen=True, eq=False)
class RowWriter:
    """Changes the rows of one model."""

    checkpoint: Checkpoint
    quantized: QuantizedMerge = field(default_factory=QuantizedMerge)
    syncing: bool = True
    """Whether the disk is to begin writing on the way."""
    on_event: OnEvent = ignore
    owner: tuple[int, int] | None = None
    """(user, group) that root gives new files to."""

    def merge(self, pack: Pack, strength: float, undo: Path) -> dict[str, TensorRecord]:
        """Merges a pack into the rows and writes their undo record, synced. The rows themselves are not yet.

        Raises PackContentError when the rows are not what the pack promises, QuantizationError.
        """
        records: dict[str, TensorRecord] = {}
        with meanwhile() as start, open(undo, "xb") as file:
            if self.owner is not None:
                os.fchown(file.fileno(), *self.owner)
            writer = UndoWriter(file)
            for record in beside(lambda pair: pair[0].add(pair[1]), self._written(pack, strength)):
                if record is not None:
                    name = record.delta.name
                    records[name] = record.outcome
                    _keep_promise(pack, name, records[name], strength)
                    writer.tensor(record.packer.finish())
                    self._tell("merge", len(records), pack, start)
            file.flush()
            os.fsync(file.fileno())
        return records

    def _written(self, pack: Pack, strength: float) -> Iterator[tuple[_Record, MergedBlock]]:
        """Writes the merged rows, block by block; gives what there is to record of each."""
        for delta in pack:
            record = _Record(delta, strength)
            for block in merged_blocks(pack, delta, strength, self.checkpoint, self.quantized):
                self.checkpoint.write_rows(delta.name, rows_of(delta, block.part), block.new)
                yield record, block

    def restore(self, pack: Pack, entry: LedgerEntry, undo: Path, gone: frozenset[str] = frozenset()) -> None:
        """Puts back what the rows held before a pack, bit for bit. `gone`: tensors that hold that already.

        Raises BaseMismatchError when they do not hold what the pack left, UndoError.
        """
        reader = UndoReader(undo, [delta.name for delta in pack])
        with meanwhile() as start:
            for number, delta in enumerate(pack, start=1):
                if delta.name not in gone:
                    self._restore(delta, entry, reader)
                self._tell("undo", number, pack, start)

    def _tell(self, stage: str, number: int, pack: Pack, start: Start) -> None:
        """Progress; and from time to time lets the disk begin to write, while the next tensors are worked on."""
        name = pack.deltas[number - 1].name
        self.on_event(Event(stage, number, len(pack.deltas), name))
        if self.syncing and number % SYNC_STRIDE == 0:
            start(partial(sync_files, self.checkpoint.info(name).files))

    def _restore(self, delta: TensorDelta, entry: LedgerEntry, reader: UndoReader) -> None:
        info, record = self.checkpoint.info(delta.name), entry.tensors[delta.name]
        parts = list(info.blocks(delta.neurons))
        residuals = reader.residuals(delta.name, (info.row_bytes * (part.stop - part.start) for part in parts))
        found, back = sha256(), sha256()
        for part, data in zip(parts, residuals, strict=True):
            rows = rows_of(delta, part)
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


def _keep_promise(pack: Pack, name: str, record: TensorRecord, strength: float) -> None:
    """Where a pack says what the merge must give, it must have given that."""
    promised = record.before == pack.manifest.base.tensors[name].rows_sha256 and strength == 1.0
    if promised and record.after != pack.manifest.result[name]:
        raise PackContentError(f"{name}: the merged rows are not those that {pack.label} promises")
