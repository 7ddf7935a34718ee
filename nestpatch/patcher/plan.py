"""The plan of a merge, from a pack and a checkpoint: whether this is the base, which rows change, and what they will hold.

Only the touched rows are read, a few megabytes at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, DataError
from nestpatch.files.threads import spread
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE, Finding, State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.merge import QuantizedMerge, Retention, TouchedBlock, fitted, merged_rows, touched_block
from nestpatch.patcher.touched import working_bytes
from nestpatch.rows import FloatArray, Rows
from nestpatch.values import dataclass

_MAX_STRENGTH = 1.5
_SHOWN = 3
"""Tensors that a message about another base names."""


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """The change of one tensor of one checkpoint."""

    info: TensorInfo
    delta: TensorDelta
    state: State


@dataclass(frozen=True, eq=False)
class MergedBlock:
    """Some touched rows of a tensor, as they are stored, before and after a merge."""

    delta: TensorDelta
    part: slice
    """Which of the delta's rows these are."""
    old: Rows
    new: Rows
    retention: Retention


@dataclass(frozen=True, eq=False)
class Plan:
    """What applying a pack to a checkpoint will do."""

    pack: Pack
    strength: float
    tensors: tuple[TensorPlan, ...]


def check_strength(strength: float) -> None:
    """Checks the strength of a merge.

    Args:
        strength: Multiplies the deltas of a pack.

    Raises:
        DataError: It is not a number over 0 and at most 1.5.
    """
    # As the merge rule sees it: some positive numbers are zero in float32.
    if not (math.isfinite(strength) and np.float32(0) < np.float32(strength) and strength <= _MAX_STRENGTH):
        raise DataError(f"strength must be over 0 and at most {_MAX_STRENGTH}, got {strength}")


def make_plan(
    pack: Pack, checkpoint: Checkpoint, strength: float = 1.0, *, allow_mismatch: bool = False, base: Checkpoint | None = None
) -> Plan:
    """Checks that a checkpoint is the base of a pack, and plans the merge.

    Args:
        pack: The pack to merge.
        checkpoint: The model.
        strength: Multiplies the deltas.
        allow_mismatch: Accepts other content of the right shape.
        base: The float model, for rows that were rounded.

    Returns:
        The plan, with the state of every tensor.

    Raises:
        BaseMismatchError: The checkpoint is not the base. The message names tensors and rows.
        QuantizationError: Rows were quantized in a way that cannot be repeated.
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
    lines = [f"  {finding.name}: {finding.state.value} ({finding.detail})".replace(" ()", "") for finding in odd[:_SHOWN]]
    if len(odd) > _SHOWN:
        lines.append(f"  and {len(odd) - _SHOWN} more")
    reason = f"{len(odd)} of {len(findings)} tensors of {checkpoint.path} are not the base of {pack.label}:\n" + "\n".join(
        lines
    )
    if states == {State.PATCHED}:
        whole = len(odd) == len(findings)
        advice = "Nothing to do: the model has this pack." if whole else "The model is half patched: start again from the base."
        return BaseMismatchError(reason, advice=advice)
    base = pack.manifest.base
    named = base.model_id + (f" at {base.revision}" if base.revision else "")
    return BaseMismatchError(
        reason, advice=f"The pack is for {named}. A fine-tuned copy of it needs its own pack: nestpatch train."
    )


def merged_blocks(
    pack: Pack, deltas: Sequence[TensorDelta], strength: float, checkpoint: Checkpoint, quantized: QuantizedMerge
) -> Iterator[tuple[MergedBlock, FloatArray]]:
    """The new content of touched rows, from what the checkpoint holds now. A few blocks are read ahead.

    Args:
        pack: The pack that is merged.
        deltas: The changes of the tensors in question.
        strength: Multiplies the deltas.
        checkpoint: The model.
        quantized: What may be used for rounded rows.

    Yields:
        (block of rows, its delta written out as float32 [rows, in_features]), in order.

    Raises:
        PackContentError: A sum leaves the range of the dtype.
        QuantizationError: Rows of this type cannot be quantized here.
    """

    def touched() -> Iterator[TouchedBlock]:
        for delta in deltas:
            info, dtype = fitted(checkpoint, delta, quantized.base), pack.manifest.base.tensors[delta.name].dtype
            for part, old in checkpoint.iter_rows(delta.name, delta.rows, row_bytes=working_bytes(info)):
                yield touched_block(info, delta, dtype, part, old, quantized.base)

    def merged(block: TouchedBlock) -> tuple[MergedBlock, FloatArray]:
        change = block.delta.dense(block.part.start, block.part.stop)
        new, retention = merged_rows(block, change, strength, dither=quantized.dither)
        return MergedBlock(block.delta, block.part, block.stored, new, retention), change

    # Adding takes less time than handing a block to another thread, quantizing a hundred times more.
    mapped = spread if any(not checkpoint.info(delta.name).plain for delta in deltas) else map
    return mapped(merged, touched())


def measure(pack: Pack, strength: float, checkpoint: Checkpoint, quantized: QuantizedMerge) -> dict[str, Retention]:
    """How much of a pack would survive rounding, for every tensor that is stored quantized. Writes nothing.

    Args:
        pack: The pack.
        strength: Multiplies the deltas.
        checkpoint: The model.
        quantized: What may be used for rounded rows.

    Returns:
        Tensor name -> how much of its delta would survive.

    Raises:
        PackContentError: A sum leaves the range of the dtype.
        QuantizationError: Rows of this type cannot be quantized here.
    """
    deltas = [delta for delta in pack if not checkpoint.info(delta.name).plain]
    retentions = {delta.name: Retention() for delta in deltas}
    for block, _ in merged_blocks(pack, deltas, strength, checkpoint, quantized):
        retentions[block.delta.name] += block.retention
    return retentions
