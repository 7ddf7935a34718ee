"""How much of what a model's rows changed since a pack was applied lies along the deltas of the pack.

A fine-tune that has nothing to do with a pack changes its rows in all directions alike: in a subspace of k of in_features
directions lies k / in_features of the squared change, on average. A larger share says that the training moves what the pack
moved, with the same sign or the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.formats.checkpoint import Checkpoint, float_rows
from nestpatch.health.checks import Check, Health
from nestpatch.health.presence import VISIBLE
from nestpatch.pack import Pack
from nestpatch.patcher.touched import rows_of, touched_blocks
from nestpatch.rows import FloatArray, merge, row_space

OFTEN = 3.0
"""How many times the share of a random change is a warning."""
LEAST_ALONG = 0.05
"""Change along the deltas, relative to the pack's own, below which it does not matter."""


@dataclass(frozen=True)
class ChangeAlong:
    """What the rows of a pack changed by since it was applied, and how much of that lies along its deltas."""

    share: float | None
    """Of the squared change, the part in the span of the deltas, 0 to 1; None where nothing has visibly changed."""
    random: float
    """The same of a random change: directions of the span over all directions."""
    change: float
    """Norm of the change, relative to that of the pack."""

    @property
    def along(self) -> float:
        """Norm of the change along the deltas, relative to that of the pack."""
        return math.sqrt(self.share or 0.0) * self.change

    def as_json(self) -> dict[str, Any]:
        """The numbers for `--json`."""
        return {"share": self.share, "random_share": self.random, "change": self.change}


def change_along(
    pack: Pack,
    checkpoint: Checkpoint,
    base: Checkpoint,
    *,
    strength: float = 1.0,
    others: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> ChangeAlong | None:
    """Compares the rows of a model with what the pack makes of its base.

    Args:
        pack: The pack.
        checkpoint: The model, with plain numbers.
        base: The pack's base.
        strength: At which the pack was applied.
        others: Tensor -> rows that other packs change too. They are left out.

    Returns:
        The shares; None where the model has none of the tensors, in plain numbers and of the base's shape.

    Raises:
        CheckpointError: Rows cannot be read.
    """
    whole = along = expected = own = size = 0.0
    for delta in pack:
        shape = pack.manifest.base.tensors[delta.name].shape
        if (
            not checkpoint.has(delta.name)
            or checkpoint.info(delta.name).shape != shape
            or not checkpoint.info(delta.name).plain
        ):
            continue
        left_out, basis = (others or {}).get(delta.name, np.empty(0, np.int64)), row_space(delta.delta)
        for part, stored in touched_blocks(delta, checkpoint):
            rows = rows_of(delta, part)
            keep = ~np.isin(rows, left_out)
            patched = _patched(delta, base, part, strength)
            moved = (checkpoint.info(delta.name).decoded(stored) - patched)[keep].astype(np.float64)
            squared = float((moved * moved).sum())
            whole, along = whole + squared, along + float(((moved @ basis.T) ** 2).sum())
            expected += squared * len(basis) / basis.shape[1]
            own += float(((strength * delta.dense(part.start, part.stop)[keep].astype(np.float64)) ** 2).sum())
            size += float((patched[keep].astype(np.float64) ** 2).sum())
    if not own > 0:
        return None
    change = math.sqrt(whole / own)
    if not math.isfinite(whole) or whole <= VISIBLE * VISIBLE * size:
        return ChangeAlong(None, 0.0, change)
    return ChangeAlong(along / whole, expected / whole, change)


def _patched(delta: TensorDelta, base: Checkpoint, part: slice, strength: float) -> FloatArray:
    """What `apply` makes of rows of the base, as float32."""
    rows, info, change = rows_of(delta, part), base.info(delta.name), delta.dense(part.start, part.stop)
    if info.plain:
        return merge(base.read_rows(delta.name, rows), change, strength).astype(np.float32)
    return info.coding.decode(info.coding.encode(merge(float_rows(base, delta.name, rows), change, strength)))


def subspace_check(label: str, found: ChangeAlong | None) -> Check:
    """Judges what changed along the deltas.

    Args:
        label: Of the pack.
        found: From `change_along`.

    Returns:
        The check.
    """
    if found is None:
        detail = "changes of rows of this type cannot be told from its rounding"
        return Check("subspace", Health.NOT_CHECKED, detail, pack=label)
    if found.share is None:
        return Check("subspace", Health.OK, f"no row of {label} was visibly changed in any direction", pack=label)
    detail = (
        f"{found.share:.1%} of the squared change of the rows of {label} since then lies along its deltas, of a random change "
        f"it would be {found.random:.1%}; the change along them is {found.along:.0%} of the pack's own"
    )
    if found.share > OFTEN * found.random and found.along > LEAST_ALONG:
        advice = "Measure what is left of the refusals: nestpatch doctor --measure"
        return Check("subspace", Health.WARNING, detail, advice, label)
    return Check("subspace", Health.OK, detail, pack=label)
