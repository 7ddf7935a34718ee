"""The command that trains: train."""

from __future__ import annotations

from pathlib import Path

import click

from nestpatch.commands._options import (
    ModelType,
    OutputPath,
    PathType,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
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
@click.option("--recipe", "recipe_file", type=PathType, help="TOML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")
@click.option("--suite", multiple=True, help="Evaluate before and after: [KIND=]SOURCE. Repeatable.")
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
    recipe_file: Path | None,
    assignments: tuple[str, ...],
    suite: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a safety patch for BASE, a model directory or a Hub id.

    Prompt sources are .jsonl, .json, .csv or .parquet files with a "prompt" column, or data set ids of the Hub.
    """
    from nestpatch.evaluation.suites import load_suite
    from nestpatch.files.atomic import check_output
    from nestpatch.formats import nest
    from nestpatch.nest_train.recipe import make_recipe
    from nestpatch.nest_train.train import TrainingData
    from nestpatch.nest_train.train import train as run
    from nestpatch.pack import Label
    from nestpatch.prompts.readers import join_sets, load_prompts
    from nestpatch.views.packs import show_pack

    # Before minutes of work: will there be a place for the result?
    check_output(output)
    recipe = make_recipe(recipe_file, assignments)
    sets = [[load_prompts(source) for source in sources] for sources in (harmful, benign, lookalike)]
    data = TrainingData(join_sets(sets[0]), join_sets(sets[1]), join_sets(sets[2]) if sets[2] else None)
    label = Label(name or output.name.removesuffix(".nest"), pack_version, description, license_, tag)
    label.check()
    with progress(quiet) as on_event:
        trained = run(base, data, label, recipe=recipe, suites=[load_suite(s) for s in suite], on_event=on_event)
    pack_id = nest.write(trained.pack, output)
    nbytes = output.stat().st_size
    if as_json:
        facts = {"pack": str(output), "pack_id": pack_id, "bytes": nbytes, "trained_parameters": trained.trained_parameters}
        numbers = {"before": trained.before, "after": trained.after}
        print_json(facts | {what: value.as_json() for what, value in numbers.items() if value is not None})
        return
    show_pack(trained.pack, pack_id, nbytes)
