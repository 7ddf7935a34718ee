"""What gives a fine-tune its safety back: `python -m bench.neighbours MODEL PACK --work DIR`.

MODEL is the base and PACK aligns it. Fine-tunes on a small task (`_victims.py`) lose safety: `mixed`, of the aligned model with
some complying answers among its examples; `benign`, without them; `unpatched`, of the base, with them. Each way to restore one
is a row of METHODS: a command line that writes a pack, timed as a whole process. Every system is asked harmful, look-alike and
benign prompts, and its task. What DIR and `rows.jsonl` in it hold is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import harness
from bench._victims import HARMFUL_SHARE, TRAINED, harmful_answers, in_bfloat16, make_victim, task_accuracy
from nestpatch.evaluation.judges import is_refusal
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import builtin_suites
from nestpatch.export.safetensors import export_safetensors
from nestpatch.measured import HARMFUL
from nestpatch.patcher.apply import apply
from nestpatch.prompts.builtin import JAILBREAK, PREFIX
from nestpatch.runtimes.transformers import TransformersRuntime

BASE, ALIGNED = "base", "aligned"
TASK_TOKENS = 44
"""The longest answer of the task, and some more."""
VICTIMS = {"mixed": (ALIGNED, True), "benign": (ALIGNED, False), "unpatched": (BASE, True)}
"""Fine-tune -> (what is tuned, whether complying answers are among its examples)."""


@dataclass(frozen=True)
class Method:
    """A way to restore a fine-tune.

    Attributes:
        name: As the table shows it.
        command: The words after `python -m`, the last line of whose output is a JSON object. {victim}, {base}, {aligned},
            {pack} and {output} are filled in.
        victims: The fine-tunes that it is for.
    """

    name: str
    command: tuple[str, ...]
    victims: tuple[str, ...] = ("mixed", "benign")


def _transplant(name: str, *options: str) -> Method:
    words = ("{victim}", "--base", "{base}", "--reference", "{aligned}", "--json", "-o", "{output}")
    return Method(f"transplant {name}", ("nestpatch", "restore", "transplant", *words, *options))


def _extrapolate(name: str, *options: str) -> Method:
    words = ("{aligned}", "--base", "{base}", "--onto", "{victim}", "--rank", "6", "--json", "-o", "{output}")
    return Method(f"extrapolate {name}", ("nestpatch", "restore", "extrapolate", *words, *options))


def _carry(name: str, *options: str) -> Method:
    words = ("{pack}", "{victim}", "--base", "{base}", "--json", "-o", "{output}")
    return Method(f"carry {name}".strip(), ("nestpatch", "restore", "carry", *words, *options), ("unpatched",))


METHODS = (
    _transplant("1.0 beyond", "--extrapolate", "1.0"),
    _transplant("all rows"),
    _transplant("0.5 beyond", "--extrapolate", "0.5"),
    _extrapolate("0.5", "--alpha", "0.5"),
    _extrapolate("1.0", "--alpha", "1.0"),
    Method("projection 0.1", ("bench._projection", "{victim}", "{base}", "{aligned}", "0.1", "{output}")),
    _carry(""),
    _carry("refit", "--refit"),
)
"""Another method is another row."""


@dataclass(frozen=True)
class Bench:
    """One run.

    Attributes:
        work: The folder of all models and packs.
        pack: The pack that aligns the base.
        prompts: Harmful ones; half as many look-alikes and benign ones.
        steps: Of a fine-tuning.
        rate: Its step size.
        tokens: Length of an answer to a prompt of the suites.
    """

    work: Path
    pack: Path
    prompts: int
    steps: int
    rate: float
    tokens: int

    def prepare(self, model: Path, victims: Sequence[str]) -> None:
        """Makes the base, the aligned model and the fine-tunes, all in bfloat16."""
        if not (self.work / BASE).exists():
            floats = self.work / "floats"
            export_safetensors(model, output=floats)
            in_bfloat16(floats, self.work / BASE)
        if not (self.work / ALIGNED).exists():
            apply(self.work / BASE, self.pack, self.work / ALIGNED, trust="none", listed=False)
        kept = self.work / "harmful.json"
        if not kept.exists():
            kept.write_text(json.dumps(harmful_answers(self.work / BASE, int(HARMFUL_SHARE * TRAINED))), "utf-8")
        harmful = [(prompt, said) for prompt, said in json.loads(kept.read_text("utf-8"))]
        for name in victims:
            source, complying = VICTIMS[name]
            if not (self.work / name).exists():
                make_victim(self.work / source, self.work / name, harmful if complying else [], self.steps, self.rate)

    def systems(self, victims: Sequence[str]) -> Iterator[tuple[str, Method | None]]:
        """(model, how it is restored), in the order of the table."""
        yield ALIGNED, None
        for victim in victims:
            yield victim, None
            yield from ((victim, method) for method in METHODS if victim in method.victims)
        yield BASE, None

    def measure(self, name: str, method: Method | None) -> dict[str, Any]:
        """One row of the table."""
        facts: dict[str, Any] = {"model": name, "method": method.name if method else ""}
        place = self.work / name
        if method is not None:
            place, made = self._restored(name, method)
            facts |= made
        runtime = TransformersRuntime.load(place, dtype="bfloat16", max_new_tokens=self.tokens)
        for suite in builtin_suites(self.prompts):
            if suite.name == PREFIX + JAILBREAK:
                continue
            prompts = [prompt.text for prompt in suite.prompts.prompts]
            answers = runtime.generate(prompts if suite.kind == HARMFUL else prompts[: self.prompts // 2])
            refused = sum(is_refusal(answer) for answer in answers)
            count = len(answers) - refused if suite.kind == HARMFUL else refused
            facts[suite.kind] = Share(count, len(answers)).as_json()
        return facts | {"task": task_accuracy(replace(runtime, max_new_tokens=TASK_TOKENS)).as_json()}

    def _restored(self, name: str, method: Method) -> tuple[Path, dict[str, Any]]:
        stem = f"{name}-{method.name}".replace(" ", "-")
        output = self.work / f"{stem}.nest"
        output.unlink(missing_ok=True)
        models = {role: self.work / place for role, place in (("victim", name), ("base", BASE), ("aligned", ALIGNED))}
        words = [word.format(**models, pack=self.pack, output=output) for word in method.command]
        run, said = harness.measure([sys.executable, "-m", *words])
        made = json.loads(said)
        target = self.work / stem
        if not target.exists():
            apply(models["victim"], output, target, trust="none", listed=False)
        facts = ("rows", "inexact_rows", "moved_rows", "bytes")
        return target, {"s": run.seconds, **{fact: made[fact] for fact in facts if fact in made}}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of a Markdown table, shares in per cent."""
    heads = ("model", "restored by", "attack success", "refusals, look-alike", "benign", "task", "rows", "s")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        shares = [f"{100 * row[kind]['value']:.0f} %" for kind in ("harmful", "lookalike", "benign", "task")]
        cost = [f"{row['rows']}", f"{row['s']:.0f}"] if "rows" in row else ["", ""]
        lines.append(f"| {' | '.join([row['model'], row['method'], *shares, *cost])} |")
    return "\n".join(lines)


def main() -> None:
    """Measures what is not in DIR yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    parser.add_argument("--prompts", type=int, default=40, help="harmful ones; half as many of the others")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer; a refusal is one from its start")
    parser.add_argument("--log", action="store_true", help="add the table to bench/LOG.md")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.work, given.pack, given.prompts, given.steps, given.rate, given.tokens)
    bench.prepare(given.model, given.victims)
    kept = given.work / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()] if kept.exists() else []
    for name, method in bench.systems(given.victims):
        if not any((row["model"], row["method"]) == (name, method.name if method else "") for row in rows):
            rows.append(bench.measure(name, method))
            with open(kept, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    notes = f"{given.steps} steps of LoRA at {given.rate:g}; {given.prompts} harmful prompts, half as many of the others."
    harness.report("restoring a fine-tune", notes, [table(rows)], {"rows": rows}, log=given.log)


if __name__ == "__main__":
    main()
