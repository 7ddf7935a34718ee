"""Pack x Checkpoint -> Plan: is this the base, which rows change, and what they must hold before and after.

Only the touched rows are read, a few megabytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nestpatch.errors import BaseMismatchError, DataError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.pack import Pack, TensorDelta
from nestpatch.patcher.identity import APPLICABLE, Finding, State, examine
from nestpatch.patcher.merge import QuantizedMerge, Retention, fitted, merged_rows, working_bytes
from nestpatch.rows import Rows

MAX_STRENGTH = 1.5
SHOWN = 3
"""Differing tensors that a message names."""


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
class MergedBlock:
    """Some touched rows of a tensor, as they are stored: before and after."""

    part: slice
    """Of the delta's rows."""
    old: Rows
    new: Rows
    retention: Retention


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


def check_strength(strength: float) -> None:
    """Raises DataError for a strength that makes no sense."""
    # As the merge rule sees it: some positive numbers are zero in float32.
    if not (math.isfinite(strength) and np.float32(0) < np.float32(strength) and strength <= MAX_STRENGTH):
        raise DataError(f"strength must be over 0 and at most {MAX_STRENGTH}, got {strength}")


def make_plan(
    pack: Pack, checkpoint: Checkpoint, strength: float = 1.0, *, allow_mismatch: bool = False, base: Checkpoint | None = None
) -> Plan:
    """Checks that the checkpoint is the pack's base and plans the merge.

    `allow_mismatch` accepts other content of the right shape; `base` is the float model, for rows that were rounded.

    Raises BaseMismatchError, naming tensors and rows, when it is not.
    """
    findings = examine(pack, checkpoint, base)
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


def merged_blocks(
    pack: Pack, delta: TensorDelta, strength: float, checkpoint: Checkpoint, quantized: QuantizedMerge
) -> Iterator[MergedBlock]:
    """The new content of a tensor's touched rows, block by block, from what the checkpoint holds now.

    Raises PackContentError or QuantizationError.
    """
    info, dtype = fitted(checkpoint, delta, quantized.base), pack.manifest.base.tensors[delta.name].dtype
    for part, old in checkpoint.iter_rows(delta.name, delta.rows, row_bytes=working_bytes(info)):
        yield MergedBlock(part, old, *merged_rows(info, delta, dtype, part, old, strength, quantized))


def measure(pack: Pack, strength: float, checkpoint: Checkpoint, quantized: QuantizedMerge) -> dict[str, Retention]:
    """How much of the pack would arrive in the rows of every tensor that is stored quantized. Writes nothing."""
    retentions = {}
    for delta in pack:
        if not checkpoint.info(delta.name).plain:
            blocks = merged_blocks(pack, delta, strength, checkpoint, quantized)
            retentions[delta.name] = sum((block.retention for block in blocks), Retention())
    return retentions
