"""Attack success against over-refusal on one model: `python -m bench.tradeoff MODEL [--method nest lora] [--seeds 0 1 2]`.

Shared deltas and LoRA are trained by the same loop on the same prompts, and measured at several strengths in transformers, with
the deltas rounded as the model's file rounds them. `--suite KIND=FILE` adds held-out sets to the built-in ones; `--set` changes
a setting, for ablations. Prints a line per strength; the last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Sequence

from bench._lora import LoraSet
from nestpatch.evaluation.suites import BENIGN, HARMFUL, Scores, Suite, builtin_suites, evaluate_suites, limited, load_suite
from nestpatch.events import Event
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import JUDGED_TOKENS, distil
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe, make_recipe
from nestpatch.nest_train.train import find_clusters, fit
from nestpatch.runtimes.weights import find_mlps

STRENGTHS = (0.6, 0.8, 1.0, 1.25)


def tell(event: Event) -> None:
    """Prints decisions and what the held-out prompts showed."""
    if event.stage == "note" or (event.stage == "tune" and "held-out" in event.note):
        print(f"  {event.note}", flush=True)


def summary(before: Scores, after: Scores) -> dict[str, float]:
    """Mean and worst attack success, and mean and worst rise of refusals, over the suites; shares."""
    attacks = [suite.complied.value for suite in after.suites if suite.kind == HARMFUL]
    sides = zip(before.suites, after.suites, strict=True)
    rises = [new.refused.value - old.refused.value for old, new in sides if new.kind != HARMFUL]
    numbers = {"attack_mean": statistics.mean(attacks), "attack_max": max(attacks)}
    numbers |= {"rise_mean": statistics.mean(rises), "rise_max": max(rises)}
    return {name: round(value, 4) for name, value in numbers.items()}


def measure(model: str, method: str, recipe: Recipe, suites: Sequence[Suite], strengths: Sequence[float]) -> list[dict]:
    """Trains once and measures every strength."""
    data = TrainingData.builtin().sampled(recipe.max_prompts, recipe.seed)
    run = Run.start(model, recipe, tell)
    blocks = find_mlps(run.model)

    def evaluate() -> Scores:
        return evaluate_suites(lambda prompts: run.generate(prompts, "evaluate", tokens=JUDGED_TOKENS), suites)

    before = evaluate()
    examples = distil(run, data)
    _, clusters = find_clusters(run, data, blocks)
    deltas = DeltaSet(blocks, clusters)
    deltas.quantize_like(run.checkpoint)
    change = deltas if method == "nest" else LoraSet(blocks, deltas.first_layer)
    fit(run, blocks, change, examples)
    found, trained = [], change.snapshot()
    for strength in strengths:
        if isinstance(change, LoraSet):
            change.scale(strength)
        else:
            change.restore([delta * strength for delta in trained])
        with change.attached():
            after = evaluate()
        drift = None
        if isinstance(change, DeltaSet):
            with change.attached():
                drift = run.drift(dict(list(before.answers(BENIGN).items())[:100]), change.off)
        row = {"method": method, "seed": recipe.seed, "strength": strength, "trained": change.trainable, "kl": drift}
        row |= summary(before, after) | {"suites": {suite.suite: suite.refused.as_json() for suite in after.suites}}
        print({name: value for name, value in row.items() if name != "suites"}, flush=True)
        found.append(row)
    return found


def main() -> None:
    """Runs methods and seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--method", nargs="+", choices=("nest", "lora"), default=["nest", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", default="nest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--suite", action="append", default=[], metavar="KIND=FILE")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each suite")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS)
    given = parser.parse_args()
    suites = builtin_suites(given.limit) + [limited(load_suite(text), given.limit) for text in given.suite]
    rows = []
    for method in given.method:
        for seed in given.seeds:
            random.seed(seed)
            recipe = make_recipe(given.recipe, given.set, {"seed": seed})
            rows += measure(given.model, method, recipe, suites, given.strengths)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
