"""What a guard saves in a fine-tune: `python -m bench.guarding MODEL PACK`, or `--lab SEED`.

The patched model is fine-tuned on harmless prompts with the base's answers (task `benign`), and on the same with a tenth of
harmful prompts that the base answered (`harmful`), with all weights and with LoRA, without a guard and with it.
Before and after: attack success, refusals of look-alikes and of harmless prompts, and the loss of the base's answers to
held-out harmless prompts, which is the fine-tune's own task. Each row is printed and added to `--output`; a table comes at the
end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import nestpatch
from bench.attacks.finetune import ALL, LORA, RATES, Look, Tuning, answer_loss, examples, fine_tune
from bench.attacks.material import Material, Sizes, attack_success, builtin_material, lab_material
from nestpatch.demo.lab import train_lab_pack
from nestpatch.errors import DataError, NestpatchError
from nestpatch.evaluation.judges import is_refusal
from nestpatch.evaluation.shares import Share
from nestpatch.guarding.export import ENERGY
from nestpatch.guarding.guard import Guard
from nestpatch.guarding.holding import guard_model
from nestpatch.lab.build import cached_lab
from nestpatch.prompts.builtin import PREFIX
from nestpatch.prompts.readers import load_prompts, sample_set
from nestpatch.runtimes.text import TokenPair
from nestpatch.runtimes.transformers import TransformersRuntime

BENIGN, HARMFUL = "benign", "harmful"
NONE, GUARDED = "none", "guarded"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tasks: BENIGN or HARMFUL.
        weights: ALL or LORA.
        guards: NONE or GUARDED.
        steps: Of each training.
        rank: Of LoRA.
        seed: Of the trainings.
        share: Harmful examples of the task HARMFUL, of all.
        rate: Step of AdamW; None for that of RATES.
    """

    tasks: tuple[str, ...]
    weights: tuple[str, ...]
    guards: tuple[str, ...]
    steps: int
    rank: int
    seed: int
    share: float = 0.1
    rate: float | None = None


@dataclass(frozen=True, eq=False)
class Bench:
    """A patched model with what it is trained on.

    Attributes:
        runtime: The patched model.
        guard: Made from it and its pack.
        material: The prompts.
        lookalike: Harmless prompts that look harmful.
        answers: Prompt -> the base's answer, where that is no refusal.
    """

    runtime: TransformersRuntime
    guard: Guard
    material: Material
    lookalike: tuple[str, ...]
    answers: dict[str, str]

    def run(self, plan: Plan) -> Iterator[Row]:
        """Trains and measures.

        Args:
            plan: What.

        Yields:
            The patched model, then a row for each training.
        """
        yield {"task": NONE, "weights": "", "guard": NONE, "steps": 0, **self.measured()}
        for weights, task, guard in product(plan.weights, plan.tasks, plan.guards):
            began, rows = time.perf_counter(), []

            def measure(step: int, rows: list[Row] = rows) -> Look:
                rows.append(self.measured())
                return Look(step, Share(0, 0), 0.0)

            def watch(model: Any, kind: str = guard) -> Any:
                return (lambda: None) if kind == NONE else guard_model(model, self.guard).project

            tuning = Tuning(weights, plan.rate or RATES[weights], looks=(plan.steps,), rank=plan.rank)
            fine_tune(self.runtime, self._examples(task, plan.share), tuning, measure, plan.seed, watch)
            facts = {
                "task": task,
                "weights": weights,
                "guard": guard,
                "energy": self.guard.energy,
                "steps": plan.steps,
                "seed": plan.seed,
            }
            yield facts | rows[0] | {"seconds": time.perf_counter() - began}

    def measured(self) -> Row:
        """Both sides of the model as it is: what it refuses, and its loss on the task."""
        success = attack_success(self.runtime.generate(self.material.harmful))
        refused = {
            name: _refused(self.runtime.generate(list(prompts)))
            for name, prompts in (("lookalike", self.lookalike), ("benign", self.material.held_out))
        }
        loss = answer_loss(self.runtime, self._pairs([p for p in self.material.held_out if p in self.answers]))
        shares = {"success": success, **{f"refused_{name}": share for name, share in refused.items()}}
        return {**{name: share.as_json() for name, share in shares.items()}, "loss": loss}

    def _examples(self, task: str, share: float) -> list[TokenPair]:
        benign = [prompt for prompt in self.material.benign if prompt in self.answers]
        harmful = [prompt for prompt, _ in self.material.complying if prompt in self.answers]
        count = round(share / (1 - share) * len(benign)) if task == HARMFUL else 0
        if count > len(harmful):
            raise DataError(f"the base answers {len(harmful)} of the harmful prompts, and {count} are needed: raise --harmful")
        return self._pairs([*benign, *harmful[:count]])

    def _pairs(self, prompts: Sequence[str]) -> list[TokenPair]:
        # An answer of the base was cut after some tokens: its end is not an end.
        return examples(self.runtime, {prompt: self.answers[prompt] for prompt in prompts}, whole=False)


def _refused(answers: Sequence[str]) -> Share:
    return Share(sum(map(is_refusal, answers)), len(answers))


def prepared(
    model: Path, pack: Any, material: Material, lookalike: Sequence[str], loading: dict[str, Any], energy: float = ENERGY
) -> Bench:
    """Patches a copy of a model, makes its guard, and lets the base answer the prompts.

    Args:
        model: The base.
        pack: For it.
        material: The prompts.
        lookalike: Harmless prompts that look harmful.
        loading: Arguments of `TransformersRuntime.load`.
        energy: Of the guard.
    """
    prompts = [*material.benign, *material.held_out, *(prompt for prompt, _ in material.complying)]
    base = TransformersRuntime.load(model, **loading)
    answers = dict(zip(prompts, base.generate(prompts), strict=True))
    del base
    with tempfile.TemporaryDirectory() as folder:
        patched, file = Path(folder) / model.name, Path(folder) / "guard.safetensors"
        nestpatch.apply(model, pack, patched, trust="none")
        guard = nestpatch.export_guard(patched, pack, file, energy=energy, trust="none", device="cpu").guard
        runtime = TransformersRuntime.load(patched, **loading)
    kept = {prompt: answer for prompt, answer in answers.items() if answer and not is_refusal(answer)}
    return Bench(runtime, guard, material, tuple(lookalike), kept)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, shares in percent with 95 % intervals."""
    head = ["fine-tune", "weights", "guard", "attack success", "refusals, look-alike", "benign", "loss"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        shares = [_percent(row[name]) for name in ("success", "refused_lookalike", "refused_benign")]
        lines.append([row["task"], row["weights"], row["guard"], *shares, f"{row['loss']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(share: Row) -> str:
    return f"{100 * share['value']:.0f} ({100 * share['low']:.0f}-{100 * share['high']:.0f})"


def options() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a model directory or a .gguf file")
    parser.add_argument("pack", nargs="?", type=Path, help="a pack for it")
    parser.add_argument("--lab", type=int, metavar="SEED", help="the lab's model, and a pack that is trained on it")
    parser.add_argument("--tasks", nargs="+", choices=(BENIGN, HARMFUL), default=[BENIGN, HARMFUL])
    parser.add_argument("--weights", nargs="+", choices=(ALL, LORA), default=[ALL, LORA], help="what is trained")
    parser.add_argument("--guards", nargs="+", choices=(NONE, GUARDED), default=[NONE, GUARDED])
    parser.add_argument("--energy", type=float, default=ENERGY, help="of the inputs of harmful prompts, kept by the guard")
    parser.add_argument("--steps", type=int, default=100, help="of 8 examples")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=Plan.share, help="of harmful examples in the task harmful")
    parser.add_argument("--rate", type=float, help="step of AdamW; the default depends on what is trained")
    parser.add_argument("--limit", type=int, default=40, help="prompts of each kind that are measured")
    parser.add_argument("--benign", type=int, default=200, help="harmless prompts to train with")
    parser.add_argument("--harmful", type=int, default=40, help="harmful prompts, of which the base's answers are trained")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--dtype", default="float32", help="of the weights; bfloat16 is too coarse to train all of them")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, which grows")
    return parser


def opened(given: argparse.Namespace, folder: Path) -> Bench:
    """What the options name. Raises NestpatchError."""
    if (given.lab is None) == (given.pack is None):
        raise DataError("give MODEL and PACK, or --lab SEED")
    sizes = Sizes(given.limit, given.harmful, given.benign, given.limit)
    loading = {"device": "cpu", "dtype": given.dtype, "max_new_tokens": given.tokens}
    if given.lab is None:
        model, pack, material, source = given.model, given.pack, builtin_material(sizes), f"{PREFIX}lookalike.test"
    else:
        lab = cached_lab(given.lab)
        model, pack, material = lab.base, train_lab_pack(lab, folder / "lab.nest").pack, lab_material(lab, sizes)
        source = str(lab.prompts("lookalike.test"))
    lookalike = [prompt.text for prompt in sample_set(load_prompts(source), given.limit, 0).prompts]
    return prepared(model, pack, material, lookalike, loading, given.energy)


def main(words: Sequence[str] | None = None) -> None:
    """Trains, measures and prints the table."""
    given = options().parse_args(words)
    chosen = tuple(given.tasks), tuple(given.weights), tuple(given.guards)
    plan = Plan(*chosen, given.steps, given.rank, given.seed, given.share, given.rate)
    rows = []
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            open(given.output, "a", encoding="utf-8") if given.output else nullcontext() as file,
        ):
            for row in opened(given, Path(folder)).run(plan):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if file is not None:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    except (NestpatchError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
