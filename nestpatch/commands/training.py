"""The command that trains: train."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from nestpatch.commands.options import (
    ModelType,
    OutputPath,
    PathType,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
    require_order,
    say,
)


def _help_recipe(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nestpatch.views.console import out
        from nestpatch.views.packs import recipe_table

        out.print(recipe_table())
        ctx.exit(0)


@click.command(
    epilog=examples(
        "nestpatch train models/llama --harmful harmful.jsonl --benign benign.jsonl -o no-harm.nest",
        "nestpatch train acme/llama --harmful bad.csv --benign good.csv --set steps=400 -o no-harm.nest",
    )
)
@click.argument("base", type=ModelType)
@click.option("--harmful", multiple=True, required=True, help="Prompts to refuse: file or data set id. Repeatable.")
@click.option("--benign", multiple=True, required=True, help="Prompts to go on answering. Repeatable.")
@click.option("--lookalike", multiple=True, help="Harmless prompts that look harmful. Repeatable.")
@click.option("-o", "--output", type=OutputPath, required=True, help="The pack to write.")
@click.option("--name", help="Name of the pack.  [default: the output's file name]")
@click.option("--version", "pack_version", default="1.0.0", show_default=True, help="Version of the pack (semver).")
@click.option("--description", default="", help="One sentence for people.")
@click.option("--license", "license_", default="", help="License of the pack (SPDX).")
@click.option("--tag", multiple=True, help="A word to find the pack by. Repeatable.")
@click.option("--suite", multiple=True, help="Evaluate before and after: [KIND=]SOURCE. Repeatable.")
@click.option("--recipe", "recipe_file", type=PathType, help="TOML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")
@click.option("--device", help="cpu, cuda or mps; the same as --set device=...  [default: the best one]")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.  [default: the libraries' choice]")
@click.option("--dry-run", is_flag=True, help="Report what would be trained and how long it would take; write nothing.")
@click.option(
    "--help-recipe", is_flag=True, is_eager=True, expose_value=False, callback=_help_recipe, help="Show all settings."
)
@quiet_option
@json_option
def train(
    base: str,
    harmful: tuple[str, ...],
    benign: tuple[str, ...],
    lookalike: tuple[str, ...],
    output: Path,
    name: str | None,
    pack_version: str,
    description: str,
    license_: str,
    tag: tuple[str, ...],
    suite: tuple[str, ...],
    recipe_file: Path | None,
    assignments: tuple[str, ...],
    device: str | None,
    threads: int | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a safety patch for BASE, a model directory or a Hub id.

    Prompt sources are .jsonl, .json, .csv or .parquet files with a "prompt" column, or data set ids of the Hub. The pack is
    written before it is evaluated. Exit code 1 when it could not be evaluated; numbers that speak against it are warnings.
    """
    require_order(base, None, "train")
    from nestpatch.evaluation.suites import load_suite
    from nestpatch.files.atomic import check_output
    from nestpatch.nest_train.data import TrainingData
    from nestpatch.nest_train.plan import plan
    from nestpatch.nest_train.recipe import make_recipe
    from nestpatch.nest_train.train import require_packages
    from nestpatch.nest_train.train import train as run
    from nestpatch.pack import Label
    from nestpatch.prompts.readers import join_sets, load_prompts
    from nestpatch.views import evaluation as views

    # Everything that can be wrong is reported before prompts are downloaded and the model is loaded.
    require_packages()
    check_output(output)
    recipe = make_recipe(recipe_file, [*assignments, *([f"device={device}"] if device else [])])
    label = Label(name or output.name.removesuffix(".nest"), pack_version, description, license_, tag)
    label.check()
    sets = [[load_prompts(source) for source in sources] for sources in (harmful, benign, lookalike)]
    data = TrainingData(join_sets(sets[0]), join_sets(sets[1]), join_sets(sets[2]) if sets[2] else None)
    data.check()
    suites = [load_suite(text) for text in suite]
    if dry_run:
        with progress(quiet) as on_event:
            planned = plan(base, data, recipe=recipe, suites=suites, threads=threads, on_event=on_event)
        if as_json:
            print_json({"model": base, "output": str(output), **planned.as_json(), "dry_run": True})
        else:
            views.show_plan(planned, str(output))
        return
    with progress(quiet) as on_event:
        trained = run(base, data, label, recipe=recipe, suites=suites, output=output, threads=threads, on_event=on_event)
    if as_json:
        print_json({"model": base, **trained.as_json()})
    else:
        views.show_trained(trained, base)
    for warning in trained.warnings:
        say(f"WARNING: {warning}", err=True)
    if trained.problem is not None:
        say(f"The pack is written, but could not be evaluated: {trained.problem}", err=True)
        say(f"Evaluate it again: nestpatch eval {base} {output} --suite SUITE", err=True)
        sys.exit(1)
