"""Training from start to end, as one line of stages: load, distil, probe, select, cluster, remember, tune, pack,
evaluate.

Public: `train` and its result `Trained`. `plan` in the module of that name says beforehand what a training would do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.suites import BENIGN, Scores, Suite, evaluate_suites
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import float_rows
from nestpatch.nest_train._neurons import Clusters, Selection, choose_first_layer, cluster, collect, require_neurons, select
from nestpatch.nest_train._run import Run, limited_threads
from nestpatch.nest_train._targets import JUDGED_TOKENS, Examples, distil
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.pack import Label, Pack
from nestpatch.packing import PackedTensor, build_pack, pack_tensor
from nestpatch.rows import DTYPES, FloatArray
from nestpatch.runtimes.weights import MlpBlock, disk_name, same_weights

if TYPE_CHECKING:
    from nestpatch.nest_train._deltas import DeltaSet
    from nestpatch.nest_train._tune import Loss, Trainable, TuneResult

_NO_LOOKALIKES = (
    "no look-alike prompts: nothing teaches the patched model to answer harmless prompts that look harmful, "
    "and refusals of such prompts typically rise by 20-40 points; give some with --lookalike"
)
_PACKAGES = ("torch", "transformers", "accelerate", "sklearn")
"""The modules of the extra `train` that every training imports."""


Choose = Callable[[Run, Sequence[MlpBlock], Sequence[FloatArray], npt.NDArray[np.bool_]], list[Selection]]
"""How `selected` is called."""


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
        problem: Why the pack could not be evaluated; None where it was, or where no suites were given.
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
    on_event: OnEvent = ignore,
) -> Trained:
    """Trains a safety patch for a base model.

    Everything that can be checked is checked before the base is loaded. The pack is written before it is evaluated, and again
    with the numbers: an evaluation that fails costs the numbers, not the pack.

    Args:
        base: A model directory, or a Hub id ("user/model" or "user/model@revision").
        data: The prompts to refuse and to go on answering.
        label: Name, version and other facts of the pack.
        recipe: The settings; None for the defaults.
        suites: Prompt sets to measure before and after; the numbers go into the pack.
        output: The `.nest` file to write, which must not exist; None writes nothing.
        threads: Threads to compute with; None for the libraries' own choice.
        on_event: Called with the progress.

    Returns:
        The pack and its numbers.

    Raises:
        DataError: The label, the prompts or `threads` are not valid.
        OutputError: The output exists or cannot be written.
        MissingExtraError: The packages of the extra `train` are not installed.
        CheckpointError: The base cannot be found, read or loaded, or its architecture is not supported.
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    require_packages()
    label.check()
    data.check()
    target = None if output is None else Path(output)
    if target is not None:
        check_output(target)
    with limited_threads(threads):
        return _train(base, data, label, recipe or Recipe(), suites, target, on_event)


def _train(
    base: str | Path,
    data: TrainingData,
    label: Label,
    recipe: Recipe,
    suites: Sequence[Suite],
    output: Path | None,
    on_event: OnEvent,
) -> Trained:
    """The stages, after the checks."""
    from nestpatch.nest_train._deltas import DeltaSet

    data = data.sampled(recipe.max_prompts, recipe.seed)
    run = Run.start(base, recipe, on_event)
    blocks = run.blocks()
    if data.lookalike is None:
        run.decide("lookalike", "", _NO_LOOKALIKES)
    facts: dict[str, Any] = {}
    if seen := data.seen_in(suites):
        facts["seen_in_training"] = seen
        run.note(f"suites with training prompts: {', '.join(seen)}; their numbers say little about new prompts")
    before = _evaluate(run, suites, "the base") if suites else None
    if before is not None:
        facts |= {"judge": "keywords and references (nestpatch.evaluation.judges)", "before": before.as_json(), "after": None}
    examples = distil(run, data)
    layers = find_clusters(run, data, blocks)
    deltas = DeltaSet(blocks, [clusters for _, clusters in layers])
    if kinds := deltas.quantize_like(run.checkpoint):
        run.decide("rounding", "", f"deltas are trained through the rounding to {', '.join(kinds)} of the base's file")
    result = fit(run, blocks, deltas, examples)
    pack = packed(run, data, layers, deltas, result, label, facts)
    if output is not None:
        nest.write(pack, output)
        run.note(f"wrote {output}" + ("; its evaluation follows" if before is not None else ""))
    trained = Trained(pack, *_identity(pack), before, None, deltas.trainable, run.parameters, output)
    return trained if before is None else _evaluated(run, trained, suites, deltas, before)


def fit(
    run: Run, blocks: Sequence[MlpBlock], change: Trainable, examples: Examples, loss_function: Loss | None = None
) -> TuneResult:
    """The stages remember and tune.

    Args:
        run: The base.
        blocks: Its feed-forward blocks.
        change: What is trained, in place.
        examples: The training examples.
        loss_function: As for `tune`.

    Returns:
        How the tuning went.

    Raises:
        PromptDataError: A kind has fewer than two examples.
    """
    from nestpatch.nest_train._trunk import Trunk
    from nestpatch.nest_train._tune import tune

    trunk = Trunk(run.model, blocks, change.first_layer, run.pad)
    every = examples.harmful + examples.harmless
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        skipped = trunk.remember([e.tokens for e in every], [e.tokens for e in examples.harmless], Path(folder), run.on_event)
        run.decide("step", *skipped)
        run.on_event(Event("tune", 0, run.recipe.steps, f"{change.trainable} parameters"))
        answer = partial(run.generate, stage="look", tokens=JUDGED_TOKENS)
        result = tune(trunk, change, examples, answer, run.recipe, run.on_event, loss_function)
    run.note(f"kept step {result.kept.step} of {result.steps} ({result.reason}): {result.kept}; the base: {result.before}")
    return result


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


def _evaluate(run: Run, suites: Sequence[Suite], note: str) -> Scores:
    return evaluate_suites(lambda prompts: run.generate(prompts, "evaluate", note), suites)


def _evaluated(run: Run, trained: Trained, suites: Sequence[Suite], deltas: DeltaSet, before: Scores) -> Trained:
    """The result with the numbers of the pack, or with the reason why there are none."""
    try:
        with deltas.attached():
            after = _evaluate(run, suites, "the base with the pack")
            drift = run.drift(before.answers(BENIGN), deltas.off)
    except Exception as error:  # noqa: BLE001 - whatever fails here must not cost a trained pack
        return dataclasses.replace(trained, problem=f"{type(error).__name__}: {error}")
    after = Scores(after.suites, drift)
    manifest = trained.pack.manifest
    manifest = dataclasses.replace(manifest, evaluation={**manifest.evaluation, "after": after.as_json()})
    pack = dataclasses.replace(trained.pack, manifest=manifest)
    if trained.output is not None:
        nest.write(pack, trained.output, overwrite=True)
    pack_id, nbytes = _identity(pack)
    return dataclasses.replace(trained, pack=pack, pack_id=pack_id, nbytes=nbytes, after=after)


def _identity(pack: Pack) -> tuple[str, int]:
    """(id, size) of the pack's file."""
    data = nest.encode(pack)
    return sha256(data).hexdigest(), len(data)


def find_clusters(
    run: Run, data: TrainingData, blocks: Sequence[MlpBlock], choose: Choose | None = None
) -> list[tuple[Selection, Clusters]]:
    """The stages probe, select and cluster.

    Args:
        run: The base.
        data: The prompts.
        blocks: The base's feed-forward blocks.
        choose: The stage select; None for `selected`.

    Returns:
        (selection, clusters) of each layer.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    texts = [prompt.text for prompt in data.harmful.prompts + data.harmless]
    harmful = np.arange(len(texts)) < len(data.harmful.prompts)
    # Windows cannot remove a file that is still mapped; the system's own cleaning removes it later.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        acts = collect(run.model, blocks, run.runtime.token_ids(texts), Path(folder), run.recipe, run.pad, run.on_event)
        selections = (choose or selected)(run, blocks, acts, harmful)
        found = []
        for selection, layer in zip(selections, acts, strict=True):
            found.append((selection, cluster(selection, layer, run.recipe)))
            run.note(f"layer {selection.layer}: {selection.reason}; {found[-1][1].k} clusters")
            run.on_event(Event("cluster", len(found), len(blocks)))
        del acts
    return found


def selected(
    run: Run, blocks: Sequence[MlpBlock], acts: Sequence[FloatArray], harmful: npt.NDArray[np.bool_]
) -> list[Selection]:
    """The stage select.

    Args:
        run: The recipe is read, and the choice of the first layer is recorded.
        blocks: The base's feed-forward blocks.
        acts: float32 [prompts, neurons] of each block.
        harmful: bool [prompts].

    Returns:
        A result per layer, without neurons below the first patched layer.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
    """
    found = []
    for block, layer in zip(blocks, acts, strict=True):
        found.append(select(block.layer, layer, harmful, run.recipe))
        run.on_event(Event("select", block.layer + 1, len(blocks)))
    require_neurons(found)
    first, reason = choose_first_layer(found, run.recipe)
    run.decide("first layer", str(first), reason)
    used = [one if one.layer >= first else one.skipped(f"below layer {first}, the first that is patched") for one in found]
    require_neurons(used)
    return used


def _pack_tensors(run: Run, deltas: DeltaSet) -> list[PackedTensor]:
    """Packs every trained delta, for the tensor on disk that its Linear was loaded from."""
    import torch

    packed = []
    for projection, module in deltas.places:
        name = disk_name(projection.weight_name, run.checkpoint)
        order = torch.argsort(module.rows)
        rows = module.rows[order]
        stored = float_rows(run.checkpoint, name, rows.cpu().numpy())
        if not same_weights(stored, module.base.weight.detach()[rows].cpu()):
            raise CheckpointFormatError(f"tensor {name} of {run.checkpoint.path} is not the weight that transformers loaded")
        delta = module.delta.detach().float().cpu().numpy().astype(DTYPES[run.recipe.delta_dtype])
        groups = module.cluster[order].cpu().numpy()
        packed.append(pack_tensor(run.checkpoint, name, rows.cpu().numpy(), groups, delta))
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
    packages = ("nestpatch", "torch", "transformers", "accelerate", "scikit-learn", "numpy")
    return {
        "name": "NeST",
        "source": "arXiv:2602.16835",
        "recipe": run.recipe.as_json(),
        "decisions": run.decisions,
        "data": data.facts(),
        "layers": facts,
        "tuning": {
            "steps": result.steps,
            "kept_step": result.kept.step,
            "held_out": [look.as_json() for look in result.looks],
            "stopped": result.reason,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }
