"""Commands that run models: train, eval, demo, lab."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from nestpatch.commands._options import (
    PathType,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    say,
    say_unchecked,
    trust_options,
)


def _help_recipe(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nestpatch.views.results import out, recipe_table

        out.print(recipe_table())
        ctx.exit(0)


@click.command()
@click.argument("base")
@click.option("--harmful", multiple=True, required=True, help="Prompts to refuse: file or data set id. Repeatable.")
@click.option("--benign", multiple=True, required=True, help="Prompts to go on answering. Repeatable.")
@click.option("--lookalike", multiple=True, help="Harmless prompts that look harmful. Repeatable.")
@click.option("-o", "--output", type=PathType, required=True, help="The pack to write.")
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
    from nestpatch.views import results as views

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
    views.show_pack(trained.pack, pack_id, nbytes)


@click.command("eval")
@click.argument("model")
@click.argument("patch", required=False)
@trust_options
@click.option("--suite", multiple=True, required=True, help="[KIND=]SOURCE; kinds: harmful, benign, lookalike. Repeatable.")
@click.option("--lora", type=PathType, help="An adapter, .gguf or .onnx_adapter, for such a MODEL: measured like PATCH.")
@click.option("--base", help="The unpatched model: measures how far MODEL has moved from it.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or mps.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of an answer.")
@click.option("--answers", type=PathType, help="Write every answer and verdict to this JSONL file.")
@click.option("--fail-over", multiple=True, metavar="NAME=SHARE", help="End with 1 over this: attack_success=0.05. Repeatable.")
@click.option("--fail-under", multiple=True, metavar="NAME=SHARE", help="End with 1 under this. Repeatable.")
@quiet_option
@json_option
def evaluate(
    model: str,
    pack: str | None,
    policy_file: Path | None,
    allow_unsigned: bool,
    suite: tuple[str, ...],
    lora: Path | None,
    base: str | None,
    device: str,
    max_new_tokens: int,
    answers: Path | None,
    fail_over: tuple[str, ...],
    fail_under: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure attack success and over-refusal of MODEL, alone or also with PATCH merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, with PATCH as an adapter; that needs no torch. PATCH is
    a file, or hub://owner/name[@VERSION] and other channels. Its signatures are checked first.

    A suite's kind is told by its file name (harmful*, jailbreak*, benign*, lookalike*) or said: harmful=FILE. Limits are for
    MODEL with PATCH, where there is one; their names are those of --json.
    """
    from nestpatch.evaluation.evaluator import evaluate, write_answers
    from nestpatch.evaluation.limits import exceeded, parse_limits
    from nestpatch.evaluation.suites import load_suite
    from nestpatch.views import results as views

    over, under = parse_limits(fail_over), parse_limits(fail_under)
    suites = [load_suite(text) for text in suite]
    options = {"lora": lora, "base": base, "device": device, "max_new_tokens": max_new_tokens}
    with progress(quiet) as on_event:
        checked = None
        if pack is not None:
            checked = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        result = evaluate(model, suites, pack=checked, on_event=on_event, **options)  # type: ignore[arg-type]
    say_unchecked(checked)
    if answers is not None:
        write_answers(result, answers)
    columns = {"model": result.model} | ({"patched": result.patched} if result.patched else {})
    if as_json:
        print_json({name: evaluation.as_json() for name, evaluation in columns.items()})
    else:
        views.out.print(views.evaluation_table(columns))
    failures = exceeded(result.patched or result.model, over, under)
    for failure in failures:
        say(f"FAILED: {failure}", err=True)
    sys.exit(1 if failures else 0)


@click.command()
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the lab world and of the training.")
@click.option("--keep", type=PathType, help="Leave base/, patched/, patch.nest and prompts/ in this new directory.")
@quiet_option
@json_option
def demo(seed: int, keep: Path | None, quiet: bool, as_json: bool) -> None:
    """Show the whole way on a small model made here: train, apply, evaluate. Takes a few minutes on a CPU."""
    from nestpatch.lab.demo import run_demo
    from nestpatch.views import results as views

    with progress(quiet) as on_event:
        result = run_demo(seed, keep, on_event)
    # The table is for people; with --json only the object goes to stdout.
    console = views.err if as_json else views.out
    console.print(views.stage_table(result.stages))
    console.print()
    console.print(views.evaluation_table({"base": result.before, "patched": result.after}))
    if result.formats:
        console.print()
        console.print(views.formats_table(result.formats))
    if not result.helped:
        views.err.print("[bold red]The patch did not help:[/] attacks succeed about as often as before.")
    if as_json:
        print_json(result.as_json())
    sys.exit(0 if result.helped else 1)


@click.group()
def lab() -> None:
    """The small world that the demo and the tests use."""


@lab.command()
@click.argument("directory", type=PathType)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the world and of the training.")
@quiet_option
@json_option
def build(directory: Path, seed: int, quiet: bool, as_json: bool) -> None:
    """Make a small half-aligned chat model and its prompt sets in DIRECTORY, about two minutes on two CPU cores."""
    from nestpatch.lab.build import build_lab
    from nestpatch.views import results as views

    with progress(quiet) as on_event:
        built = build_lab(directory, seed, on_event=on_event)
    if as_json:
        print_json(dataclasses.asdict(built))
    else:
        state = "is there already" if built.cached else "built"
        views.out.print(f"lab of seed {seed} {state}: {views.escape(built.path)}, {built.parameters:,} parameters")
