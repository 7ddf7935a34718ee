"""The demo, and the small world that it uses: demo, lab build."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nestpatch.commands.options import (
    OutputPath,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
)


@click.command(
    epilog=examples(
        "nestpatch demo",
        "nestpatch demo --seed 1 --keep demo",
    )
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the lab and of the training.")
@click.option("--keep", type=OutputPath, help="Leave base/, patched/, pack.nest and prompts/ in this new directory.")
@quiet_option
@json_option
def demo(seed: int, keep: Path | None, quiet: bool, as_json: bool) -> None:
    """Train a pack for a small model made here, apply it, and evaluate the result. Takes a few minutes on a CPU.

    Exit code 1 when attacks do not succeed clearly less often.
    """
    from nestpatch.lab.demo import run_demo
    from nestpatch.views.console import err, out
    from nestpatch.views.evaluation import show_demo

    with progress(quiet) as on_event:
        result = run_demo(seed, keep, on_event)
    # The table is for people; with --json only the object goes to stdout.
    show_demo(result, err if as_json else out)
    if not result.helped:
        err.print("[bold red]The pack did not help:[/] attacks succeed about as often as before.")
    if as_json:
        print_json(result.as_json())
    sys.exit(0 if result.helped else 1)


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
