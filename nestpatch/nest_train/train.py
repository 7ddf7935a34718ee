"""Training from start to end, as one line of stages: load, distil, probe, select, cluster, tune, evaluate, pack."""

from __future__ import annotations

import platform
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestpatch.errors import PromptDataError
from nestpatch.evaluation import suites as evaluation
from nestpatch.evaluation.drift import drift
from nestpatch.evaluation.judges import is_refusal
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train.cluster import Clusters, cluster
from nestpatch.nest_train.packing import BaseHints, make_pack
from nestpatch.nest_train.probe import Selection, collect, require_neurons, select
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.refusals import choose_refusals
from nestpatch.nest_train.tune import DeltaSet, Halves, TuneResult, tune
from nestpatch.pack import Label, Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.prompts.readers import PromptSet, sample_set
from nestpatch.runtimes.mlps import find_mlps
from nestpatch.runtimes.text import encode_pairs, prompt_ids
from nestpatch.runtimes.transformers import ModelLocation, TransformersRuntime, load_model, locate, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFUSAL_SAMPLE = 256
"""Harmful prompts whose answers tell how the base refuses."""
NO_LOOKALIKES = (
    "no look-alike prompts: nothing teaches the patch to answer harmless prompts that look harmful, "
    "and refusals of such prompts typically rise by 20-40 points; give some with --lookalike"
)


@dataclass(frozen=True)
class TrainingData:
    """The prompts of one training run. Harmful prompts need no answers; look-alikes are harmless prompts that look harmful."""

    harmful: PromptSet
    benign: PromptSet
    lookalike: PromptSet | None = None

    @property
    def harmless(self) -> tuple[Any, ...]:
        return self.benign.prompts + (self.lookalike.prompts if self.lookalike else ())

    def sampled(self, limit: int, seed: int) -> TrainingData:
        """At most `limit` prompts of each kind."""
        lookalike = sample_set(self.lookalike, limit, seed) if self.lookalike else None
        return TrainingData(sample_set(self.harmful, limit, seed), sample_set(self.benign, limit, seed), lookalike)

    def check(self) -> None:
        """Raises PromptDataError when there is too little to train on, or when one prompt is both harmful and harmless."""
        for prompts in (self.harmful, self.benign):
            if len(prompts.prompts) < MIN_PROMPTS:
                count = len(prompts.prompts)
                raise PromptDataError(f"{prompts.name} holds {count} prompts; at least {MIN_PROMPTS} are needed")
        both = {p.text for p in self.harmful.prompts} & {p.text for p in self.harmless}
        if both:
            raise PromptDataError(f"{len(both)} prompts are both harmful and harmless, such as {min(both)[:80]!r}")

    def facts(self) -> dict[str, Any]:
        """What the pack records of the data."""
        sets = {"harmful": self.harmful, "benign": self.benign, "lookalike": self.lookalike}
        return {name: prompts.facts() for name, prompts in sets.items() if prompts is not None}


MIN_PROMPTS = 20
"""Harmful and benign prompts, at least: fewer cannot be split into training and held-out halves."""


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training run gives."""

    pack: Pack
    before: evaluation.Scores | None
    after: evaluation.Scores | None
    trained_parameters: int
    model_parameters: int


@dataclass(eq=False)
class _Run:
    """What the stages hand on, and the reasons of every automatic choice."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    on_event: OnEvent
    decisions: dict[str, str] = field(default_factory=dict)

    def decide(self, what: str, value: str, reason: str) -> None:
        self.decisions[what] = f"{value} ({reason})" if value else reason
        self.on_event(Event("note", note=f"{what}: {self.decisions[what]}"))


def train(
    base: str | Path,
    data: TrainingData,
    label: Label,
    *,
    recipe: Recipe | None = None,
    suites: Sequence[evaluation.Suite] = (),
    on_event: OnEvent = ignore,
) -> Trained:
    """Trains a safety patch for a base model: a directory, or a Hub id.

    `suites` are evaluated before and after, and the numbers go into the pack.

    Raises DataError, CheckpointError, UnsupportedModelError or TrainingError.
    """
    recipe = recipe or Recipe()
    data.check()
    data = data.sampled(recipe.max_prompts, recipe.seed)
    source = locate(base)
    # Before minutes of work: are these weights of a kind that a pack can be for? Ends an interrupted change, too.
    checkpoint, _ = open_model(source.path)
    run = _start(source, recipe, on_event)
    blocks = find_mlps(run.model)
    if data.lookalike is None:
        run.decide("lookalike", "", NO_LOOKALIKES)
    before = _evaluate(run, suites, None)
    halves = _distil(run, data)
    selections, clusters = _find_clusters(run, data, blocks)
    deltas = DeltaSet(blocks, clusters)
    on_event(Event("tune", 0, recipe.steps, f"{deltas.trainable} parameters"))
    result = tune(run.model, deltas, halves, _pad(run), recipe, on_event)
    deltas.round_to({"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[recipe.delta_dtype])
    with deltas.attached():
        after = _evaluate(run, suites, (deltas, before))
    pack = make_pack(
        [(projection.weight_name, module) for projection, module in deltas.places],
        checkpoint,
        recipe.delta_dtype,
        label,
        BaseHints(source.model_id, source.revision, type(run.model).__name__),
        _method(run, data, selections, clusters, result),
        _facts(before, after),
    )
    total = sum(parameter.numel() for parameter in run.model.parameters())
    return Trained(pack, before, after, deltas.trainable, total)


def _start(source: ModelLocation, recipe: Recipe, on_event: OnEvent) -> _Run:
    device, device_reason = pick_device(recipe.device)
    dtype, dtype_reason = pick_dtype(recipe.dtype, device)
    on_event(Event("load", note=source.model_id))
    model, tokenizer = load_model(source.path, device, dtype)
    run = _Run(model, tokenizer, recipe, on_event)
    run.decide("device", device, device_reason)
    run.decide("dtype", dtype, dtype_reason)
    return run


def _pad(run: _Run) -> int:
    return int(run.tokenizer.pad_token_id)


def _generator(run: _Run, stage: str) -> Callable[[Sequence[str]], list[str]]:
    report = lambda event: run.on_event(Event(stage, event.done, event.total))  # noqa: E731
    return partial(_runtime(run).generate, on_event=report)


def _runtime(run: _Run) -> TransformersRuntime:
    return TransformersRuntime(run.model, run.tokenizer, run.recipe.max_answer_tokens, run.recipe.max_prompt_tokens)


def _evaluate(
    run: _Run, suites: Sequence[evaluation.Suite], patched: tuple[DeltaSet, evaluation.Scores | None] | None
) -> evaluation.Scores | None:
    if not suites:
        return None
    result = evaluation.evaluate_suites(_generator(run, "evaluate"), suites)
    deltas, before = patched or (None, None)
    if deltas is None or before is None:
        return result
    runtime = _runtime(run)
    moved = drift(replace(runtime, active=deltas.off), runtime, evaluation.answers_of(before, evaluation.BENIGN))
    return evaluation.Scores(result.suites, moved)


def _distil(run: _Run, data: TrainingData) -> Halves:
    """Answers to train towards: refusals for the harmful half, the base's own answers for the harmless half."""
    recipe, rng = run.recipe, random.Random(f"refusals {run.recipe.seed}")
    generate = _generator(run, "distil")
    harmful = [prompt.text for prompt in data.harmful.prompts]
    sample = harmful if len(harmful) <= REFUSAL_SAMPLE else rng.sample(harmful, REFUSAL_SAMPLE)
    refusals = choose_refusals([] if recipe.refusals == "builtin" else generate(sample), recipe)
    run.decide("refusals", "", refusals.reason)
    harmless = data.harmless
    if recipe.benign_targets == "given":
        missing = sum(prompt.reference is None for prompt in harmless)
        if missing:
            raise PromptDataError(f"benign_targets=given, but {missing} of {len(harmless)} benign prompts have no answer")
        answers = [prompt.reference for prompt in harmless]
    else:
        answers = generate([prompt.text for prompt in harmless])
    # Where the base refuses a harmless prompt there is no answer to keep, and repeating the refusal would teach more of them.
    kept = [(p.text, a) for p, a in zip(harmless, answers, strict=True) if a and not is_refusal(a)]
    dropped = len(harmless) - len(kept)
    run.decide("benign answers", recipe.benign_targets, f"{len(kept)} kept, {dropped} empty or refused by the base")
    if len(kept) < MIN_PROMPTS:
        raise PromptDataError(f"the base answers only {len(kept)} of {len(harmless)} harmless prompts; give more of them")
    bad = [(text, rng.choice(refusals.texts)) for text in harmful]
    limits = (recipe.max_prompt_tokens, recipe.max_answer_tokens)
    return Halves(encode_pairs(run.tokenizer, bad, *limits), encode_pairs(run.tokenizer, kept, *limits))


def _find_clusters(run: _Run, data: TrainingData, blocks: Sequence[Any]) -> tuple[list[Selection], list[Clusters]]:
    texts = [prompt.text for prompt in data.harmful.prompts + data.harmless]
    harmful = np.arange(len(texts)) < len(data.harmful.prompts)
    ids = prompt_ids(run.tokenizer, texts, run.recipe.max_prompt_tokens)
    # Windows cannot remove a file that is still mapped; the system's own cleaning gets it then.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        acts = collect(run.model, blocks, ids, Path(folder), run.recipe, _pad(run), run.on_event)
        selections = []
        for block, layer in zip(blocks, acts, strict=True):
            selections.append(select(block.layer, layer, harmful, run.recipe))
            run.on_event(Event("select", block.layer + 1, len(blocks)))
        require_neurons(selections)
        clusters = []
        for selection, layer in zip(selections, acts, strict=True):
            clusters.append(cluster(selection, layer, run.recipe))
            note = f"layer {selection.layer}: {selection.reason}; {clusters[-1].k} clusters"
            run.on_event(Event("note", note=note))
            run.on_event(Event("cluster", len(clusters), len(blocks)))
        del acts
    return selections, clusters


def _method(
    run: _Run, data: TrainingData, selections: Sequence[Selection], clusters: Sequence[Clusters], result: TuneResult
) -> dict[str, Any]:
    """How the pack was made: enough to make it again."""
    layers = [
        {
            "layer": s.layer,
            "probe_accuracy": round(s.accuracy, 4),
            "chance": round(s.chance, 4),
            "neurons": len(s.neurons),
            "clusters": c.k,
            "silhouette": None if c.silhouette is None else round(c.silhouette, 4),
        }
        for s, c in zip(selections, clusters, strict=True)
    ]
    packages = ("nestpatch", "torch", "transformers", "accelerate", "scikit-learn", "numpy")
    return {
        "name": "NeST",
        "source": "arXiv:2602.16835",
        "recipe": run.recipe.as_json(),
        "decisions": run.decisions,
        "data": data.facts(),
        "layers": layers,
        "tuning": {
            "steps": result.steps,
            "best_step": result.best_step,
            "loss_before": round(result.loss_before, 6),
            "loss_after": round(result.loss_after, 6),
            "stopped": result.reason,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def _facts(before: evaluation.Scores | None, after: evaluation.Scores | None) -> dict[str, Any]:
    """The manifest's evaluation."""
    if before is None or after is None:
        return {}
    return {
        "judge": "keywords and references (nestpatch.evaluation.judges)",
        "before": before.as_json(),
        "after": after.as_json(),
    }
