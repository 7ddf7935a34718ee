"""Training from start to end, as one line of stages: load, distil, probe, select, cluster, detector, remember, tune, pack,
evaluate.

Public: `train`. `plan` in the module of that name says beforehand what a training would do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestpatch.errors import MissingExtraError
from nestpatch.evaluation.detection import detect_suites
from nestpatch.evaluation.suites import Suite
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats import nest
from nestpatch.gate import PackLike
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._digests import digest_json
from nestpatch.nest_train._evaluate import evaluate, evaluated
from nestpatch.nest_train._fit import fit
from nestpatch.nest_train._layers import busy_blocks, digest_layers, find_layers
from nestpatch.nest_train._pack import created, packed, write
from nestpatch.nest_train._run import Run, limited_threads
from nestpatch.nest_train._run_folder import open_run
from nestpatch.nest_train._targets import distil
from nestpatch.nest_train.avoid import read_avoided, require_same_base, taken_neurons
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.result import Trained, identity
from nestpatch.nest_train.track import require_tracker, tracked
from nestpatch.pack import Label, Pack

_NO_LOOKALIKES = (
    "no look-alike prompts: nothing teaches the patched model to answer harmless prompts that look harmful, "
    "and refusals of such prompts typically rise by 20-40 points; give some with --lookalike"
)
_PACKAGES = ("torch", "transformers", "accelerate", "sklearn")
"""The modules of the extra `train` that every training imports."""


def require_packages() -> None:
    """Checks that the packages of the extra `train` are installed, without importing them.

    Raises:
        MissingExtraError: One of them is not.
    """
    for module in _PACKAGES:
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError("train", f"training (module {module})")


def train(
    base: str | Path,
    data: TrainingData,
    label: Label,
    *,
    recipe: Recipe | None = None,
    suites: Sequence[Suite] = (),
    output: str | Path | None = None,
    threads: int | None = None,
    run_dir: str | Path | None = None,
    track: str | None = None,
    avoid: Sequence[PackLike] = (),
    on_event: OnEvent = ignore,
) -> Trained:
    """Trains a safety patch for a base model.

    Everything that can be checked is checked before the base is loaded. The pack is written before it is evaluated, and again
    with the numbers: an evaluation that fails costs the numbers, not the pack. The same call with the same run directory
    goes on where an earlier one was interrupted, and gives the same pack as a call that was not.

    Processes that torchrun or accelerate launch started share the work when all of them make the same call: the first one
    writes and reports, and every one returns the result.

    Args:
        base: A model directory, or a Hub id ("user/model" or "user/model@revision").
        data: The prompts to refuse and to go on answering.
        label: Name, version and other facts of the pack.
        recipe: The settings; None for the defaults.
        suites: Prompt sets to measure before and after; the numbers go into the pack.
        output: The `.nest` file to write, which must not exist unless this training wrote it; None writes nothing.
        threads: Threads to compute with; None for the libraries' own choice.
        run_dir: A directory that keeps what every stage leaves, for a training that goes on or that has other settings, and the
            record of the run; None keeps nothing.
        track: "tensorboard" or "wandb" to draw curves of the tuning there; None for neither.
        avoid: Packs for the same base whose rows the new pack leaves alone, so that it stacks with them in any order. They are
            only read, and need not be signed.
        on_event: Called with the progress.

    Returns:
        The pack and its numbers.

    Raises:
        DataError: The label, the prompts, `threads`, `track` or `avoid` are not valid.
        PackError: A file of `avoid` is not a pack.
        OutputError: The output exists, or it or the run directory cannot be written.
        BusyError: Another training uses the run directory.
        MissingExtraError: The packages of the extra `train`, or of the tracker, are not installed.
        CheckpointError: The base cannot be found, read or loaded, or its architecture is not supported.
        TrainingError: No neuron separates harmful from harmless prompts.
        OutOfMemoryError: Not even one prompt fits into memory.
    """
    require_packages()
    require_tracker(track)
    label.check()
    data.check()
    recipe, avoided = recipe or Recipe(), read_avoided(avoid, label.name, on_event)
    with _ranks.together(recipe.device):
        if not _ranks.is_first():  # it computes, and leaves files and reports to the first
            output, run_dir, track, on_event = None, None, None, ignore
        return _trained(base, data, label, recipe, suites, output, threads, run_dir, track, avoided, on_event)


def _trained(
    base: str | Path,
    data: TrainingData,
    label: Label,
    recipe: Recipe,
    suites: Sequence[Suite],
    output: str | Path | None,
    threads: int | None,
    run_dir: str | Path | None,
    track: str | None,
    avoided: Sequence[Pack],
    on_event: OnEvent,
) -> Trained:
    """`train` of one process."""
    target = None if output is None else Path(output)
    require_place(target, run_dir)
    with limited_threads(threads), open_run(run_dir, on_event) as kept:
        data = data.sampled(recipe.max_prompts, recipe.seed)
        with kept.record.timed("load"):
            run = Run.start(base, recipe, on_event, kept)
        require_same_base(avoided, run.source.path)
        request = _request(data, label, recipe, suites, avoided)
        if target is not None and not kept.wrote(target, request):
            check_output(target)
        kept.record.update(base={"model": run.source.model_id, "revision": run.source.revision, **kept.context}, **request)
        cpu, identity = run.model.device.type == "cpu", digest_json([kept.context, request])
        with tracked(track, kept.folder, recipe.as_json(), identity, on_event, cpu=cpu) as run.on_event:
            trained = _train(run, data, label, suites, target, request, avoided)
        kept.record.update(decisions=run.decisions, result=trained.as_json())
        return trained


def require_place(output: Path | None, run_dir: str | Path | None) -> None:
    """Checks that the output can be written. One that exists may be this training's own, which is known when the base is.

    Args:
        output: As for `train`.
        run_dir: As for `train`.

    Raises:
        OutputError: It cannot.
    """
    if output is not None and not (run_dir is not None and os.path.lexists(output)):
        check_output(output)


def _request(
    data: TrainingData, label: Label, recipe: Recipe, suites: Sequence[Suite], avoided: Sequence[Pack]
) -> dict[str, Any]:
    """Everything beside the base that decides which pack is made."""
    facts = [{"kind": suite.kind, **suite.prompts.facts()} for suite in suites]
    avoids = {"avoids": [nest.pack_id(pack) for pack in avoided]} if avoided else {}
    return {"label": dataclasses.asdict(label), "recipe": recipe.as_json(), "data": data.facts(), "suites": facts, **avoids}


def _train(
    run: Run,
    data: TrainingData,
    label: Label,
    suites: Sequence[Suite],
    output: Path | None,
    request: Mapping[str, Any],
    avoided: Sequence[Pack],
) -> Trained:
    """The stages, after the checks."""
    from nestpatch.nest_train._deltas import DeltaSet

    blocks, timed = run.blocks(), run.run_dir.record.timed
    if data.lookalike is None:
        run.decide("lookalike", "", _NO_LOOKALIKES)
    facts: dict[str, Any] = {}
    if seen := data.seen_in(suites):
        facts["seen_in_training"] = seen
        run.note(f"suites with training prompts: {', '.join(seen)}; their numbers say little about new prompts")
    before = evaluate(run, suites, "base-answers", "the base", {}) if suites else None
    if before is not None:
        facts |= {"judge": "keywords and references (nestpatch.evaluation.judges)", "before": before.as_json(), "after": None}
    with timed("distil"):
        examples = distil(run, data)
    blocks = busy_blocks(run, data, blocks)
    taken = taken_neurons(run.stored, blocks, avoided) if avoided else []
    if avoided:
        named = ", ".join(f"{pack.label}, sha256 {nest.pack_id(pack)[:16]}" for pack in avoided)
        run.decide("avoided", "", f"{sum(int(one.sum()) for one in taken)} neurons are left to {named}")
    layers, detector = find_layers(run, data, blocks, detector=run.recipe.detector, taken=taken)
    if detector is not None and suites:
        with timed("evaluate"):
            facts["detector"] = detect_suites(run.runtime, detector, suites).as_json()
    deltas = DeltaSet(blocks, [clusters for _, clusters in layers])
    if kinds := deltas.quantize_like(run.stored):
        run.decide("rounding", "", f"deltas are trained through the rounding to {', '.join(kinds)} of the base's file")
    result = fit(run, blocks, deltas, examples, digest_layers(layers))
    with timed("pack"):
        pack = packed(run, data, layers, deltas, result, label, facts, detector)
        pack = created(run, pack, request)
    trained = Trained(pack, *identity(pack), before, None, deltas.trainable, run.parameters, output)
    write(run, trained, request, overwrite=output is not None and run.run_dir.wrote(output, request))
    if output is not None:
        run.note(f"wrote {output}" + ("; its evaluation follows" if before is not None else ""))
    if before is None:
        return trained
    with deltas.attached():
        return evaluated(run, trained, suites, deltas, before, request)
