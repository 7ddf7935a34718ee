"""Sketches: whether rows that no digest can recognise are those of a pack's base."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.pack import TensorIdentity
from nestpatch.patcher.findings import Evidence
from nestpatch.rows import BLOCK_TYPES, SKETCH_MATCH, FloatArray, Rows, sketch, sketch_correlation
from nestpatch.values import dataclass

_COARSE_MATCH = 0.85
"""SKETCH_MATCH for types of under four bits, which round more coarsely."""
_SHARED = 0.1
"""From this share of the base's rows on, a file of its own quantized type is the base with changes. Of a file by another
quantizer, one row in thousands has the base's sketch by chance; of the patched base, those whose change was rounded away."""


def least_likeness(info: TensorInfo, identity: TensorIdentity) -> float:
    """The correlation from which sketches of two types are those of the same rows."""
    elements, nbytes = BLOCK_TYPES.get(identity.dtype, (1, 2))
    return _COARSE_MATCH if min(info.coding.bits, 8 * nbytes / elements) < 4 else SKETCH_MATCH


@dataclass(frozen=True)
class Likeness:
    """How rows compare with the base's sketches."""

    as_is: float
    """Correlation of the rows."""
    without: float
    """Correlation of the rows with the pack's change subtracted."""
    evidence: Evidence
    """Whether the pack is in the rows."""


def likeness_of(delta: TensorDelta, blocks: Iterable[tuple[slice, FloatArray]]) -> Likeness:
    """Compares the numbers of the touched rows with the base's sketches, block by block."""
    as_is, without = [], []
    for part, plain in blocks:
        as_is.append(sketch(plain))
        without.append(sketch(plain - delta.dense(part.start, part.stop)))
    found, reverted = np.concatenate(as_is), np.concatenate(without)
    origin, near, far = (one.astype(np.float64) for one in (delta.sketch, found, reverted))
    to_base, to_patched, between = (float(np.square(gap).sum()) for gap in (near - origin, far - origin, near - far))
    evidence = Evidence.of(to_base, to_patched, between, origin.size)
    return Likeness(sketch_correlation(delta.sketch, found), sketch_correlation(delta.sketch, reverted), evidence)


def kept_rows(delta: TensorDelta, found: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    """Which rows have the sketches of the base's rows, to the last digit."""
    ours, theirs = delta.sketch.astype(np.float32), found.astype(np.float32)
    with np.errstate(invalid="ignore"):
        apart = np.abs(ours - theirs) > np.spacing(np.abs(delta.sketch)).astype(np.float32)
    kept: npt.NDArray[np.bool_] = ~(apart | np.isnan(theirs)).any(axis=1)
    return kept


def is_altered(delta: TensorDelta, kept: npt.NDArray[np.bool_]) -> bool:
    """Whether enough rows are the base's to say that the file is the base, with changes. Rows of zeros are in any file."""
    shared = int((kept & delta.sketch.any(axis=1)).sum())
    return shared >= max(1.0, _SHARED * delta.neurons)


def is_nearest(delta: TensorDelta, identity: TensorIdentity, info: TensorInfo, rows: Rows) -> bool:
    """Whether float rows are a quantized base by their sketches, and nearer to it than with the pack added or subtracted.

    Any undo record leads from float rows to rows that merging turns into them again: from the base itself to the base without
    the pack's change, for one.
    """
    sketches: list[list[npt.NDArray[np.float16]]] = [[], [], []]
    for part in info.blocks(delta.neurons, 4 * info.shape[-1]):
        plain, change = info.decoded(rows[part]), delta.dense(part.start, part.stop)
        for found_here, sign in zip(sketches, (0, 1, -1), strict=True):
            found_here.append(sketch(plain + np.float32(sign) * change))
    found = [np.concatenate(blocks) for blocks in sketches]
    gaps = [float(np.square(one.astype(np.float64) - delta.sketch.astype(np.float64)).sum()) for one in found]
    return sketch_correlation(delta.sketch, found[0]) >= least_likeness(info, identity) and gaps[0] <= min(gaps)
