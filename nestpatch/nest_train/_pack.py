"""The stage pack: what was trained, as the pack of the base's files.

Public in the room: `packed`, `created` and `write`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.detector import Detector
from nestpatch.errors import CheckpointError, MissingExtraError
from nestpatch.formats import nest
from nestpatch.nest_train._digests import digest_json
from nestpatch.nest_train._neurons import Clusters, Selection
from nestpatch.nest_train._record import versions
from nestpatch.nest_train._run import Run
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.result import Trained
from nestpatch.pack import Label, Pack, creation_time, is_utc_time
from nestpatch.packing import PackedTensor, build_pack, pack_tensor
from nestpatch.rows import DTYPES
from nestpatch.runtimes.chat_form import read_chat_form

if TYPE_CHECKING:
    from nestpatch.nest_train._deltas import DeltaSet
    from nestpatch.nest_train._tune_state import TuneResult


def packed(
    run: Run,
    data: TrainingData,
    layers: Sequence[tuple[Selection, Clusters]],
    deltas: DeltaSet,
    result: TuneResult,
    label: Label,
    evaluation: dict[str, Any],
    detector: Detector | None = None,
) -> Pack:
    """The stage pack: rounds the deltas to the type in which they are stored, and builds the pack.

    Args:
        run: The base.
        data: What it was trained on.
        layers: From `find_layers`.
        deltas: What was trained; rounded in place, so that what is evaluated is what ships.
        result: From `fit`.
        label: Name, version and other facts of the pack.
        evaluation: What was measured, for the manifest.
        detector: From `find_layers`.

    Returns:
        The pack.

    Raises:
        CheckpointFormatError: A tensor on disk is not the weight that was loaded from it.
    """
    deltas.round_to(run.recipe.delta_dtype)
    return build_pack(
        _pack_tensors(run, deltas),
        label,
        model_id=run.source.model_id,
        revision=run.source.revision,
        architecture=type(run.model).__name__,
        method=_method(run, data, layers, result),
        evaluation=evaluation,
        detector=detector,
    )


def _pack_tensors(run: Run, deltas: DeltaSet) -> list[PackedTensor]:
    """Packs every trained delta, for the tensors on disk that the weight was loaded from."""
    packed = []
    for projection, module in deltas.places:
        rows, groups = module.numbers, module.labels
        run.stored.require_same(projection.weight_name, rows)
        delta = module.delta.detach().float().cpu().numpy().astype(DTYPES[run.recipe.delta_dtype])
        for some in run.stored.split(projection.weight_name, rows):
            # An expert that has a tensor of its own needs the vectors of its own neurons alone.
            used, labels = np.unique(groups[some.part], return_inverse=True)
            packed.append(pack_tensor(run.checkpoint, some.tensor, some.rows, delta[used], cluster=labels))
    return packed


def _method(run: Run, data: TrainingData, layers: Sequence[tuple[Selection, Clusters]], result: TuneResult) -> dict[str, Any]:
    """How the pack was made: enough to make it again."""
    facts = [
        {
            "layer": s.layer,
            "probe_accuracy": round(s.accuracy, 4),
            "neurons": len(s.neurons),
            "clusters": c.k,
            "silhouette": None if c.silhouette is None else round(c.silhouette, 4),
        }
        for s, c in layers
    ]
    return {
        "name": "NeST",
        "source": "arXiv:2602.16835",
        "recipe": run.recipe.as_json(),
        "decisions": run.decisions,
        "data": data.facts(),
        "chat": _chat_facts(run.source.path),
        "layers": facts,
        "tuning": {
            "steps": result.steps,
            "kept_step": result.kept.step,
            "held_out": [look.as_json() for look in result.looks],
            "stopped": result.reason,
        },
        "versions": versions(),
    }


def _chat_facts(base: Path) -> dict[str, Any]:
    """The form in which the base reads prompts, for `nestpatch doctor`; empty where it cannot be told.

    The training has used the tokenizer's own rendering: what fails here must not cost a trained pack.
    """
    try:
        return read_chat_form(base).facts()
    except (CheckpointError, MissingExtraError):
        return {}


def created(run: Run, pack: Pack, request: Mapping[str, Any]) -> Pack:
    """The pack with the time at which this training first made it, so that going on later does not change its bytes."""
    when = {"request": digest_json(request), "time": os.environ.get("SOURCE_DATE_EPOCH")}
    created = run.run_dir.value("created", when, creation_time, _time)
    return dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, created=created))


def _time(text: Any) -> str:
    if not isinstance(text, str) or not is_utc_time(text):
        raise ValueError("it is no time")
    return text


def write(run: Run, trained: Trained, request: Mapping[str, Any], *, overwrite: bool) -> None:
    """Writes the pack, and a copy of it into the run directory."""
    run.run_dir.keep_written(trained.pack_id, request)
    if run.run_dir.folder is not None:
        nest.write(trained.pack, run.run_dir.folder / "pack.nest", overwrite=True)
    if trained.output is not None:
        nest.write(trained.pack, trained.output, overwrite=overwrite)
