"""Rows of a fine-tune blended with their projection on the direction of the alignment (FGSN, also MSCP, arXiv 2508.09190)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.compare.extract import described
from nestpatch.errors import DataError, RestorationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows, row_blocks
from nestpatch.gate import PackLike, look
from nestpatch.pack import Label
from nestpatch.restore._models import matrices, open_models
from nestpatch.restore._rows import Made, Selection, first_rows, pack_rows, require_room, row_changes, stored_as, write_pack
from nestpatch.restore.result import Restored
from nestpatch.rows import FloatArray

MOST = 0.1
"""Share of the rows that the alignment changed which counts as those that it changed most."""


def project(
    tuned: str | Path,
    base: str | Path,
    aligned: str | Path,
    output: str | Path,
    label: Label,
    *,
    share: float,
    rows: PackLike | None = None,
    tensors: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> Restored:
    """Writes the pack that blends rows with their projection: W_r <- (1 - c) W_r + c (D D^T W)_r / numel(D).

    D is ALIGNED - BASE.

    Args:
        tuned: The fine-tune: the base of the pack.
        base: The model before the alignment.
        aligned: The model after it.
        output: The `.nest` file to write; must not exist.
        label: Name, version and other facts of the pack.
        share: c, above 0 and at most 1.
        rows: The rows are those that this pack changes; None for the tenth of all rows that the alignment changed most.
        tensors: Globs of the matrices; none for all of the feed-forward blocks.
        on_event: Called with the progress.

    Returns:
        What the pack changes.

    Raises:
        DataError: A setting or the label is not valid, or no matrix matches.
        OutputError: The output exists or cannot be written.
        RestorationError: The models do not match, or nothing is to be changed.
        CheckpointError: A model cannot be read.
    """
    if not 0 < share <= 1:
        raise DataError(f"the share of the projection is above 0 and at most 1, got {share}")
    label.check()
    output = Path(output)
    check_output(output)
    models = open_models({"TUNED": tuned, "BASE": base, "ALIGNED": aligned})
    names = matrices(models, tensors)
    chosen = _selection(rows, names) if rows is not None else _most_changed(models, names)
    require_room(models["TUNED"], chosen)
    made = []
    for number, name in enumerate(names, start=1):
        if len(masked := chosen.get(name, np.empty(0, np.int64))):
            packed, inexact = _blended(models, name, masked, share)
            made += [Made(packed, len(masked), inexact)] if packed is not None else []
        on_event(Event("project", number, len(names), name))
    facts: dict[str, Any] = {
        "share": share,
        "before_alignment": described(models["BASE"].path)[0],
        "aligned": described(models["ALIGNED"].path)[0],
        "decisions": {"source": "rows projected on the alignment (FGSN, arXiv 2508.09190)"},
    }
    return write_pack("project", models["TUNED"], made, label, output, facts)


def _selection(rows: PackLike, names: Sequence[str]) -> Selection:
    pack = look(rows).pack
    found = {delta.name: delta.rows.astype(np.int64) for delta in pack if delta.name in names}
    if not found:
        raise RestorationError(f"{pack.label} changes none of the {len(names)} matrices", advice="Name others with --tensor.")
    return found


def _most_changed(models: Mapping[str, Checkpoint], names: Sequence[str]) -> Selection:
    changes = {name: row_changes(models["TUNED"], models["BASE"], models["ALIGNED"], name) for name in names}
    candidates = {name: found.candidates for name, found in changes.items()}
    return first_rows({name: -found.aligned for name, found in changes.items()}, candidates, MOST)


def _blended(models: Mapping[str, Checkpoint], name: str, masked: IntArray, share: float) -> Any:
    projected = projection(models["TUNED"], models["BASE"], models["ALIGNED"], name, masked)

    def wanted(part: IntArray) -> Any:
        now = float_rows(models["TUNED"], name, part)
        where = np.searchsorted(masked, part)
        return stored_as(models["TUNED"].info(name), np.float32(1 - share) * now + np.float32(share) * projected[where])

    return pack_rows(models["TUNED"], name, masked, wanted)


def projection(tuned: Checkpoint, base: Checkpoint, aligned: Checkpoint, name: str, masked: IntArray) -> FloatArray:
    """Rows of D D^T W / numel(D), without the square matrix: D_masked D^T W is summed over blocks of rows.

    Args:
        tuned: Has W.
        base: D is ALIGNED - BASE.
        aligned: The other side of D.
        name: The matrix.
        masked: Which rows, sorted.

    Returns:
        float32 [masked, in_features].
    """
    info = tuned.info(name)
    ours = float_rows(aligned, name, masked) - float_rows(base, name, masked)
    total = np.zeros_like(ours)
    for part in row_blocks(info.rows, 16 * (info.shape[-1] + len(masked))):
        block = np.arange(part.start, part.stop)
        change = float_rows(aligned, name, block) - float_rows(base, name, block)
        if change.any():
            total += (ours @ change.T) @ float_rows(tuned, name, block)
    return total / np.float32(info.rows * info.shape[-1])
