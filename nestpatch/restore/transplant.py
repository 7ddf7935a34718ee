"""Rows of an aligned model put into a fine-tune of it, where the fine-tuning turned away from the alignment.

The idea is that of NLSR (arXiv 2412.12497), which replaces neurons that are dissimilar from those of a safety reference. Here
whole rows are compared by the cosine of what the fine-tune and the reference changed, and a share is deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nestpatch.compare.extract import described
from nestpatch.errors import DataError, RestorationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows
from nestpatch.pack import Label
from nestpatch.restore._models import matrices, open_models
from nestpatch.restore._rows import Made, Selection, first_rows, pack_rows, require_room, row_changes, stored_as, write_pack
from nestpatch.restore.result import Restored
from nestpatch.rows import Rows


class _Models(NamedTuple):
    tuned: Checkpoint
    base: Checkpoint
    aligned: Checkpoint


def transplant(
    tuned: str | Path,
    base: str | Path,
    reference: str | Path,
    output: str | Path,
    label: Label,
    *,
    cosine: float | None = None,
    share: float | None = None,
    extrapolate: float = 0.0,
    tensors: Sequence[str] = (),
    on_event: OnEvent = ignore,
) -> Restored:
    """Writes the pack that gives rows of a fine-tune the content that they have in an aligned model.

    For every row that the alignment changed, the cosine of TUNED - BASE and REFERENCE - BASE says whether the fine-tune kept
    that change. Rows where it is low get REFERENCE + extrapolate * (REFERENCE - BASE).

    Args:
        tuned: The fine-tune: the base of the pack.
        base: The model before the alignment.
        reference: The aligned model; also `base` with a pack merged.
        output: The `.nest` file to write; must not exist.
        label: Name, version and other facts of the pack.
        cosine: Rows with a cosine below this, from -1 to 1, are replaced; 1 means all that differ.
        share: Instead of `cosine`: this share of the rows, those with the lowest cosine. With neither, all rows are replaced.
        extrapolate: How far the alignment is continued beyond the reference.
        tensors: Globs of the matrices; none for all of the feed-forward blocks.
        on_event: Called with the progress.

    Returns:
        What the pack changes, and how many rows the merge does not give the reference's stored values exactly.

    Raises:
        DataError: A setting or the label is not valid, or no matrix matches.
        OutputError: The output exists or cannot be written.
        RestorationError: The models do not match, nothing is to be replaced, or it is too much for a pack.
        CheckpointError: A model cannot be read.
        BusyError: Another process is writing one of the models.
    """
    _check(cosine, share, extrapolate)
    label.check()
    output = Path(output)
    check_output(output)
    roles = open_models({"TUNED": tuned, "BASE": base, "REFERENCE": reference})
    names = matrices(roles, tensors)
    models = _Models(*roles.values())
    candidates, chosen = _choose(models, names, cosine, share, on_event)
    require_room(models.tuned, chosen)
    made = []
    for number, name in enumerate(names, start=1):
        if len(chosen[name]):
            packed, inexact = pack_rows(models.tuned, name, chosen[name], partial(_wanted, models, name, extrapolate))
            made += [Made(packed, len(candidates[name]), inexact)] if packed is not None else []
        on_event(Event("pack", number, len(names), name))
    settings = {"cosine": cosine, "share": share, "extrapolate": extrapolate}
    facts = {
        **{name: value for name, value in settings.items() if value is not None},
        "before_alignment": described(models.base.path)[0],
        "reference": described(models.aligned.path)[0],
        "decisions": {"source": "rows of the reference where the fine-tune left the alignment (NLSR, arXiv 2412.12497)"},
    }
    return write_pack("transplant", models.tuned, made, label, output, facts)


def _check(cosine: float | None, share: float | None, extrapolate: float) -> None:
    if cosine is not None and share is not None:
        raise DataError("cosine and share are two ways to choose rows: give one of them")
    if cosine is not None and not -1 <= cosine <= 1:
        raise DataError(f"a cosine is between -1 and 1, got {cosine}")
    if share is not None and not 0 < share <= 1:
        raise DataError(f"a share of the rows is above 0 and at most 1, got {share}")
    if not (math.isfinite(extrapolate) and -1 < extrapolate <= 10):
        raise DataError(f"extrapolate is above -1 and at most 10, got {extrapolate}")


def _choose(
    models: _Models, names: Sequence[str], cosine: float | None, share: float | None, on_event: OnEvent
) -> tuple[Selection, Selection]:
    """(rows that the alignment changed, those of them that are replaced), by matrix."""
    cosines, candidates = {}, {}
    for number, name in enumerate(names, start=1):
        found = row_changes(*models, name)
        cosines[name], candidates[name] = found.cosine, found.candidates
        on_event(Event("compare", number, len(names), name))
    if not any(map(len, candidates.values())):
        raise RestorationError(
            f"{models.aligned.path} and {models.base.path} hold the same rows in {len(names)} matrices",
            advice="The reference is the aligned model, the base the one before its alignment. Or give other tensors.",
        )
    if cosine is not None and cosine < 1:
        return candidates, {name: rows[cosines[name][rows] < cosine] for name, rows in candidates.items()}
    return candidates, first_rows(cosines, candidates, share or 1.0)


def _wanted(models: _Models, name: str, extrapolate: float, rows: IntArray) -> Rows:
    """What rows of the fine-tune are to hold."""
    if not extrapolate:
        return models.aligned.read_rows(name, rows)
    aligned, base = (float_rows(model, name, rows) for model in (models.aligned, models.base))
    with np.errstate(over="ignore", invalid="ignore"):
        return stored_as(models.tuned.info(name), aligned + np.float32(extrapolate) * (aligned - base))
