"""What a training would do and how long it would take, measured without training: `plan`, behind `train --dry-run`."""

from __future__ import annotations

import dataclasses
import importlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.evaluation.suites import Suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._layers import busy_blocks
from nestpatch.nest_train._neurons import Clusters, Selection, cluster, collect, select
from nestpatch.nest_train._record import Stopwatch
from nestpatch.nest_train._run import Run, limited_threads
from nestpatch.nest_train._targets import BUILT_IN, JUDGED_TOKENS, REFUSAL_SAMPLE, Example, Examples, encode_examples
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import require_packages
from nestpatch.runtimes.weights import MlpBlock

_STEPS = 3
"""Optimizer steps that are timed."""
_SAMPLE = 32
"""Prompts that are answered to time the answers."""


@dataclass(frozen=True)
class TrainingPlan:
    """What a training would do.

    Attributes:
        model: The base: its folder's name, or its Hub id.
        architecture: Its class in transformers.
        device: Where it would be computed: "cpu", "cuda" or "mps".
        dtype: The arithmetic: "float32", "bfloat16" or "float16".
        layers: Layers with feed-forward blocks.
        neurons: Neurons of all layers together; experts that take no part are not counted. The probe keeps those that respond
            to harmful prompts.
        prompts: Kind (harmful, benign, lookalike) -> training prompts.
        suite_prompts: Prompts that are evaluated before and after.
        seen_in_training: Suite -> how many of its prompts are also training prompts.
        model_parameters: Parameters of the base.
        trained_parameters: About how many values would be trained; the probe decides which.
        steps: Optimizer steps, at most.
        seconds: Stage -> estimated seconds. Stages that end early take less.
    """

    model: str
    architecture: str
    device: str
    dtype: str
    layers: int
    neurons: int
    prompts: Mapping[str, int]
    suite_prompts: int
    seen_in_training: Mapping[str, int]
    model_parameters: int
    trained_parameters: int
    steps: int
    seconds: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        """The plan for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "architecture": self.architecture,
            "device": self.device,
            "dtype": self.dtype,
            "layers": self.layers,
            "neurons": self.neurons,
            "prompts": dict(self.prompts),
            "suite_prompts": self.suite_prompts,
            "seen_in_training": dict(self.seen_in_training),
            "model_parameters": self.model_parameters,
            "trained_parameters": self.trained_parameters,
            "steps": self.steps,
            "stages": {stage: round(value, 1) for stage, value in self.seconds.items()},
            "seconds": round(sum(self.seconds.values()), 1),
        }


def plan(
    base: str | Path,
    data: TrainingData,
    *,
    recipe: Recipe | None = None,
    suites: Sequence[Suite] = (),
    threads: int | None = None,
    on_event: OnEvent = ignore,
) -> TrainingPlan:
    """Loads the base and times every stage on a few prompts: one batch of answers, one probe batch, one layer, three steps.

    Nothing is written, and no neuron is chosen: the steps are timed on random neurons, as many as a training would keep, in the
    layers from the middle up unless the recipe says from where.

    Args:
        base: As for `train`.
        data: As for `train`.
        recipe: As for `train`.
        suites: As for `train`.
        threads: As for `train`.
        on_event: Called with the progress.

    Returns:
        The plan.

    Raises:
        DataError: The prompts or `threads` are not valid.
        MissingExtraError: The packages of the extra `train` are not installed.
        CheckpointError: The base cannot be found, read or loaded, or its architecture is not supported.
    """
    require_packages()
    data.check()
    recipe = recipe or Recipe()
    data = data.sampled(recipe.max_prompts, recipe.seed)
    with _ranks.together(recipe.device), limited_threads(threads):
        watch = Stopwatch()
        with watch("load"):
            run = Run.start(base, recipe, on_event)
        blocks, few = run.blocks(), data.sampled(recipe.probe_batch, recipe.seed)
        with watch("probe", len(data.harmful.prompts) / len(few.harmful.prompts)):
            blocks = busy_blocks(run, few, blocks)
        suite_prompts = sum(len(suite.prompts.prompts) for suite in suites)
        parameters = _measure(run, data, blocks, suite_prompts, watch)
    sets = {"harmful": data.harmful, "benign": data.benign, "lookalike": data.lookalike}
    return TrainingPlan(
        model=run.source.model_id,
        architecture=type(run.model).__name__,
        device=run.decisions["device"].partition(" ")[0],
        dtype=run.decisions["dtype"].partition(" ")[0],
        layers=blocks[-1].layer + 1,
        neurons=sum(block.neurons for block in blocks),
        prompts={kind: len(prompts.prompts) for kind, prompts in sets.items() if prompts is not None},
        suite_prompts=suite_prompts,
        seen_in_training=data.seen_in(suites),
        model_parameters=run.parameters,
        trained_parameters=parameters,
        steps=recipe.steps,
        seconds=watch.seconds,
    )


def _measure(run: Run, data: TrainingData, blocks: Sequence[MlpBlock], suite_prompts: int, watch: Stopwatch) -> int:
    """Times the stages on a few prompts; returns the number of values that would be trained."""
    recipe = run.recipe
    texts = [prompt.text for prompt in data.harmful.prompts + data.harmless]
    answered = min(len(data.harmful.prompts), REFUSAL_SAMPLE) * (recipe.refusals != "builtin")
    answered += len(data.harmless) * (recipe.benign_targets == "self")
    sample = [prompt.text for prompt in data.harmless[:_SAMPLE]]
    began = time.perf_counter()
    answers = run.generate(sample, "measure", "answers", max(recipe.trained_tokens, JUDGED_TOKENS))
    per_answer = (time.perf_counter() - began) / len(sample)
    # Most of the time of an answer is that of its tokens.
    longer = recipe.max_answer_tokens / max(recipe.trained_tokens, JUDGED_TOKENS)
    times = 2 + len(recipe.doses())
    watch.seconds |= {"distil": answered * per_answer, "evaluate": times * suite_prompts * per_answer * longer}
    batch = run.runtime.token_ids(texts[: recipe.probe_batch])
    with watch("probe", math.ceil(len(texts) / recipe.probe_batch)), tempfile.TemporaryDirectory() as folder:
        collect(run.model, blocks, batch, Path(folder), recipe, run.pad)
    run.on_event(Event("measure", note="neurons of one layer"))
    for module in ("cluster", "linear_model"):  # imported once by a training, not once per layer
        importlib.import_module(f"sklearn.{module}")
    with watch("select and cluster", len(blocks)):
        groups = _random_groups(blocks[0], len(data.harmful.prompts), len(texts), recipe)
    kept = [(prompt, answer or BUILT_IN[0]) for prompt, answer in zip(sample, answers, strict=True)]
    return _time_steps(run, blocks, groups, _examples(run, data, kept), len(texts), per_answer, watch)


def _examples(run: Run, data: TrainingData, kept: Sequence[tuple[str, str]]) -> Examples:
    """As many examples as a few steps need; the answers repeat."""
    recipe = run.recipe
    count = 2 * _STEPS * max(recipe.harmful_batch, recipe.benign_batch + recipe.lookalike_batch)
    harmful = [(prompt.text, BUILT_IN[0]) for prompt in data.harmful.prompts]

    def some(pairs: Sequence[tuple[str, str]], *, refusals: bool = False) -> tuple[Example, ...]:
        return encode_examples(run, [pairs[i % len(pairs)] for i in range(count)], refusals=refusals)

    return Examples(some(harmful, refusals=True), some(kept), some(kept) if data.lookalike else ())


def _random_groups(block: MlpBlock, harmful: int, prompts: int, recipe: Recipe) -> Clusters:
    """The stages select and cluster on random activations, of as many neurons as the threshold keeps of a bell curve."""
    random = np.random.default_rng(recipe.seed)
    acts = random.standard_normal((prompts, block.neurons), np.float32)
    select(block.layer, acts, np.arange(prompts) < harmful, recipe)
    bell = random.standard_normal(block.neurons)
    neurons = np.flatnonzero((bell if recipe.sign == "positive" else np.abs(bell)) > recipe.threshold)
    if not len(neurons):
        neurons = np.arange(1)
    return cluster(Selection(block.layer, 1.0, neurons, np.ones(len(neurons), np.float32), ""), acts, recipe)


def _time_steps(
    run: Run,
    blocks: Sequence[MlpBlock],
    groups: Clusters,
    examples: Examples,
    prompts: int,
    per_answer: float,
    watch: Stopwatch,
) -> int:
    """Times a few optimizer steps, and counts them as often as a training would do them."""
    from nestpatch.nest_train._deltas import DeltaSet
    from nestpatch.nest_train._memory import fit_memory
    from nestpatch.nest_train._trunk import Trunk
    from nestpatch.nest_train._tune import tune

    deltas = DeltaSet(blocks, _everywhere(blocks, groups, run.recipe))
    deltas.quantize_like(run.stored)
    marks = []

    def mark(event: Event) -> None:
        marks.append(time.perf_counter())
        run.on_event(Event("measure", min(event.done, _STEPS), _STEPS, "steps"))

    every = examples.harmful + examples.harmless
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        trunk = Trunk(run.model, blocks, deltas.first_layer, run.pad)
        size = fit_memory(run, trunk, deltas, examples, Path(folder))
        recipe = dataclasses.replace(run.recipe, steps=_STEPS, check_every=_STEPS, check_prompts=0, micro_batch=size)
        with watch("remember", prompts / len({example.tokens for example in every})):
            trunk.remember([e.tokens for e in every], [e.tokens for e in examples.harmless], Path(folder), batch=size)
        tune(trunk, deltas, examples, lambda _: [], recipe, mark)
    # One event for the base, one per step, and one for the look that follows the last step. The first step also warms up.
    step, held_out = (marks[_STEPS] - marks[1]) / (_STEPS - 1), marks[_STEPS + 1] - marks[_STEPS]
    recipe = run.recipe
    look = held_out * prompts / len(every) + 3 * recipe.check_prompts * per_answer
    watch.seconds["tune"] = recipe.steps * step + (1 + recipe.steps / recipe.check_every) * look
    return deltas.trainable


def _everywhere(blocks: Sequence[MlpBlock], groups: Clusters, recipe: Recipe) -> list[Clusters]:
    """The same groups in every layer that is patched: without a layer in the recipe, from the middle up."""
    layers = blocks[-1].layer + 1
    first = layers // 2 if recipe.first_layer < 0 else min(recipe.first_layer, layers - 1)
    found = []
    for block in blocks:
        fits = (groups.neurons < block.neurons) & (block.layer >= first)
        k = groups.k if fits.any() else 0
        found.append(dataclasses.replace(groups, neurons=groups.neurons[fits], labels=groups.labels[fits], k=k))
    return found
