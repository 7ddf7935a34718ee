"""How much of a pack's change is in rows that no digest recognises, and how far they were changed since.

With the base the answer is arithmetic: the projection of (row - base row) on the delta. Without it, a pack holds four
projections of each base row on vectors of signs, divided by the row's norm: its sketch. For rows that hold base + t * delta +
change, the projections of (row - t * delta), divided by the norm, are the sketch but for the change; t is fitted by least
squares over all rows, and what is left over estimates the size of the change. Only numbers per row are kept in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.formats.checkpoint import Checkpoint, float_rows
from nestpatch.pack import Pack
from nestpatch.patcher.touched import rows_of, touched_blocks
from nestpatch.rows import SKETCHES, FloatArray, digest, sketch_signs

VISIBLE = 0.006
"""Change of a row, relative to its norm, from which sketches show it in files of plain numbers. Rounding to bfloat16 and the
sketches' own rounding to half precision make 0.001."""
OVERWRITTEN = 0.75
"""Change of a row, relative to its delta, from which the row no longer counts as patched."""
_NOISE = 4.0
"""The same in rows that were rounded to few bits, relative to the median change, most of which is the rounding's."""
_QUIET = 0.3
"""Median change relative to the deltas up to which single rows of such types can be judged."""
_SAME = 0.85
"""Correlation of sketches from which rows are those of the base with changes: that of coarse quantization."""
_ROUNDS = 30
"""Steps of the fit. Norms depend little on t, so that it converges in a few."""
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TensorRows:
    """What the touched rows of one tensor hold."""

    tensor: str
    rows: int
    """Rows that were compared."""
    exact: bool
    """Whether the rows have the digest of the pack's result."""
    changed: int | None
    """Rows that were visibly changed since; None where rounding hides single rows."""
    overwritten: int | None
    """Of these, those whose change is about as large as the delta, or larger."""
    overwritten_at: tuple[int, ...] | None
    """The numbers of the overwritten rows in the matrix."""
    share: float | None
    """Factor of the delta that the rows hold; None where nothing can be said."""
    change: float | None
    """Size of what is neither base nor delta, relative to the delta."""

    def as_json(self) -> dict[str, Any]:
        """The tensor for `--json`."""
        return {
            "tensor": self.tensor,
            "rows": self.rows,
            "exact": self.exact,
            "changed_rows": self.changed,
            "overwritten_rows": self.overwritten,
            "overwritten_at": None if self.overwritten_at is None else list(self.overwritten_at),
            "share": self.share,
            "change": self.change,
        }


@dataclass(frozen=True)
class Presence:
    """How much of a pack is in the rows of a model."""

    by: str
    """"digests", "base" or "sketches"."""
    tensors: tuple[TensorRows, ...]
    missing: tuple[str, ...]
    """Tensors that the model does not have, or has in another shape."""
    share: float | None
    """Factor of the deltas that the rows hold, of all tensors together."""
    error: float | None
    """Standard error of the share."""
    likeness: float
    """Correlation of the base's sketches with those of the rows without the pack: low for another model."""

    @property
    def rows(self) -> int:
        """Rows that were compared."""
        return sum(one.rows for one in self.tensors)

    @property
    def changed(self) -> int | None:
        """Rows that were visibly changed; None where rounding hides them in a tensor."""
        return _total(one.changed for one in self.tensors)

    @property
    def overwritten(self) -> int | None:
        """Rows that no longer count as patched; None where rounding hides them in a tensor."""
        return _total(one.overwritten for one in self.tensors)

    @property
    def exact(self) -> bool:
        """Whether all rows have the digests of the pack's result."""
        return not self.missing and all(one.exact for one in self.tensors)

    @property
    def foreign(self) -> bool:
        """Whether the rows are those of another model."""
        return bool(self.missing) or self.likeness < _SAME

    @property
    def change(self) -> float | None:
        """Size of what is neither base nor delta, relative to the deltas, the largest of all tensors."""
        return max((one.change for one in self.tensors if one.change is not None), default=None)

    def as_json(self) -> dict[str, Any]:
        """The presence for `--json`; tensors that are exactly the pack's result are left out."""
        return {
            "by": self.by,
            "rows": self.rows,
            "changed_rows": self.changed,
            "overwritten_rows": self.overwritten,
            "share": self.share,
            "standard_error": self.error,
            "likeness": self.likeness,
            "missing": list(self.missing),
            "by_tensor": [one.as_json() for one in self.tensors if not one.exact],
        }


def _total(counts: Any) -> int | None:
    found = list(counts)
    return None if None in found else sum(found)


@dataclass(frozen=True, eq=False)
class _Projected:
    """Numbers per row, of all rows of one tensor that are compared."""

    places: npt.NDArray[np.int64]
    """[rows]: which rows of the matrix."""
    rows: Numbers
    """[rows, k]: the rows, projected; with the base: row - base."""
    delta: Numbers
    """[rows, k]: the deltas, projected."""
    base: Numbers
    """[rows, k]: the base's sketches; with the base: zeros."""
    products: Numbers
    """[rows, 3]: <row, row>, <row, delta>, <delta, delta>."""
    plain: bool
    rounded: bool
    """Whether the rows, or the base that the pack was merged into, are of a quantized type."""

    def norms(self, share: float) -> Numbers:
        """[rows, 1]: norms of the rows without `share` of the delta."""
        whole, mixed, alone = self.products.T
        norms: Numbers = np.sqrt(np.maximum(whole - 2 * share * mixed + share * share * alone, 1e-30))[:, None]
        return norms

    def gaps(self, share: float) -> Numbers:
        """[rows, k]: what is left of the rows without the base and `share` of the delta, in the scale of the weights."""
        gaps: Numbers = self.rows - share * self.delta - self.base * self.norms(share)
        return gaps


def presence(
    pack: Pack,
    checkpoint: Checkpoint,
    *,
    strength: float = 1.0,
    base: Checkpoint | None = None,
    others: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> Presence:
    """Measures how much of a pack is in the rows of a model. Nothing beside the model is used.

    Args:
        pack: The pack.
        checkpoint: The model, in whatever type it is stored.
        strength: Factor of the deltas with which the pack was applied: rows are "changed" where they differ from that.
        base: The pack's base.
        others: Tensor -> rows that other packs change too. They are left out.

    Returns:
        The shares, with their error, and the changed rows.

    Raises:
        CheckpointError: Rows cannot be read.
    """
    found: dict[str, tuple[_Projected | None, bool]] = {}
    missing = []
    for delta in pack:
        shape = pack.manifest.base.tensors[delta.name].shape
        if not checkpoint.has(delta.name) or checkpoint.info(delta.name).shape != shape:
            missing.append(delta.name)
            continue
        exact = (
            strength == 1 and digest(rows for _, rows in touched_blocks(delta, checkpoint)) == pack.manifest.result[delta.name]
        )
        left_out = (others or {}).get(delta.name, np.empty(0, np.int64))
        rounded = pack.manifest.base.tensors[delta.name].quantized
        found[delta.name] = (None if exact else _projected(delta, checkpoint, base, left_out, rounded=rounded)), exact
    unsure = [one for one, _ in found.values() if one is not None and len(one.rows)]
    by = "digests" if not unsure else "base" if base is not None else "sketches"
    share, error = _fit(unsure)
    if not unsure and found:
        share, error = strength, 0.0
    counts = {delta.name: delta.neurons for delta in pack}
    tensors = tuple(
        TensorRows(name, counts[name], True, 0, 0, (), strength, 0.0) if exact or one is None else _tensor(name, one, strength)
        for name, (one, exact) in found.items()
    )
    return Presence(by, tensors, tuple(missing), share, error, _likeness(unsure, share, base is not None))


def _projected(
    delta: TensorDelta, checkpoint: Checkpoint, base: Checkpoint | None, left_out: npt.NDArray[np.int64], *, rounded: bool
) -> _Projected:
    info = checkpoint.info(delta.name)
    parts: list[tuple[npt.NDArray[np.int64], Numbers, Numbers, Numbers, Numbers]] = []
    for part, stored in touched_blocks(delta, checkpoint):
        keep = ~np.isin(rows_of(delta, part), left_out)
        places = rows_of(delta, part)[keep]
        rows, change = (
            info.decoded(stored)[keep].astype(np.float64),
            delta.dense(part.start, part.stop)[keep].astype(np.float64),
        )
        products = np.stack([(rows * rows).sum(1), (rows * change).sum(1), (change * change).sum(1)], axis=1)
        if base is None:
            signs = sketch_signs(rows.shape[1]).T.astype(np.float64)
            # Divided by two, the length of four projections estimates that of the vector.
            scale = math.sqrt(SKETCHES)
            parts.append(
                (places, rows @ signs / scale, change @ signs / scale, delta.sketch[part][keep] / np.float64(scale), products)
            )
        else:
            moved = rows - float_rows(base, delta.name, rows_of(delta, part))[keep]
            along, size = _along(moved, change)
            parts.append((places, along, size, np.zeros_like(along), products))
    numbers, moved_by, deltas, sketches, products = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Projected(numbers, moved_by, deltas, sketches, products, info.plain, rounded or not info.plain)


def _along(moved: FloatArray | Numbers, change: Numbers) -> tuple[Numbers, Numbers]:
    """What rows moved by, as (along the delta, beside it), and the delta in these coordinates: (its length, 0)."""
    length = np.sqrt((change * change).sum(1))
    along = np.divide((moved * change).sum(1), length, out=np.zeros_like(length), where=length > 0)
    beside = np.sqrt(np.maximum((moved * moved).sum(1) - along * along, 0))
    return np.stack([along, beside], axis=1), np.stack([length, np.zeros_like(length)], axis=1)


def _fit(tensors: Sequence[_Projected]) -> tuple[float | None, float | None]:
    """(factor of the deltas that fits best, its standard error); rows count by their norm, as in the sketches.

    Of plain numbers, rows that are far from the fit count less (Cauchy weights): what a few of them hold is in the count of
    overwritten rows, and the share describes the others. Rounded rows all count: noise cannot be told from a change there.
    """
    share, above, below, left, count = 1.0, 0.0, 0.0, 0.0, 0.0
    for _ in range(_ROUNDS if tensors else 0):
        above = below = left = count = 0.0
        for one in tensors:
            weights, norms = _weights(one, share), one.norms(share)
            change, target = one.delta / norms, one.rows / norms - one.base
            above += float((weights * target * change).sum())
            below += float((weights * change * change).sum())
            left += float((weights * (target - share * change) ** 2).sum())
            count += float(weights.sum()) * change.shape[1]
        if not (below > 0 and math.isfinite(above)):
            return None, None
        before, share = share, min(max(above / below, -4.0), 4.0)
        if abs(share - before) < 1e-6:
            break
    return (share, math.sqrt(left / max(1.0, count - 1) / below)) if below > 0 else (None, None)


def _weights(one: _Projected, share: float) -> Numbers:
    """[rows, 1]: how much each row counts; rows that are not finite do not."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        gaps = np.sqrt(((one.gaps(share) / one.norms(share)) ** 2).sum(1, keepdims=True))
        finite = np.isfinite(gaps)
        if not one.plain or not finite.any():
            alike: Numbers = finite.astype(np.float64)
            return alike
        scale = 3 * max(float(np.median(gaps[finite])), VISIBLE / 3)
        weights: Numbers = np.where(finite, 1 / (1 + (gaps / scale) ** 2), 0.0)
        return weights


def _tensor(name: str, one: _Projected, strength: float) -> TensorRows:
    """The rows of one tensor: fitted for themselves, and compared with `strength` of the delta."""
    share, _ = _fit([one] if len(one.rows) else [])
    sizes = np.sqrt(one.products[:, 2])
    change = np.sqrt((one.gaps(strength if share is None else share) ** 2).sum(1))
    whole = float(np.sqrt((sizes**2).sum()))
    relative = float(np.sqrt((change**2).sum())) / whole if whole > 0 else None
    apart = np.sqrt((one.gaps(strength) ** 2).sum(1))
    lengths, norms = np.sqrt((one.delta**2).sum(1)), one.norms(strength)[:, 0]
    visible = VISIBLE
    if one.rounded and len(apart):
        if not np.median(apart) <= _QUIET * np.median(lengths):
            return TensorRows(name, len(one.rows), False, None, None, None, share, relative)
        visible = max(VISIBLE, _NOISE * float(np.median(apart / norms)))
    # NaN, from rows that are not finite, counts as changed.
    changed = ~(apart <= visible * norms)
    lost = changed & ~(apart < OVERWRITTEN * abs(strength) * lengths)
    where = tuple(one.places[lost].tolist())
    return TensorRows(name, len(one.rows), False, int(changed.sum()), len(where), where, share, relative)


def _likeness(tensors: Sequence[_Projected], share: float | None, with_base: bool) -> float:
    """Correlation of the base's sketches with those of the rows without the pack; 1 where there is nothing to compare."""
    if with_base or not tensors:
        return 1.0
    part = share or 0.0
    both = ours = theirs = 0.0
    for one in tensors:
        weights, found = _weights(one, part), (one.rows - part * one.delta) / one.norms(part)
        found = np.where(weights > 0, found, 0.0)
        both += float((weights * found * one.base).sum())
        ours += float((weights * one.base * one.base).sum())
        theirs += float((weights * found * found).sum())
    return both / math.sqrt(ours * theirs) if ours * theirs > 0 else 0.0
