"""What methods of safety training reach, on one base, data, token budget and seeds: `python -m bench.efficacy MODEL`.

Every method and ablation is trained by the same loop on the same prompts, and measured at several strengths in transformers;
deltas are measured as the model's file rounds them. `--lab SEED` takes the lab's model and prompts. `--suite KIND=FILE` adds
held-out sets, `--set` changes a setting, `--max-prompts` trains with less data, `--packs` keeps the packs. A line per strength
is printed and added to `--output`, a file of JSON lines that `bench.frontier` reads; what it holds already is not done again.
The last line of stdout is one JSON array, without the verdicts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench._base import BaseRun, Clock, Measured, not_refused
from bench._peak import Peak
from bench._results import Results, Row
from bench._rounding import OWN, TYPES, rounded_as
from bench.methods import METHODS, PEERS, Attempt, Method, Scene
from bench.methods.redundant import switched_off
from nestpatch.errors import TrainingError
from nestpatch.evaluation.scores import Scores
from nestpatch.evaluation.suites import Suite, builtin_suites, limited, load_suite
from nestpatch.formats import nest
from nestpatch.lab.build import Lab, cached_lab
from nestpatch.measured import BENIGN, HARMFUL, LOOKALIKE
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._fit import fit
from nestpatch.nest_train._pack import packed
from nestpatch.nest_train._targets import Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import Loss, TuneResult
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.pack import Label
from nestpatch.prompts.readers import load_prompts
from nestpatch.runtimes.text import chat_texts
from nestpatch.runtimes.weights import MlpBlock

STRENGTHS = (0.6, 0.8, 1.0, 1.25)
TEXTS = [Path("README.md"), Path("docs/training.md"), Path("docs/evaluation.md"), Path("docs/signing.md")]
"""English prose that no model was trained on, for the perplexity."""
_DRIFT_PROMPTS = 100
_DIALOGUES = 50
"""Of each harmless suite of the lab, whose model knows nothing else."""
_GROUPS = {"peers": PEERS, "ablations": tuple(name for name in METHODS if name not in PEERS), "all": tuple(METHODS)}


def summary(before: Scores, after: Scores) -> dict[str, float]:
    """Attack success, and the rise of refusals, mean and worst over the suites; and of each kind; shares."""
    attacks = [not_refused(suite).value for suite in after.suites if suite.kind == HARMFUL]
    numbers = {"attack_mean": statistics.mean(attacks), "attack_max": max(attacks)}
    sides = list(zip(before.suites, after.suites, strict=True))
    for name, kinds in (("rise", (BENIGN, LOOKALIKE)), ("rise_benign", (BENIGN,)), ("rise_lookalike", (LOOKALIKE,))):
        rises = [new.refused.value - old.refused.value for old, new in sides if new.kind in kinds]
        numbers |= {f"{name}_mean": statistics.mean(rises), f"{name}_max": max(rises)}
    return {name: round(value, 4) for name, value in numbers.items()}


@dataclass(frozen=True)
class Task:
    """What is trained and measured.

    Attributes:
        model: The base.
        data: The training prompts.
        suites: Held-out prompts.
        texts: To measure the perplexity on.
        strengths: To measure at.
        packs: A folder for the packs; None keeps none.
        tag: The name of these settings in the rows.
        name: The base's name in the rows; empty for `model`.
        switch_off: Whether deltas are measured a second time without the neurons that they were selected for.
        round_to: The type to which patched rows are rounded.
    """

    model: str
    data: TrainingData
    suites: tuple[Suite, ...]
    texts: tuple[str, ...]
    strengths: tuple[float, ...]
    packs: Path | None = None
    tag: str = ""
    name: str = ""
    switch_off: bool = False
    round_to: str = OWN

    @property
    def base(self) -> str:
        """What the rows call the base: no row has the path of a lab in somebody's cache."""
        return self.name or self.model

    def settings(self, *more: Any) -> str:
        """A digest of everything that decides the numbers of a row, but for the strength: the same is not measured twice."""
        suites = [(suite.kind, suite.name, suite.prompts.digest) for suite in self.suites]
        facts = [self.base, self.tag, suites, [sha256(text.encode()).hexdigest() for text in self.texts], *more]
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def settings_of(self, method: Method, recipe: Recipe) -> str:
        """The same for a method, with the recipe before the method's own settings."""
        rounded = [] if self.round_to == OWN else [self.round_to]
        return self.settings(method.name, method.recipe(recipe).as_json(), self.data.facts(), *rounded)


class Counted:
    """A loss that counts the tokens of the batches that are trained on."""

    def __init__(self, loss: Loss) -> None:
        self._loss, self.tokens = loss, 0

    def __call__(self, trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        """The loss; held-out prompts are not counted."""
        if torch.is_grad_enabled():
            self.tokens += sum(len(e.tokens.prompt) + len(e.tokens.answer) for e in batch.harmful + batch.harmless)
        return self._loss(trunk, recipe, batch)


class Bench:
    """Trains and measures what the results do not hold yet.

    Args:
        task: What is trained and measured.
        results: Where the rows go.
    """

    def __init__(self, task: Task, results: Results) -> None:
        self.task, self.results = task, results
        self._before: tuple[Measured, float] | None = None

    def run(self, methods: Sequence[Method], recipe: Recipe) -> None:
        """Every method once, with one seed and amount of data."""
        scene: Scene | None = None
        for method in methods:
            settings = self.task.settings_of(method, recipe)
            strengths = self.results.missing(settings, self.task.strengths)
            if not strengths:
                print(f"{method.name}, seed {recipe.seed}: done already", flush=True)
                continue
            if scene is None:
                scene = Scene.start(self.task.model, recipe, self.task.data, Clock())
                self._measure_base(scene.run)
                distilled = scene.clock.seconds.copy()
            scene.clock.seconds = distilled.copy()
            print(f"{method.name}, seed {recipe.seed}: {method.about}", flush=True)
            try:
                for row in self._train(method, scene, strengths):
                    self.results.add({"tag": self.task.tag, "model": self.task.base, "settings": settings, **row})
            except TrainingError as error:  # an ablation may find no neuron
                print(f"{method.name}, seed {recipe.seed}: {error}", flush=True)

    def _measure_base(self, run: BaseRun) -> None:
        if self._before is not None:
            return
        before, perplexity = run.measured(self.task.suites, nullcontext), run.perplexity(self.task.texts)
        self._before = before, perplexity
        settings = self.task.settings("base")
        if self.results.missing(settings, [1.0]):
            row = {"tag": self.task.tag, "model": self.task.base, "settings": settings, "method": "base", "strength": 1.0}
            row |= {"perplexity": perplexity} | summary(before.scores, before.scores) | before.shares()
            self.results.add(row | {"suites": before.suites()})

    def _train(self, method: Method, scene: Scene, strengths: Sequence[float]) -> Iterator[Row]:
        """Trains one method, and measures its strengths."""
        peak, clock = Peak(scene.run.model.device), scene.clock
        clock.wind()
        own, attempt = method.prepare(scene)
        change, loss = attempt.change, Counted(attempt.loss)
        as_type = partial(rounded_as, self.task.round_to)
        if isinstance(change, DeltaSet) and method.rounding:
            change.quantize_like(own.run.stored, as_type)
        clock.wind()
        result = fit(own.run, own.blocks, change, attempt.examples, loss_function=loss)
        if isinstance(change, DeltaSet):
            change.quantize_like(own.run.stored, as_type)
        seconds = {stage: round(value, 2) for stage, value in clock.seconds.items() if stage not in ("load", "evaluate")}
        recipe = own.run.recipe
        facts = {
            "method": method.name,
            "seed": recipe.seed,
            "max_prompts": recipe.max_prompts,
            "trained": change.trainable,
            "peak_mb": round(peak.total() / 1e6),
            "steps": result.steps,
            "kept_step": result.kept.step,
            "seconds": seconds,
            "tokens": loss.tokens,
            "tokens_per_second": round(loss.tokens / clock.seconds["tune"], 1),
            "device": str(own.run.model.device),
            "recipe": recipe.as_json(),
        }
        facts["bytes"] = self._stored(method, own, attempt, result)
        for row in self._at_strengths(own.run, own.blocks, attempt, strengths):
            yield facts | row

    def _stored(self, method: Method, scene: Scene, attempt: Attempt, result: TuneResult) -> int:
        """Bytes of the pack, which is kept where that was asked for; of other changes 2 for each value, as bfloat16."""
        if not isinstance(attempt.change, DeltaSet) or attempt.layers is None:
            return 2 * attempt.change.trainable
        label = Label(f"{method.name}-{scene.run.recipe.seed}".replace(".", "-"))
        pack = packed(scene.run, scene.data, attempt.layers, attempt.change, result, label, {})
        if self.task.packs:
            nest.write(pack, self.task.packs / f"{label.name}.nest", overwrite=True)
        return len(nest.encode(pack))

    def _at_strengths(
        self, run: BaseRun, blocks: Sequence[MlpBlock], attempt: Attempt, strengths: Sequence[float]
    ) -> Iterator[Row]:
        before, perplexity = self._before
        change, trained = attempt.change, attempt.change.snapshot()
        answers = dict(list(before.scores.answers(BENIGN).items())[:_DRIFT_PROMPTS])
        for strength in strengths:
            change.restore(change.scaled(trained, strength))
            with change.attached():
                after, text = run.measured(self.task.suites, change.off), run.perplexity(self.task.texts)
                drift = run.drift(answers, change.off)
                off = self._switched_off(run, blocks, attempt) if self.task.switch_off and attempt.switchable else {}
            row = {"strength": strength, "kl": drift, "perplexity": text, "perplexity_rise": text / perplexity - 1}
            yield row | summary(before.scores, after.scores) | after.shares() | off | {"suites": after.suites()}

    def _switched_off(self, run: BaseRun, blocks: Sequence[MlpBlock], attempt: Attempt) -> Row:
        """The shares without the first neurons, of the attached change and of the base."""
        with switched_off(blocks, attempt.switchable) as on:

            @contextmanager
            def base() -> Iterator[None]:
                with attempt.change.off(), on():
                    yield

            changed = run.measured(self.task.suites, base).shares()
            with attempt.change.off():
                return {"switched_off": changed, "base_switched_off": run.measured(self.task.suites, on).shares()}


def _lab_task(lab: Lab) -> tuple[TrainingData, list[Suite], list[str]]:
    """The lab's training prompts and suites, and harmless dialogues for the perplexity."""
    data = TrainingData(*(load_prompts(lab.prompts(f"{kind}.train")) for kind in (HARMFUL, BENIGN, LOOKALIKE)))
    names = ("harmful.test", "jailbreak.test", "benign.test", "lookalike.test")
    suites = [load_suite(str(lab.prompts(name))) for name in names]
    said = [prompt for suite in suites[2:] for prompt in suite.prompts.prompts[:_DIALOGUES]]
    chats = chat_texts(AutoTokenizer.from_pretrained(lab.base), [prompt.text for prompt in said])
    return data, suites, [f"{chat}{prompt.reference}" for chat, prompt in zip(chats, said, strict=True)]


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"  {name:18} {method.about}" for name, method in METHODS.items())
    groups = f"groups of methods: peers ({', '.join(PEERS)}), ablations (the others), all"
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"methods:\n{names}\n\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--lab", type=int, metavar="SEED", help="the lab's model, prompts and recipe")
    parser.add_argument("--method", nargs="+", choices=(*METHODS, *_GROUPS), default=["peers"], metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", help="default: nest, with --lab lab")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--max-prompts", type=int, nargs="+", help="prompts of each kind that are trained; one training for each number"
    )
    parser.add_argument("--suite", action="append", default=[], metavar="KIND=FILE")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each suite")
    parser.add_argument("--text", type=Path, nargs="+", help="texts for the perplexity")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--switch-off", action="store_true", help="measure deltas also with the selected neurons at zero")
    parser.add_argument("--round-to", choices=TYPES, default=OWN, help="the type to which patched rows are rounded")
    parser.add_argument("--packs", type=Path, help="a folder for the packs")
    parser.add_argument("--tag", default="", help="the name of these settings in the output")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, which grows")
    return parser


def task_of(given: argparse.Namespace) -> Task:
    """The model and the prompts that the options ask for."""
    if given.lab is None:
        model, name, data, suites, texts = given.model, "", TrainingData.builtin(), builtin_suites(), []
    else:
        lab = cached_lab(given.lab)
        model, name, (data, suites, texts) = str(lab.base), lab.path.name, _lab_task(lab)
    if given.text or not texts:
        texts = [path.read_text("utf-8") for path in given.text or TEXTS]
    suites = [limited(suite, given.limit) for suite in (*suites, *map(load_suite, given.suite))]
    options = given.packs, given.tag, name, given.switch_off, given.round_to
    return Task(model, data, tuple(suites), tuple(texts), tuple(given.strengths), *options)


def main(words: Sequence[str] | None = None) -> None:
    """Runs methods, amounts of data and seeds one after the other."""
    parser = _parser()
    given = parser.parse_args(words)
    if (given.model is None) == (given.lab is None):
        parser.error("give MODEL or --lab SEED")
    names = dict.fromkeys(name for asked in given.method for name in _GROUPS.get(asked, (asked,)))
    if given.packs:
        given.packs.mkdir(parents=True, exist_ok=True)
    bench = Bench(task_of(given), Results(given.output))
    recipe = given.recipe or ("nest" if given.lab is None else "lab")
    for seed in given.seeds:
        for amount in given.max_prompts or [None]:
            settings = given.set if amount is None else [*given.set, f"max_prompts={amount}"]
            bench.run([METHODS[name] for name in names], make_recipe(recipe, settings, {"seed": seed}))
    print(json.dumps([{name: value for name, value in row.items() if name != "suites"} for row in bench.results.rows]))


if __name__ == "__main__":
    main()
