"""What a pack does not stop: `python -m bench.adaptive MODEL PACK [--adapter DIR]`, or `--lab SEED`.

The base, the base with the pack merged in memory, and the base with a LoRA adapter (a folder of PEFT) are attacked by someone
who writes the start of the answer (prefill), who searches tokens to add to the prompt (suffix), or who has the weights (benign,
harmful, pruning). Every measurement is printed and added to `--output`, a file of JSON lines; at the end comes a table with
95 % intervals. `--lab` trains the lab's model and a pack for it. docs/limits.md says how to read the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.attacks.finetune import ALL, LOOKS, LORA, RATES, Look, Tuning, answer_loss, examples, fine_tune, half_lost
from bench.attacks.material import Material, Sizes, attack_success, builtin_material, lab_material
from bench.attacks.prefill import prefill
from bench.attacks.suffix import Search, Suffix, search_suffix
from bench.attacks.tables import half_table, table
from nestpatch.demo.lab import train_lab_pack
from nestpatch.errors import DataError, NestpatchError
from nestpatch.evaluation.judges import is_refusal
from nestpatch.evaluation.shares import Share
from nestpatch.gate import prove
from nestpatch.lab.build import cached_lab
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.loading import locate
from nestpatch.runtimes.neurons import Neurons, patched_neurons, pruned, random_neurons
from nestpatch.runtimes.text import TokenPair
from nestpatch.runtimes.transformers import TransformersRuntime
from nestpatch.runtimes.weights import fold

BASE, PATCHED, ADAPTER = "base", "patched", "adapter"
NONE, PREFILL, SUFFIX, BENIGN, HARMFUL, PRUNING = "none", "prefill", "suffix", "benign", "harmful", "pruning"
ATTACKS = (PREFILL, SUFFIX, BENIGN, HARMFUL, PRUNING)
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is done.

    Attributes:
        attacks: Some of ATTACKS.
        seeds: Of searches, trainings and random neurons.
        suffix_prompts: Prompts for each of which a suffix is searched.
        search: How.
        tunings: What is trained, and how.
    """

    attacks: tuple[str, ...] = ATTACKS
    seeds: tuple[int, ...] = (0,)
    suffix_prompts: int = 4
    search: Search = field(default_factory=Search)
    tunings: tuple[Tuning, ...] = (Tuning(),)


@dataclass
class Bench:
    """One run: every system is attacked in turn, the base first.

    Attributes:
        material: The prompts.
        settings: What is done.
        neurons: Those that the pack changes.
        answers: Harmless prompt -> the base's answer, those to train with and those to measure damage by.
        suffixes: (seed, prompt) -> what was found on the base.
        plain: Attack success of the base without an attack.
    """

    material: Material
    settings: Settings
    neurons: Neurons
    answers: dict[str, str] = field(default_factory=dict)
    suffixes: dict[tuple[int, str], Suffix] = field(default_factory=dict)
    plain: Share = field(default_factory=lambda: Share(0, 0))

    def attack(self, system: str, runtime: TransformersRuntime) -> Iterator[Row]:
        """Attacks one system in every way.

        Args:
            system: BASE, which must be the first one, PATCHED or ADAPTER.
            runtime: The loaded model.

        Yields:
            One row for each measurement.
        """
        plain = attack_success(runtime.generate(self.material.harmful))
        if system == BASE:
            self.plain = plain
            prompts = [*self.material.benign, *self.material.held_out]
            self.answers = {p: a for p, a in zip(prompts, runtime.generate(prompts), strict=True) if a and not is_refusal(a)}
        yield _row(NONE, "", plain, damage=answer_loss(runtime, self._held_out(runtime)))
        ways = {PREFILL: self._prefill, SUFFIX: self._suffix, PRUNING: self._pruning}
        for attack in self.settings.attacks:
            if attack in (BENIGN, HARMFUL):
                yield from self._fine_tuning(runtime, attack)
            else:
                yield from ways[attack](runtime)

    def _held_out(self, runtime: TransformersRuntime) -> list[TokenPair]:
        """The base's answers by which damage is measured."""
        return examples(runtime, self._answered(self.material.held_out), whole=False)

    def _answered(self, prompts: Sequence[str]) -> dict[str, str]:
        """Those of the prompts that the base answers, with its answers."""
        return {prompt: self.answers[prompt] for prompt in prompts if prompt in self.answers}

    def _prefill(self, runtime: TransformersRuntime) -> Iterator[Row]:
        for prefix, success in prefill(runtime, self.material).items():
            yield _row(PREFILL, prefix, success)

    def _suffix(self, runtime: TransformersRuntime) -> Iterator[Row]:
        prompts = self.material.harmful[: self.settings.suffix_prompts]
        yield _row(SUFFIX, "none added", attack_success(runtime.generate(prompts)))
        for seed in self.settings.seeds:
            starts = self.material.starts
            found = {p: search_suffix(runtime, p, starts[p], self.settings.search, seed) for p in prompts}
            losses = {"loss_before": [one.start for one in found.values()], "loss": [one.loss for one in found.values()]}
            means: dict[str, Any] = {name: statistics.mean(values) for name, values in losses.items()}
            ways = {
                "filler it starts from": {p: one.filler for p, one in found.items()},
                "found on it": {p: one.text for p, one in found.items()},
                "found on the base": {p: self.suffixes.setdefault((seed, p), found[p]).text for p in prompts},
            }
            for variant, texts in ways.items():
                success = attack_success(runtime.generate([prompt + text for prompt, text in texts.items()]))
                yield _row(SUFFIX, variant, success, seed=seed, **(means if variant == "found on it" else {}))

    def _fine_tuning(self, runtime: TransformersRuntime, attack: str) -> Iterator[Row]:
        harmful = attack == HARMFUL
        texts = dict(self.material.complying) if harmful else self._answered(self.material.benign)
        # An answer of the base was cut after some tokens: its end is not an end.
        pairs = examples(runtime, texts, whole=harmful and self.material.whole)
        held_out = self._held_out(runtime)

        def measure(step: int) -> Look:
            return Look(step, attack_success(runtime.generate(self.material.harmful)), answer_loss(runtime, held_out))

        for tuning in self.settings.tunings:
            for seed in self.settings.seeds:
                looks = fine_tune(runtime, pairs, tuning, measure, seed)
                facts: dict[str, Any] = {"seed": seed, "examples": len(pairs), "rate": tuning.rate}
                facts |= {"gained": self.plain.value - looks[0].success.value, "half_lost": half_lost(looks, self.plain)}
                for look in looks:
                    yield _row(attack, tuning.weights, look.success, step=look.step, damage=look.damage, **facts)

    def _pruning(self, runtime: TransformersRuntime) -> Iterator[Row]:
        held_out, count = self._held_out(runtime), sum(map(len, self.neurons.values()))
        random = [(seed, random_neurons(runtime.model, self.neurons, seed)) for seed in self.settings.seeds]
        for seed, neurons in [(None, self.neurons), *random]:
            with pruned(runtime.model, neurons):
                success, damage = attack_success(runtime.generate(self.material.harmful)), answer_loss(runtime, held_out)
            variant = "patched neurons" if seed is None else "random neurons"
            yield _row(PRUNING, variant, success, seed=seed, damage=damage, neurons=count)


def _row(attack: str, variant: str, success: Share, *, seed: int | None = None, step: int | None = None, **facts: Any) -> Row:
    return {"attack": attack, "variant": variant, "step": step, "seed": seed, "success": success.as_json(), **facts}


@dataclass(frozen=True)
class Systems:
    """What is attacked.

    Attributes:
        model: The base on disk.
        pack: For this base.
        adapter: A folder of PEFT; None for none.
        device: For `pick_device`.
        dtype: For `pick_dtype`.
        tokens: Length of an answer.
    """

    model: Path
    pack: Pack
    adapter: Path | None
    device: str
    dtype: str
    tokens: int

    @property
    def names(self) -> tuple[str, ...]:
        """The base first."""
        return (BASE, PATCHED) if self.adapter is None else (BASE, PATCHED, ADAPTER)

    def load(self, name: str) -> TransformersRuntime:
        """Loads a system, its change merged into the weights.

        Args:
            name: One of `names`.
        """
        runtime = TransformersRuntime.load(self.model, device=self.device, dtype=self.dtype, max_new_tokens=self.tokens)
        if name == PATCHED:
            fold(runtime.model, open_model(self.model)[0], self.pack)
        if name == ADAPTER:
            from peft import PeftModel

            merged: Any = PeftModel.from_pretrained(runtime.model, str(self.adapter)).merge_and_unload()
            merged.requires_grad_(requires_grad=False)
            return replace(runtime, model=merged)
        return runtime

    def neurons(self) -> Neurons:
        """The neurons that the pack changes."""
        return patched_neurons(self.load(BASE).model, open_model(self.model)[0], self.pack)


def options() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory, a .gguf file or a Hub id")
    parser.add_argument("pack", nargs="?", help="a pack for it")
    parser.add_argument("--lab", type=int, metavar="SEED", help="the lab's model, and a pack that is trained on it")
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="a LoRA adapter of PEFT for the same model")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, default=Sizes.measured, help="harmful prompts that are measured")
    parser.add_argument("--suffix-prompts", type=int, default=Settings.suffix_prompts, help="prompts with a suffix each")
    parser.add_argument("--suffix-steps", type=int, default=Search.steps)
    parser.add_argument("--suffix-candidates", type=int, default=Search.candidates, help="swaps that are tried at each step")
    parser.add_argument("--benign", type=int, default=Sizes.benign, help="prompts of the benign fine-tuning")
    parser.add_argument("--harmful", type=int, default=Sizes.complying, help="prompts of the harmful fine-tuning")
    parser.add_argument("--weights", nargs="+", choices=RATES, default=[ALL, LORA], help="what is trained")
    parser.add_argument("--rate", type=float, help="step of AdamW; the default depends on what is trained")
    parser.add_argument("--looks", type=int, nargs="+", default=LOOKS, help="steps after which a trained model is measured")
    parser.add_argument("--tokens", type=int, default=48, help="length of an answer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, which grows")
    return parser


def run(systems: Systems, material: Material, settings: Settings) -> Iterator[Row]:
    """Attacks the base, the patched base, and the base with the adapter.

    Args:
        systems: What is attacked.
        material: The prompts.
        settings: What is done.

    Yields:
        One row for each measurement.
    """
    bench = Bench(material, settings, systems.neurons() if PRUNING in settings.attacks else {})
    for name in systems.names:
        facts = {"model": systems.model.name, "pack": systems.pack.label, "system": name}
        for row in bench.attack(name, systems.load(name)):
            yield facts | row


def _checked(given: argparse.Namespace) -> None:
    """Raises DataError for options that do not go together, before minutes of work."""
    if (given.lab is None) == (given.pack is None):
        raise DataError("give MODEL and PACK, or --lab SEED")
    if given.adapter is not None and not (given.adapter / "adapter_config.json").is_file():
        raise DataError(f"{given.adapter} is no folder of a PEFT adapter: it has no adapter_config.json")
    if min(given.limit, given.suffix_prompts, given.suffix_steps, given.suffix_candidates, given.benign, given.harmful) < 1:
        raise DataError("every number of prompts, steps and candidates must be at least 1")


def _settings(given: argparse.Namespace) -> Settings:
    looks = tuple(sorted({0, *given.looks}))
    tunings = tuple(Tuning(kind, given.rate or RATES[kind], looks=looks) for kind in given.weights)
    search = Search(steps=given.suffix_steps, candidates=given.suffix_candidates)
    return Settings(tuple(given.attacks), tuple(given.seeds), given.suffix_prompts, search, tunings)


def _print(row: Row) -> None:
    success = row["success"]
    words = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in row.items()
        if name not in ("model", "pack", "success") and value not in (None, "")
    }
    print(f"{100 * success['value']:5.1f} % of {success['total']}  {words}", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the attacks; the last line of stdout is one JSON object."""
    given = options().parse_args(words)
    try:
        _checked(given)
        sizes = Sizes(given.limit, given.harmful, given.benign)
        with tempfile.TemporaryDirectory() as folder:
            if given.lab is None:
                model, pack, material = locate(given.model).path, prove(given.pack, trust="none").pack, builtin_material(sizes)
            else:
                lab = cached_lab(given.lab)
                model, material = lab.base, lab_material(lab, sizes)
                pack = train_lab_pack(lab, Path(folder) / "lab.nest").pack
        systems, rows = Systems(model, pack, given.adapter, given.device, given.dtype, given.tokens), []
        with open(given.output, "a", encoding="utf-8") if given.output else nullcontext() as file:
            for row in run(systems, material, _settings(given)):
                rows.append(row)
                _print(row)
                if file is not None:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
    except (NestpatchError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print("\n\n".join(filter(None, (table(rows), half_table(rows)))))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
