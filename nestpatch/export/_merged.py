"""A checkpoint with a pack merged into it, without writing it: rows are merged when they are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import OutputError, PackContentError
from nestpatch.formats.checkpoint import Checkpoint, Extents, IntArray, TensorInfo
from nestpatch.pack import Pack
from nestpatch.patcher.identity import State
from nestpatch.patcher.merge import QuantizedMerge
from nestpatch.patcher.plan import Plan, make_plan, merged_blocks
from nestpatch.rows import Rows, digest, merge


class MergedCheckpoint(Checkpoint):
    """A read-only Checkpoint of the patched model; the files on disk stay the base."""

    converted = False

    def __init__(self, plan: Plan, base: Checkpoint) -> None:
        self.path: Path = base.path
        self.files: tuple[Path, ...] = base.files
        self._base = base
        self._strength = plan.strength
        self._deltas = {tensor.info.name: tensor.delta for tensor in plan.tensors}

    def reopen(self, path: Path) -> Checkpoint:
        """Raises OutputError: a view cannot be opened elsewhere."""
        raise OutputError(f"{self.path} is patched in memory only: there is nothing at {path}")

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""
        return self._base.tensors()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self._base.has(name)

    def info(self, name: str) -> TensorInfo:
        """As in the base: a merge changes no shape and no dtype. The file of a patched tensor contains the base's rows."""
        return self._base.info(name)

    def extent(self, name: str) -> TensorInfo | None:
        """Where the bytes of an untouched tensor are stored; None for a patched one."""
        if name in self._deltas or not isinstance(self._base, Extents):
            return None
        return self._base.extent(name)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Sorted rows, merged where the pack touches them. Raises PackContentError when a sum leaves the dtype's range."""
        found = self._base.read_rows(name, rows)
        delta = self._deltas.get(name)
        if delta is None:
            return found
        places = np.searchsorted(delta.rows, rows)
        places[places == delta.neurons] = 0  # rows after the last touched one: the comparison below is false for them
        touched = delta.rows[places] == rows
        if touched.any():
            change = delta.delta[delta.cluster[places[touched]]]
            found[touched] = merge(found[touched], change, self._strength)
        return found

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Raises OutputError."""
        raise OutputError(f"{self.path} is patched in memory only: {len(rows)} rows {values.dtype} of {name} cannot be written")

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks."""
        if name not in self._deltas:
            yield from self._base.read_all(name)
            return
        for _, rows in self.iter_rows(name, np.arange(self.info(name).rows)):
            yield rows.tobytes()

    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the base's files."""
        return self._base.metadata()


def merged_view(pack: Pack, checkpoint: Checkpoint, strength: float = 1.0) -> MergedCheckpoint:
    """Checks that the checkpoint is the pack's base, and that the merge gives the result in the pack.

    Raises BaseMismatchError, PackContentError.
    """
    plan = make_plan(pack, checkpoint, strength)
    for tensor in plan.tensors:
        name = tensor.info.name
        if tensor.state is not State.BASE or strength != 1.0:
            continue
        merged = merged_blocks(pack, tensor.delta, strength, checkpoint, QuantizedMerge())
        if digest(block.new for block in merged) != pack.manifest.result[name]:
            raise PackContentError(f"{name}: the merged rows are not those that {pack.label} promises")
    return MergedCheckpoint(plan, checkpoint)
