"""The main directions of an alignment continued beyond the aligned model (LoX, arXiv 2506.15606).

Made for an aligned model before it is fine-tuned, so that the fine-tuning undoes less; or put onto a fine-tune.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nestpatch.compare.extract import described
from nestpatch.delta import MAX_RANK
from nestpatch.errors import DataError, RestorationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats.checkpoint import Checkpoint, float_rows, row_blocks
from nestpatch.pack import Label
from nestpatch.packing import pack_tensor
from nestpatch.restore._models import matrices, open_models
from nestpatch.restore._rows import Doubles, Made, write_pack
from nestpatch.restore.result import Restored
from nestpatch.rows import FloatArray

_OVERSAMPLED = 8
"""Directions that are searched beside those that are kept, and passes over the change: Halko et al. (arXiv 0909.4061), 4.5."""
_PASSES = 2
_NEGLIGIBLE = 1e-5
"""Part of the largest singular value below which another is rounding noise."""


def extrapolate(
    aligned: str | Path,
    base: str | Path,
    output: str | Path,
    label: Label,
    *,
    rank: int,
    alpha: float,
    onto: str | Path | None = None,
    tensors: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> Restored:
    """Writes the pack that adds alpha times the part of rank `rank` of ALIGNED - BASE.

    Args:
        aligned: The aligned model: the base of the pack.
        base: The model before the alignment.
        output: The `.nest` file to write; must not exist.
        label: Name, version and other facts of the pack.
        rank: Singular directions of each matrix that are kept, at most.
        alpha: Factor of the change, above 0 and at most 10.
        onto: Another base of the pack: a fine-tune of the aligned model.
        tensors: Globs of the matrices; none for all of the feed-forward blocks.
        on_event: Called with the progress.

    Returns:
        What the pack changes.

    Raises:
        DataError: A setting or the label is not valid, or no matrix matches.
        OutputError: The output exists or cannot be written.
        RestorationError: The models do not match, or the alignment changed none of the matrices.
        CheckpointError: A model cannot be read.
        BusyError: Another process is writing one of the models.
    """
    if not 1 <= rank <= MAX_RANK:
        raise DataError(f"the rank is from 1 to {MAX_RANK}, got {rank}")
    if not (math.isfinite(alpha) and 0 < alpha <= 10):
        raise DataError(f"alpha is above 0 and at most 10, got {alpha}")
    label.check()
    output = Path(output)
    check_output(output)
    roles = {"TUNED": onto} if onto is not None else {}
    models = open_models({**roles, "ALIGNED": aligned, "BASE": base})
    names = matrices(models, tensors)
    model = next(iter(models.values()))
    made = []
    for number, name in enumerate(names, start=1):
        found = leading(models["ALIGNED"], models["BASE"], name, rank)
        if found is not None:
            made.append(_packed(model, name, *found, alpha))
        on_event(Event("directions", number, len(names), name))
    if not made:
        raise RestorationError(
            f"{models['ALIGNED'].path} and {models['BASE'].path} hold the same rows in {len(names)} matrices",
            advice="The aligned model comes first, the one before its alignment is --base. Or give other tensors.",
        )
    facts = {
        "rank": rank,
        "alpha": alpha,
        "aligned": described(models["ALIGNED"].path)[0],
        "before_alignment": described(models["BASE"].path)[0],
        "decisions": {"source": "the main directions of the alignment, extrapolated (LoX, arXiv 2506.15606)"},
    }
    return write_pack("extrapolate", model, made, label, output, facts)


def _packed(model: Checkpoint, name: str, factors: FloatArray, vectors: FloatArray, alpha: float) -> Made:
    rows = np.flatnonzero(factors.any(axis=1))
    scaled = np.float32(alpha) * factors[rows]
    return Made(pack_tensor(model, name, rows, vectors, factors=scaled), len(rows))


def leading(aligned: Checkpoint, base: Checkpoint, name: str, rank: int) -> tuple[FloatArray, FloatArray] | None:
    """The main directions of what an alignment changed in a matrix, by a randomised SVD that reads it in blocks.

    Args:
        aligned: The model after it.
        base: The model before it.
        name: The matrix.
        rank: Directions, at most.

    Returns:
        (U S, V) of the truncated SVD U S V of ALIGNED - BASE: float32 [rows, k] and [k, in_features] with k <= rank, rows of
        zeros exactly where the alignment changed nothing; None where it changed nothing at all.

    Raises:
        RestorationError: The change is not finite.
    """
    info = aligned.info(name)
    rows, width = info.rows, info.shape[-1]
    wide = min(rank + _OVERSAMPLED, rows, width)
    sides = np.random.default_rng(0).standard_normal((width, wide))
    for _ in range(_PASSES + 1):
        left = _times(aligned, base, name, sides)
        if not np.isfinite(left).all():
            raise RestorationError(f"{name}: a row of one of the models holds NaN or infinity", advice="Give intact models.")
        if not left.any():
            return None
        sides = np.linalg.qr(_transposed_times(aligned, base, name, np.linalg.qr(left)[0]))[0]
    left = _times(aligned, base, name, sides)
    _, values, right = np.linalg.svd(left, full_matrices=False)
    kept = int((values[:rank] > _NEGLIGIBLE * values[0]).sum())
    vectors = right[:kept] @ sides.T
    return _times(aligned, base, name, vectors.T).astype(np.float32), vectors.astype(np.float32)


def _changes(aligned: Checkpoint, base: Checkpoint, name: str) -> Iterator[tuple[slice, FloatArray]]:
    """ALIGNED - BASE, a block of rows at a time."""
    info = aligned.info(name)
    for part in row_blocks(info.rows, 24 * info.shape[-1]):
        rows = np.arange(part.start, part.stop)
        yield part, float_rows(aligned, name, rows) - float_rows(base, name, rows)


def _times(aligned: Checkpoint, base: Checkpoint, name: str, sides: Doubles) -> Doubles:
    """(ALIGNED - BASE) @ sides, float64 [rows, k]."""
    return np.concatenate([change @ sides for _, change in _changes(aligned, base, name)])


def _transposed_times(aligned: Checkpoint, base: Checkpoint, name: str, left: Doubles) -> Doubles:
    """(ALIGNED - BASE).T @ left, float64 [in_features, k]."""
    total = np.zeros((aligned.info(name).shape[-1], left.shape[1]))
    for part, change in _changes(aligned, base, name):
        total += change.T @ left[part]
    return total
