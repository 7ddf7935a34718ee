"""Rows of models side by side: how the alignment and the fine-tuning changed them, and the pack that gives rows new content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch import __version__
from nestpatch.compare.extract import described
from nestpatch.errors import PackContentError, RestorationError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo, float_rows, row_blocks
from nestpatch.pack import Label
from nestpatch.packing import PackedTensor, as_merged, build_pack, pack_tensor
from nestpatch.restore.result import Restored, RestoredTensor
from nestpatch.rows import DTYPES, FloatArray, Rows, merge

Doubles = npt.NDArray[np.float64]
Selection = Mapping[str, IntArray]
"""Matrix -> sorted row numbers."""
MAX_BYTES = 512 << 20
"""Bytes of all deltas together: they are held in memory, and written from there."""
_MAX_ROWS = 65_536
"""Rows of one matrix that can each have a delta of its own."""


@dataclass(frozen=True, eq=False)
class RowChanges:
    """How an alignment and a fine-tuning changed the rows of a matrix."""

    candidates: IntArray
    """The numbers of the rows that the alignment changed, sorted."""
    cosine: Doubles
    """Of TUNED - BASE and ALIGNED - BASE, [rows]; 0 where either is zero."""


def row_changes(tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint, name: str) -> RowChanges:
    """Compares the rows of one matrix in three models, a block at a time.

    Args:
        tuned: The fine-tune.
        base: The model before the alignment.
        aligned: The model after it.
        name: The matrix.

    Returns:
        The changes of every row.

    Raises:
        CheckpointFormatError: A file ends inside the matrix.
        RestorationError: A row holds NaN or infinity.
    """
    info = tuned.info(name)
    changed, cosine = np.empty(info.rows, np.bool_), np.empty(info.rows)
    for part in row_blocks(info.rows, 32 * info.shape[-1]):
        rows = np.arange(part.start, part.stop)
        ours, theirs, start = (float_rows(model, name, rows) for model in (tuned, aligned, base))
        u, v = (ours - start).astype(np.float64), (theirs - start).astype(np.float64)
        lengths = norms(u), norms(v)
        if not (np.isfinite(lengths[0]).all() and np.isfinite(lengths[1]).all()):
            raise RestorationError(f"{name}: a row of one of the models holds NaN or infinity", advice="Give intact models.")
        changed[part], product = lengths[1] > 0, lengths[0] * lengths[1]
        cosine[part] = np.divide(np.einsum("ij,ij->i", u, v), product, out=np.zeros_like(product), where=product > 0)
    return RowChanges(np.flatnonzero(changed), cosine)


def norms(rows: Rows) -> Doubles:
    """Euclidean norms of rows, float64 [rows]."""
    wide = rows.astype(np.float64, copy=False)
    lengths: Doubles = np.sqrt(np.einsum("ij,ij->i", wide, wide))
    return lengths


def first_rows(values: Mapping[str, Doubles], candidates: Selection, share: float) -> dict[str, IntArray]:
    """The rows with the lowest values, over all matrices.

    Args:
        values: Matrix -> a value for each of its rows.
        candidates: Matrix -> the rows to choose from.
        share: How many of them, above 0 and at most 1; rounded up. Ties go to the first matrix and row.

    Returns:
        Matrix -> the chosen rows, sorted.
    """
    numbers = np.concatenate([candidates[name] for name in candidates])
    owner = np.repeat(np.arange(len(candidates)), [len(rows) for rows in candidates.values()])
    keys = np.concatenate([values[name][rows] for name, rows in candidates.items()])
    chosen = np.argsort(keys, kind="stable")[: int(np.ceil(share * len(keys)))]
    return {name: np.sort(numbers[chosen[owner[chosen] == place]]) for place, name in enumerate(candidates)}


def require_room(model: Checkpoint, chosen: Selection) -> None:
    """Checks, before any delta is computed, that a pack can hold one delta for each row.

    Args:
        model: The model that the pack is for.
        chosen: The rows.

    Raises:
        RestorationError: It cannot, or there are none.
    """
    nbytes = sum(4 * len(rows) * model.info(name).shape[-1] for name, rows in chosen.items())
    if not nbytes:
        raise RestorationError(
            f"no row of {model.path} is to be changed", advice="Nothing is to be restored with these settings."
        )
    most = max(chosen, key=lambda name: len(chosen[name]))
    if nbytes > MAX_BYTES or len(chosen[most]) > _MAX_ROWS:
        raise RestorationError(
            f"the pack would take {nbytes / 1e6:.0f} MB ({len(chosen[most])} rows of {most})",
            advice=f"At most {MAX_BYTES / 1e6:.0f} MB, and {_MAX_ROWS} rows of a matrix: choose fewer rows or tensors.",
        )


def stored_as(info: TensorInfo, rows: FloatArray) -> Rows:
    """Rows in the form in which a matrix is stored.

    Args:
        info: The matrix.
        rows: float32 [rows, in_features].

    Returns:
        The rows, rounded to nearest, or quantized.
    """
    return merge(np.zeros(rows.shape, DTYPES[info.dtype]), rows) if info.plain else info.coding.encode(rows)


def pack_rows(
    model: Checkpoint, name: str, rows: IntArray, wanted: Callable[[IntArray], Rows]
) -> tuple[PackedTensor | None, int]:
    """Packs the deltas that give rows new content, each row its own.

    Args:
        model: The model that the pack is for.
        name: The matrix.
        rows: Sorted row numbers.
        wanted: Row numbers -> what these rows are to hold, as the model stores it.

    Returns:
        (the packed matrix, or None where all rows hold what is wanted already; rows that the merge does not give it exactly).

    Raises:
        RestorationError: A row is to become infinite, or NaN.
    """
    info = model.info(name)
    delta, wrong = np.empty((len(rows), info.shape[-1]), np.float32), 0
    for part in row_blocks(len(rows), 32 * info.shape[-1]):
        try:
            delta[part], inexact = _exact_delta(info, model.read_rows(name, rows[part]), wanted(rows[part]))
        except PackContentError as error:
            raise RestorationError(f"{name}: {error}") from error
        wrong += inexact
    kept = delta.any(axis=1)
    if not kept.any():
        return None, wrong
    delta = delta if kept.all() else delta[kept]
    return pack_tensor(model, name, rows[kept], delta, cluster=np.arange(len(delta))), wrong


def _exact_delta(info: TensorInfo, now: Rows, wanted: Rows) -> tuple[FloatArray, int]:
    """The deltas from some rows to others, and how many rows the merge does not give exactly."""
    old, new = info.decoded(now), info.decoded(wanted)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise PackContentError("a row holds, or is to hold, NaN or infinity")
    delta = new - old
    merged = as_merged(info, now, delta)
    if info.plain:
        # The difference was rounded to float32; what the merge is off by repairs nearly all of that.
        delta += new - info.decoded(merged)
        merged = as_merged(info, now, delta)
    # Not by bytes: -0 plus a delta of 0 is +0.
    return delta, int((info.decoded(merged) != new).any(axis=1).sum())


@dataclass(frozen=True)
class Made:
    """One matrix of the pack that is made."""

    packed: PackedTensor
    considered: int
    inexact: int = 0
    moved: int = 0


def write_pack(
    method: str, model: Checkpoint, tensors: Sequence[Made], label: Label, output: Path, facts: Mapping[str, Any]
) -> Restored:
    """Builds the pack of a restoration and writes it.

    Args:
        method: The name of the method.
        model: The model that the pack is for.
        tensors: What it changes.
        label: Name, version and other facts of the pack.
        output: The file; must not exist.
        facts: Settings and sources, plain JSON values.

    Returns:
        The result.

    Raises:
        RestorationError: No matrix is changed.
        OutputError: The output exists or cannot be written.
    """
    if not tensors:
        raise RestorationError(f"{model.path} holds the restored rows already", advice="There is nothing to restore.")
    model_id, architecture = described(model.path)
    listed = tuple(RestoredTensor(one.packed.delta.name, one.packed.delta.neurons, one.considered) for one in tensors)
    counts = {"tensors": len(listed), "rows": sum(tensor.rows for tensor in listed)}
    stated = {"name": method, "nestpatch": __version__, **facts, **counts}
    pack = build_pack([one.packed for one in tensors], label, model_id=model_id, architecture=architecture, method=stated)
    pack_id = nest.write(pack, output)
    inexact, moved = sum(one.inexact for one in tensors), sum(one.moved for one in tensors)
    return Restored(
        method, model.path, output, pack.label, pack_id, output.stat().st_size, listed, inexact=inexact, moved=moved
    )
