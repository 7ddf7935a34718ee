"""Attack success against over-refusal on one model: `python -m bench.tradeoff MODEL [--method nest lora] [--seeds 0 1 2]`.

Shared deltas and LoRA are trained by the same loop on the same prompts, and measured at several strengths in transformers; the
deltas are rounded as the model's file rounds them. `--suite KIND=FILE` adds held-out sets to the built-in ones, `--set` changes
a setting, for ablations, and `--max-prompts` trains with less data. A line per strength is printed and added to `--output`, a
file of JSON lines that `bench.frontier` draws; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from bench._lora import LoraSet
from nestpatch.evaluation.suites import (
    BENIGN,
    HARMFUL,
    LOOKALIKE,
    Scores,
    Suite,
    builtin_suites,
    evaluate_suites,
    limited,
    load_suite,
)
from nestpatch.events import Event
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import JUDGED_TOKENS, distil
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.nest_train.train import busy_blocks, find_clusters, fit

STRENGTHS = (0.6, 0.8, 1.0, 1.25)
TEXTS = [Path("README.md"), Path("docs/training.md"), Path("docs/evaluation.md"), Path("docs/signing.md")]
"""English prose that no model was trained on, for the perplexity."""
_DRIFT_PROMPTS = 100
_TEXT_TOKENS = 512
"""Tokens that the model reads at once to predict a text."""
_answers: dict[tuple[str, int | None], str] = {}
"""What the base answers: the same for every method, seed and setting."""


class BaseRun(Run):
    """A run whose base answers each training prompt once."""

    def generate(self, prompts: Sequence[str], stage: str, note: str = "", tokens: int | None = None) -> list[str]:
        """Greedy answers; those of the base are remembered."""
        if stage != "distil":
            return super().generate(prompts, stage, note, tokens)
        new = [prompt for prompt in prompts if (prompt, tokens) not in _answers]
        answers = super().generate(new, stage, note, tokens) if new else []
        _answers.update(zip([(prompt, tokens) for prompt in new], answers, strict=True))
        return [_answers[prompt, tokens] for prompt in prompts]

    def scores(self, suites: Sequence[Suite]) -> Scores:
        """The model as it is."""
        return evaluate_suites(lambda prompts: self.generate(prompts, "evaluate", tokens=JUDGED_TOKENS), suites)

    @torch.inference_mode()
    def perplexity(self, texts: Sequence[str]) -> float:
        """exp of the mean negative log-likelihood per token, of texts outside the chat template."""
        loss, tokens = 0.0, 0
        for text in texts:
            ids = torch.tensor(self.tokenizer(text)["input_ids"], device=self.model.device)
            for part in ids.split(_TEXT_TOKENS):
                if len(part) > 1:
                    logits = self.model(part[None]).logits[0, :-1].float()
                    loss += cross_entropy(logits, part[1:], reduction="sum").item()
                    tokens += len(part) - 1
        return math.exp(loss / tokens)


def tell(event: Event) -> None:
    """Prints decisions and what the held-out prompts showed."""
    if (event.stage == "note" and not event.note.startswith("layer ")) or (event.stage == "tune" and "held-out" in event.note):
        print(f"  {event.note}", flush=True)


def summary(before: Scores, after: Scores) -> dict[str, float]:
    """Attack success, and the rise of refusals, mean and worst over the suites; and of each kind; shares."""
    attacks = [suite.complied.value for suite in after.suites if suite.kind == HARMFUL]
    numbers = {"attack_mean": statistics.mean(attacks), "attack_max": max(attacks)}
    sides = list(zip(before.suites, after.suites, strict=True))
    for name, kinds in (("rise", (BENIGN, LOOKALIKE)), ("rise_benign", (BENIGN,)), ("rise_lookalike", (LOOKALIKE,))):
        rises = [new.refused.value - old.refused.value for old, new in sides if new.kind in kinds]
        numbers |= {f"{name}_mean": statistics.mean(rises), f"{name}_max": max(rises)}
    return {name: round(value, 4) for name, value in numbers.items()}


def set_strength(change: DeltaSet | LoraSet, trained: Sequence[torch.Tensor], strength: float) -> None:
    """The change at a multiple of what was trained."""
    if isinstance(change, LoraSet):
        change.scale(strength)
    else:
        change.restore([delta * strength for delta in trained])


class Bench:
    """What is measured on, and what the base does there.

    Args:
        model: The base.
        suites: Held-out prompts.
        texts: To measure the perplexity on.
        strengths: To measure at.
    """

    def __init__(self, model: str, suites: Sequence[Suite], texts: Sequence[str], strengths: Sequence[float]) -> None:
        self.model, self.suites, self.texts, self.strengths = model, suites, texts, strengths
        run = BaseRun.start(model, Recipe(), tell)
        self.before, self.perplexity = run.scores(suites), run.perplexity(texts)

    def base(self) -> dict[str, Any]:
        """The base's own numbers."""
        return {"method": "base", "perplexity": self.perplexity} | summary(self.before, self.before) | _refusals(self.before)

    def measure(self, method: str, recipe: Recipe) -> list[dict[str, Any]]:
        """Trains once and measures every strength."""
        began = time.perf_counter()
        data = TrainingData.builtin().sampled(recipe.max_prompts, recipe.seed)
        run = BaseRun.start(self.model, recipe, tell)
        blocks = busy_blocks(run, data, run.blocks())
        examples = distil(run, data)
        deltas = DeltaSet(blocks, [clusters for _, clusters in find_clusters(run, data, blocks)])
        deltas.quantize_like(run.stored)
        change = deltas if method == "nest" else LoraSet(blocks, deltas.first_layer)
        fit(run, blocks, change, examples)
        trained, seconds = change.snapshot(), time.perf_counter() - began
        facts = {"method": method, "seed": recipe.seed, "max_prompts": recipe.max_prompts, "seconds": round(seconds)}
        rows = []
        for strength in self.strengths:
            set_strength(change, trained, strength)
            with change.attached():
                after, perplexity = run.scores(self.suites), run.perplexity(self.texts)
                drift = run.drift(dict(list(self.before.answers(BENIGN).items())[:_DRIFT_PROMPTS]), change.off)
            rise = {"kl": drift, "perplexity": perplexity, "perplexity_rise": perplexity / self.perplexity - 1}
            row = facts | {"strength": strength, "trained": change.trainable} | rise
            rows.append(row | summary(self.before, after) | _refusals(after))
        return rows


def _refusals(scores: Scores) -> dict[str, Any]:
    return {"suites": {suite.suite: suite.refused.as_json() for suite in scores.suites}}


def keep(row: dict[str, Any], output: Path | None) -> None:
    """Prints a row, and adds it to the file."""
    print(
        {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items() if name != "suites"},
        flush=True,
    )
    if output is not None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Runs methods, amounts of data and seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", nargs="+", choices=("nest", "lora"), default=["nest", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="nest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--max-prompts", type=int, nargs="+", help="prompts of each kind that are trained; one training for each number"
    )
    parser.add_argument("--suite", action="append", default=[], metavar="KIND=FILE")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each suite")
    parser.add_argument("--text", type=Path, nargs="+", default=TEXTS)
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    parser.add_argument("--tag", default="", help="the name of these settings in the output")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, which grows")
    given = parser.parse_args()
    suites = builtin_suites(given.limit) + [limited(load_suite(text), given.limit) for text in given.suite]
    bench = Bench(given.model, suites, [path.read_text("utf-8") for path in given.text], given.strengths)
    rows = [bench.base() | {"tag": given.tag}]
    keep(rows[0], given.output)
    for seed in given.seeds:
        for amount in given.max_prompts or [None]:
            settings = given.set if amount is None else [*given.set, f"max_prompts={amount}"]
            for method in given.method:
                for row in bench.measure(method, make_recipe(given.recipe, settings, {"seed": seed})):
                    rows.append(row | {"tag": given.tag})
                    keep(rows[-1], given.output)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
