"""Training from start to end, as one line of stages: load, distil, probe, select, cluster, remember, tune, pack,
evaluate.

Public: `train` and its result `Trained`. `plan` in the module of that name says beforehand what a training would do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointError, MissingExtraError
from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.dose import Dose, DosePoint, dose_json
from nestpatch.evaluation.scores import Scores, evaluate_suites
from nestpatch.evaluation.suites import Suite
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats import nest
from nestpatch.gate import PackLike
from nestpatch.measured import BENIGN
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._fit import fit
from nestpatch.nest_train._layers import busy_blocks, digest_layers, find_clusters
from nestpatch.nest_train._neurons import Clusters, Selection
from nestpatch.nest_train._record import versions
from nestpatch.nest_train._run import Run, limited_threads
from nestpatch.nest_train._run_dir import digest_json, open_run
from nestpatch.nest_train._targets import distil
from nestpatch.nest_train.avoid import read_avoided, require_same_base, taken_neurons
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.track import require_tracker, tracked
from nestpatch.pack import Label, Pack, creation_time, is_utc_time
from nestpatch.packing import PackedTensor, build_pack, pack_tensor
from nestpatch.rows import DTYPES
from nestpatch.runtimes.chat_form import read_chat_form

if TYPE_CHECKING:
    from nestpatch.nest_train._deltas import DeltaSet
    from nestpatch.nest_train._tune_state import TuneResult

_NO_LOOKALIKES = (
    "no look-alike prompts: nothing teaches the patched model to answer harmless prompts that look harmful, "
    "and refusals of such prompts typically rise by 20-40 points; give some with --lookalike"
)
_PACKAGES = ("torch", "transformers", "accelerate", "sklearn")
"""The modules of the extra `train` that every training imports."""


@dataclass(frozen=True, eq=False)
class Trained:
    """The result of a training.

    Attributes:
        pack: The pack, with the numbers of the evaluation in its manifest.
        pack_id: SHA-256 of its file.
        nbytes: Size of its file.
        before: The numbers of the base; None where no suites were given.
        after: The numbers of the base with the pack; None where no suites were given, or where the evaluation failed.
        trained_parameters: Number of trained values.
        model_parameters: Number of parameters of the base.
        output: The file of the pack; None where no output was given.
        problem: Why the pack, or where `after` is there its dose curve, could not be evaluated; None where nothing failed.
    """

    pack: Pack
    pack_id: str
    nbytes: int
    before: Scores | None
    after: Scores | None
    trained_parameters: int
    model_parameters: int
    output: Path | None = None
    problem: str | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against the pack, by the numbers in its manifest: one sentence each, with the number."""
        return concerns(self.pack.manifest.evaluation)

    @property
    def dose(self) -> Dose | None:
        """The dose curve in its manifest; None where the recipe has no `dose_strengths`."""
        return Dose.from_json(self.pack.manifest.evaluation.get("dose"))

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given. What was not measured is null.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "output": None if self.output is None else str(self.output),
            "pack": self.pack.label,
            "pack_id": self.pack_id,
            "bytes": self.nbytes,
            "trained_parameters": self.trained_parameters,
            "model_parameters": self.model_parameters,
            "before": None if self.before is None else self.before.as_json(),
            "after": None if self.after is None else self.after.as_json(),
            "warnings": list(self.warnings),
            "problem": self.problem,
            **dose_json(self.dose),
        }


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
    before = _evaluate(run, suites, "base-answers", "the base", {}) if suites else None
    if before is not None:
        facts |= {"judge": "keywords and references (nestpatch.evaluation.judges)", "before": before.as_json(), "after": None}
    with timed("distil"):
        examples = distil(run, data)
    blocks = busy_blocks(run, data, blocks)
    taken = taken_neurons(run.stored, blocks, avoided) if avoided else []
    if avoided:
        named = ", ".join(f"{pack.label}, sha256 {nest.pack_id(pack)[:16]}" for pack in avoided)
        run.decide("avoided", "", f"{sum(int(one.sum()) for one in taken)} neurons are left to {named}")
    layers = find_clusters(run, data, blocks, taken=taken)
    deltas = DeltaSet(blocks, [clusters for _, clusters in layers])
    if kinds := deltas.quantize_like(run.stored):
        run.decide("rounding", "", f"deltas are trained through the rounding to {', '.join(kinds)} of the base's file")
    result = fit(run, blocks, deltas, examples, digest_layers(layers))
    with timed("pack"):
        pack = packed(run, data, layers, deltas, result, label, facts)
        pack = _created(run, pack, request)
    trained = Trained(pack, *_identity(pack), before, None, deltas.trainable, run.parameters, output)
    _write(run, trained, request, overwrite=output is not None and run.run_dir.wrote(output, request))
    if output is not None:
        run.note(f"wrote {output}" + ("; its evaluation follows" if before is not None else ""))
    if before is None:
        return trained
    with deltas.attached():
        return _evaluated(run, trained, suites, deltas, before, request)


def packed(
    run: Run,
    data: TrainingData,
    layers: Sequence[tuple[Selection, Clusters]],
    deltas: DeltaSet,
    result: TuneResult,
    label: Label,
    evaluation: dict[str, Any],
) -> Pack:
    """The stage pack: rounds the deltas to the type in which they are stored, and builds the pack.

    Args:
        run: The base.
        data: What it was trained on.
        layers: From `find_clusters`.
        deltas: What was trained; rounded in place, so that what is evaluated is what ships.
        result: From `fit`.
        label: Name, version and other facts of the pack.
        evaluation: What was measured, for the manifest.

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
    )


def _created(run: Run, pack: Pack, request: Mapping[str, Any]) -> Pack:
    """The pack with the time at which this training first made it, so that going on later does not change its bytes."""
    when = {"request": digest_json(request), "time": os.environ.get("SOURCE_DATE_EPOCH")}
    created = run.run_dir.value("created", when, creation_time, _time)
    return dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, created=created))


def _time(text: Any) -> str:
    if not isinstance(text, str) or not is_utc_time(text):
        raise ValueError("it is no time")
    return text


def _write(run: Run, trained: Trained, request: Mapping[str, Any], *, overwrite: bool) -> None:
    """Writes the pack, and a copy of it into the run directory."""
    run.run_dir.keep_written(trained.pack_id, request)
    if run.run_dir.folder is not None:
        nest.write(trained.pack, run.run_dir.folder / "pack.nest", overwrite=True)
    if trained.output is not None:
        nest.write(trained.pack, trained.output, overwrite=overwrite)


def _evaluate(run: Run, suites: Sequence[Suite], keep: str, note: str, inputs: Mapping[str, Any]) -> Scores:
    with run.run_dir.record.timed("evaluate"):
        return evaluate_suites(lambda prompts: run.generate(prompts, "evaluate", note, keep=keep, inputs=inputs), suites)


def _evaluated(
    run: Run, trained: Trained, suites: Sequence[Suite], deltas: DeltaSet, before: Scores, request: Mapping[str, Any]
) -> Trained:
    """The result with the numbers of the pack, or with the reason why some are missing. The deltas are attached."""
    tensors = [
        [part.name, *(sha256(getattr(part, name).tobytes()).hexdigest() for name in nest.PARTS)] for part in trained.pack
    ]
    inputs: dict[str, Any] = {"pack": digest_json(tensors)}

    def measured(strength: float, note: str, keep: str) -> Scores:
        with deltas.scaled(strength):
            scores = _evaluate(run, suites, keep, note, inputs if strength == 1 else {**inputs, "strength": strength})
            return Scores(scores.suites, run.drift(before.answers(BENIGN), deltas.off))

    try:
        after = measured(1.0, "the base with the pack", "pack-answers")
        trained = dataclasses.replace(_with_numbers(trained, {"after": after.as_json()}), after=after)
        _write(run, trained, request, overwrite=True)
        sides, doses = {0.0: before, 1.0: after}, run.recipe.doses()
        for number, strength in enumerate(doses, start=1):
            note = f"the base with the pack at strength {strength:g}, {number} of {len(doses)}"
            run.note(f"evaluating {note}")
            sides[strength] = measured(strength, note, f"pack-answers-{strength:g}")
        if doses:
            curve = Dose(tuple(DosePoint.of(s, one.totals(), one.drift, one.categories()) for s, one in sorted(sides.items())))
            trained = _with_numbers(trained, dose_json(curve))
            _write(run, trained, request, overwrite=True)
    except Exception as error:  # whatever fails here must not cost a trained pack
        if _ranks.HERE.count > 1:  # the others wait for this process
            run.note("the pack is written, and its evaluation failed: nestpatch eval MODEL PACK measures it again")
            raise
        return dataclasses.replace(trained, problem=f"{type(error).__name__}: {error}")
    return trained


def _with_numbers(trained: Trained, numbers: Mapping[str, Any]) -> Trained:
    """The result with more numbers in the manifest."""
    manifest = trained.pack.manifest
    manifest = dataclasses.replace(manifest, evaluation={**manifest.evaluation, **numbers})
    pack = dataclasses.replace(trained.pack, manifest=manifest)
    pack_id, nbytes = _identity(pack)
    return dataclasses.replace(trained, pack=pack, pack_id=pack_id, nbytes=nbytes)


def _identity(pack: Pack) -> tuple[str, int]:
    """(id, size) of the pack's file."""
    data = nest.encode(pack)
    return sha256(data).hexdigest(), len(data)


def _pack_tensors(run: Run, deltas: DeltaSet) -> list[PackedTensor]:
    """Packs every trained delta, for the tensors on disk that the weight was loaded from."""
    packed = []
    for projection, module in deltas.places:
        rows, groups = module.rows.cpu().numpy(), module.cluster.cpu().numpy()
        run.stored.require_same(projection.weight_name, rows)
        delta = module.delta.detach().float().cpu().numpy().astype(DTYPES[run.recipe.delta_dtype])
        for some in run.stored.split(projection.weight_name, rows):
            # An expert that has a tensor of its own needs the vectors of its own neurons alone.
            used, labels = np.unique(groups[some.part], return_inverse=True)
            packed.append(pack_tensor(run.checkpoint, some.tensor, some.rows, labels, delta[used]))
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
