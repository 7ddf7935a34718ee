"""A training step of nestpatch beside LoRA as people train it: `python -m bench.step MODEL`, or `--random 135m`.

Both train a frozen base of the same weights on the same batches, towards refusals of harmful prompts and against divergence
from the base on harmless ones. LoRA (PEFT, rank 8, gate_proj and up_proj of all layers) runs the whole model with labels and
all logits, and once more without adapters for the divergence. The steps alternate in one process; the first ones are not
counted. The memory is measured in a process for each: its peak during the steps without what was there after loading. What
nestpatch computes once before its steps counts as memory, and its time, divided by the steps of the recipe, in `speedup_whole`.

The random models have the shapes of SmolLM2-135M, Llama-3.2-1B and Mistral-7B and are made on the device; their batches have as
many tokens as the built-in prompts. The goals: 1.5 times the tokens a second, 0.7 times the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import measure, report

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
MODELS = {
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "7b": (4096, 14336, 32, 32, 8, 32768),
}
"""Those up to 1b have tied embeddings."""
CONTENDERS = ("nestpatch", "lora")


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a model directory, a GGUF file or a Hub id")
    parser.add_argument("--random", choices=MODELS, help="a random model of this size instead")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the recipe nest")
    parser.add_argument("--log", action="store_true", help="add the result to bench/LOG.md")
    parser.add_argument("--part", choices=("speed", *CONTENDERS), help=argparse.SUPPRESS)
    return parser


def run_part(given: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    from bench import _step

    bench = _step.Bench(given.model, given.random and dict(zip(SIZES, MODELS[given.random], strict=True)), given.set)
    if given.part == "speed":
        return bench.speed(given.warm_up, given.steps)
    return bench.memory(given.part, given.warm_up + given.steps)


def in_process(part: str) -> dict[str, Any]:
    """One measurement, in a process of its own."""
    _, said = measure([sys.executable, "-m", "bench.step", *sys.argv[1:], "--part", part])
    found: dict[str, Any] = json.loads(said)
    return found


def rates(tokens: Sequence[int], seconds: Sequence[float]) -> float:
    """Median tokens a second."""
    return statistics.median(count / time for count, time in zip(tokens, seconds, strict=True))


def main() -> None:
    """Measures both contenders, and prints a table and a JSON object."""
    parser = arguments()
    given = parser.parse_args()
    if bool(given.model) == bool(given.random):
        parser.error("give a model or --random")
    if given.part:
        print(json.dumps(run_part(given)))
        return
    speed = in_process("speed")
    extra = {name: in_process(name)["extra_mb"] for name in CONTENDERS}
    rate = {name: rates(speed["tokens"], speed["seconds"][name]) for name in CONTENDERS}
    step = {name: statistics.median(speed["seconds"][name]) for name in CONTENDERS}
    facts = {
        "speedup": rate["nestpatch"] / rate["lora"],
        "speedup_whole": step["lora"] / (step["nestpatch"] + speed["once_per_step"]),
        "memory_ratio": extra["nestpatch"] / extra["lora"],
    }
    rows = [
        f"| {name} | {step[name]:.3f} | {rate[name]:.0f} | {extra[name]:.0f} | {speed['trained'][name]} |"
        for name in CONTENDERS
    ]
    table = "\n".join(["| | seconds a step | tokens/s | extra peak, MB | trained |", "|---|---|---|---|---|", *rows])
    notes = (
        f"{speed['base']} Medians of {given.steps} steps that alternate. Tokens a second {facts['speedup']:.2f} times LoRA's "
        f"({facts['speedup_whole']:.2f} with what is computed once), extra peak memory {facts['memory_ratio']:.2f} times."
    )
    name = given.random or Path(given.model).name
    numbers = {f"{who}_tokens_per_s": rate[who] for who in CONTENDERS} | {f"{who}_extra_mb": extra[who] for who in CONTENDERS}
    report(f"a training step beside LoRA, {name}", notes, [table], facts | numbers, log=given.log)


if __name__ == "__main__":
    main()
