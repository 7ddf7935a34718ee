"""Pack x Checkpoint -> Plan: is this the base, which rows change, and what they must hold before and after.

Only the touched rows are read, a few megabytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256

import numpy as np

from nestpatch.errors import BaseMismatchError, DataError
from nestpatch.formats.interface import Checkpoint, TensorInfo, row_blocks
from nestpatch.pack import Pack, TensorDelta, TensorIdentity
from nestpatch.rows import DTYPES, SKETCH_MATCH, Rows, merge, sketch, sketch_correlation

MAX_STRENGTH = 1.5
SHOWN = 3
"""Differing tensors that a message names."""
ROW_TOLERANCE = 0.05
"""How far a row's sketch may lie from the pack's before the message calls the row changed."""


class State(Enum):
    """What the touched rows of one tensor turned out to be."""

    BASE = "base"
    WIDENED = "the base, stored in a wider dtype"
    PATCHED = "already patched with this pack"
    CHANGED = "near the base, but changed: fine-tuned, patched otherwise, or damaged"
    FOREIGN = "another model"
    MISSING = "missing"
    SHAPE = "of another shape"


APPLICABLE = (State.BASE, State.WIDENED)


@dataclass(frozen=True)
class Finding:
    """One tensor of the pack, as found in a checkpoint."""

    name: str
    state: State
    detail: str = ""
    rows: tuple[int, ...] = ()
    """The rows that differ from the base, as far as sketches tell."""


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """The change of one tensor of one checkpoint."""

    info: TensorInfo
    delta: TensorDelta
    state: State

    @property
    def nbytes(self) -> int:
        """Bytes that change."""
        return self.delta.neurons * self.info.row_bytes


@dataclass(frozen=True, eq=False)
class Plan:
    """What applying a pack to a checkpoint will do."""

    pack: Pack
    strength: float
    tensors: tuple[TensorPlan, ...]

    @property
    def rows(self) -> int:
        return sum(tensor.delta.neurons for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def examine(pack: Pack, checkpoint: Checkpoint) -> list[Finding]:
    """Finds out, tensor by tensor, what a checkpoint holds where the pack would change it."""
    names = set(checkpoint.tensors())

    def look(delta: TensorDelta) -> Finding:
        identity = pack.manifest.base.tensors[delta.name]
        if delta.name not in names:
            return Finding(delta.name, State.MISSING)
        info = checkpoint.info(delta.name)
        if info.shape != identity.shape:
            return Finding(delta.name, State.SHAPE, f"{list(info.shape)} instead of {list(identity.shape)}")
        return _examine_rows(delta, identity, pack.manifest.result[delta.name], checkpoint)

    return [look(delta) for delta in pack]


def _narrow(rows: Rows, dtype: str) -> Rows | None:
    """The rows in a dtype of fewer bits, or None when that would lose something."""
    with np.errstate(over="ignore"):
        narrow = rows.astype(DTYPES[dtype])
    return narrow if np.array_equal(narrow.astype(rows.dtype), rows) else None


def _examine_rows(delta: TensorDelta, identity: TensorIdentity, result: str, checkpoint: Checkpoint) -> Finding:
    info = checkpoint.info(delta.name)
    stored, narrowed = sha256(), sha256()
    wider = DTYPES.get(info.dtype, DTYPES[identity.dtype]).itemsize > DTYPES[identity.dtype].itemsize
    for part in row_blocks(delta.neurons, info.row_bytes):
        rows = checkpoint.read_rows(delta.name, delta.rows[part].astype(np.int64))
        stored.update(rows.view(np.uint8).data)
        narrow = _narrow(rows, identity.dtype) if wider else None
        wider = narrow is not None
        if narrow is not None:
            narrowed.update(narrow.view(np.uint8).data)
    digest = stored.hexdigest()
    if info.dtype == identity.dtype and digest == identity.rows_sha256:
        return Finding(delta.name, State.BASE)
    if wider and narrowed.hexdigest() == identity.rows_sha256:
        return Finding(delta.name, State.WIDENED, f"{info.dtype} instead of {identity.dtype}")
    if digest == result:
        return Finding(delta.name, State.PATCHED)
    return _describe_stranger(delta, identity, digest, checkpoint)


def _describe_stranger(delta: TensorDelta, identity: TensorIdentity, digest: str, checkpoint: Checkpoint) -> Finding:
    # Only now: sketches take longer than digests.
    parts = row_blocks(delta.neurons, checkpoint.info(delta.name).row_bytes)
    found = np.concatenate([sketch(checkpoint.read_rows(delta.name, delta.rows[part].astype(np.int64))) for part in parts])
    likeness = sketch_correlation(delta.sketch, found)
    off = np.flatnonzero(np.abs(delta.sketch.astype(np.float32) - found.astype(np.float32)).max(axis=1) > ROW_TOLERANCE)
    where = f", first at row {int(delta.rows[off[0]])}, {len(off)} of {delta.neurons} rows differ" if len(off) else ""
    detail = f"rows sha256 {digest[:12]}.. instead of {identity.rows_sha256[:12]}.., likeness {likeness:.2f}{where}"
    rows = tuple(int(row) for row in delta.rows[off])
    return Finding(delta.name, State.CHANGED if likeness >= SKETCH_MATCH else State.FOREIGN, detail, rows)


def check_strength(strength: float) -> None:
    """Raises DataError for a strength that makes no sense."""
    # As the merge rule sees it: some positive numbers are zero in float32.
    if not (math.isfinite(strength) and np.float32(0) < np.float32(strength) and strength <= MAX_STRENGTH):
        raise DataError(f"strength must be over 0 and at most {MAX_STRENGTH}, got {strength}")


def make_plan(pack: Pack, checkpoint: Checkpoint, strength: float = 1.0, *, allow_mismatch: bool = False) -> Plan:
    """Checks that the checkpoint is the pack's base and plans the merge.

    `allow_mismatch` accepts other content of the right shape.

    Raises BaseMismatchError, naming tensors and rows, when it is not.
    """
    findings = examine(pack, checkpoint)
    accepted = (*APPLICABLE, State.CHANGED, State.FOREIGN) if allow_mismatch else APPLICABLE
    if any(finding.state not in accepted for finding in findings):
        raise _mismatch(pack, checkpoint, findings)
    tensors = []
    for delta, finding in zip(pack, findings, strict=True):
        tensors.append(TensorPlan(checkpoint.info(delta.name), delta, finding.state))
    return Plan(pack, strength, tuple(tensors))


def _mismatch(pack: Pack, checkpoint: Checkpoint, findings: list[Finding]) -> BaseMismatchError:
    odd = [finding for finding in findings if finding.state not in APPLICABLE]
    states = {finding.state for finding in odd}
    lines = [f"  {finding.name}: {finding.state.value} ({finding.detail})".replace(" ()", "") for finding in odd[:SHOWN]]
    if len(odd) > SHOWN:
        lines.append(f"  and {len(odd) - SHOWN} more")
    reason = f"{len(odd)} of {len(findings)} tensors of {checkpoint.path} are not the base of {pack.label}:\n" + "\n".join(
        lines
    )
    if states == {State.PATCHED}:
        whole = len(odd) == len(findings)
        advice = (
            "Nothing to do: the model has this patch." if whole else "The model is half patched: start again from the base."
        )
        return BaseMismatchError(reason, advice=advice)
    base = pack.manifest.base
    named = base.model_id + (f" at {base.revision}" if base.revision else "")
    return BaseMismatchError(
        reason, advice=f"The pack is for {named}. A fine-tuned copy of it needs its own pack: nestpatch train."
    )


def merged_blocks(tensor: TensorPlan, strength: float, checkpoint: Checkpoint) -> Iterator[tuple[slice, Rows]]:
    """The new content of a tensor's touched rows, block by block, from what the checkpoint holds now."""
    delta = tensor.delta
    for part in row_blocks(delta.neurons, tensor.info.row_bytes):
        rows = checkpoint.read_rows(delta.name, delta.rows[part].astype(np.int64))
        yield part, merge(rows, delta.dense(part.start, part.stop), strength)
