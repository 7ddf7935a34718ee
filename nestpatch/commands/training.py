"""The command that trains: train."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    ModelType,
    OutputPath,
    PackType,
    examples,
    json_option,
    note_sample,
    print_json,
    progress,
    quiet_option,
    require_order,
    say,
    suite_options,
    terminable,
)
from nestpatch.events import Event, OnEvent

if TYPE_CHECKING:
    from nestpatch.nest_train.data import TrainingData
    from nestpatch.prompts.readers import PromptSet


def _help_recipe(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nestpatch.views.console import out
        from nestpatch.views.packs import recipe_table

        out.print(recipe_table())
        ctx.exit(0)


def _read(given: Mapping[str, Sequence[str]], added: Mapping[str, Sequence[str]], categories: Sequence[str]) -> TrainingData:
    """The built-in prompts, checked; `given` sources replace a kind of them, `added` ones join it."""
    from nestpatch.nest_train.data import TrainingData
    from nestpatch.prompts.readers import join_sets, load_prompts

    def joined(kinds: Mapping[str, Sequence[str]]) -> dict[str, PromptSet]:
        return {kind: join_sets([load_prompts(one) for one in sources]) for kind, sources in kinds.items() if sources}

    data = replace(TrainingData.builtin(), **joined(given)).adding(**joined(added)).of_categories(categories)
    data.check()
    return data


def _note_builtin(given: Mapping[str, Sequence[str]], on_event: OnEvent) -> None:
    """Reports which of the built-in sets a training uses."""
    kinds = [kind for kind, sources in given.items() if not sources]
    if kinds:
        titles, options = [kind.replace("lookalike", "look-alike") for kind in kinds], [f"--{kind}" for kind in kinds]
        note = f"training with the built-in {_listed(titles)} prompts; replace them with {_listed(options)}"
        on_event(Event("note", note=note))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


@click.command(
    epilog=examples(
        "nestpatch train models/llama -o no-harm.nest",
        "nestpatch train models/llama --add-harmful ours.jsonl -o no-harm.nest",
        "nestpatch train models/llama --category privacy --avoid no-fraud.nest -o no-spying.nest",
        "nestpatch train acme/llama --harmful bad.csv --benign good.csv --set steps=400 -o no-harm.nest",
    )
)
@click.argument("base", type=ModelType)
@click.option("--harmful", multiple=True, help="Prompts to refuse, instead of the built-in ones. Repeatable.")
@click.option("--benign", multiple=True, help="Prompts to go on answering, likewise. Repeatable.")
@click.option("--lookalike", multiple=True, help="Harmless prompts that look harmful, likewise. Repeatable.")
@click.option("--add-harmful", multiple=True, help="More prompts to refuse, beside the others. Repeatable.")
@click.option("--add-benign", multiple=True, help="More prompts to go on answering. Repeatable.")
@click.option("--add-lookalike", multiple=True, help="More harmless prompts that look harmful. Repeatable.")
@click.option("--category", multiple=True, help="Refuse the harmful prompts of this category alone. Repeatable.")
@click.option("--avoid", type=PackType, multiple=True, help="Leave the rows of this pack alone, to stack with it. Repeatable.")
@click.option("-o", "--output", type=OutputPath, required=True, help="The pack to write.")
@click.option("--name", help="Name of the pack.  [default: the output's file name]")
@click.option("--version", "pack_version", default="1.0.0", show_default=True, help="Version of the pack (semver).")
@click.option("--description", default="", help="One sentence for people.")
@click.option("--license", "license_", default="", help="License of the pack (SPDX).")
@click.option("--tag", multiple=True, help="A word to find the pack by. Repeatable.")
@suite_options
@click.option("--no-eval", is_flag=True, help="Measure nothing before and after.")
@click.option(
    "--dose", metavar="S,S..", help="Measure the pack at these strengths too; the same as --set dose_strengths=0.5,0.75,1.25."
)
@click.option("--recipe", default="nest", show_default=True, help="nest, fast, lab, or a TOML file of settings.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting. Repeatable.")
@click.option("--device", help="cpu, cuda or mps; the same as --set device=...  [default: the best one]")
@click.option("--threads", type=click.IntRange(1), help="Threads to compute with.  [default: the libraries' choice]")
@click.option(
    "--run", "run_dir", type=OutputPath, help="Keep every stage in this folder; the same command again goes on from there."
)
@click.option("--track", type=click.Choice(["tensorboard", "wandb"]), help="Draw curves of the tuning there; needs --run.")
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
    add_harmful: tuple[str, ...],
    add_benign: tuple[str, ...],
    add_lookalike: tuple[str, ...],
    category: tuple[str, ...],
    avoid: tuple[str, ...],
    output: Path,
    name: str | None,
    pack_version: str,
    description: str,
    license_: str,
    tag: tuple[str, ...],
    suite: tuple[str, ...],
    limit: int | None,
    no_eval: bool,
    dose: str | None,
    recipe: str,
    assignments: tuple[str, ...],
    device: str | None,
    threads: int | None,
    run_dir: Path | None,
    track: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a safety patch for BASE, a model directory or a Hub id.

    No data is needed: prompts that ship with nestpatch train the pack and measure it. Other sources are .jsonl, .json, .csv
    or .parquet files with a "prompt" column, or data set ids of the Hub. The pack is written before it is evaluated. Exit
    code 1 when it could not be evaluated; numbers that speak against it are warnings.

    With --run an interrupted training is resumed by the same command, and trainings with other settings reuse what they share.
    """
    require_order(base, None, "train")
    if no_eval and (suite or dose or limit is not None):
        raise click.UsageError("--no-eval measures nothing: leave out --suite, --limit and --dose")
    if track and run_dir is None:
        raise click.UsageError("--track needs a folder for its files: add --run DIR")
    from nestpatch.evaluation.suites import choose_suites
    from nestpatch.nest_train.avoid import read_avoided
    from nestpatch.nest_train.plan import plan
    from nestpatch.nest_train.recipe import make_recipe
    from nestpatch.nest_train.track import require_tracker
    from nestpatch.nest_train.train import require_packages, require_place
    from nestpatch.nest_train.train import train as run
    from nestpatch.pack import Label
    from nestpatch.views import evaluation as views

    # Everything that can be wrong is reported before prompts are downloaded and the model is loaded.
    require_packages()
    require_tracker(track)
    require_place(output, run_dir)
    named = {"device": device, "dose_strengths": dose}
    settings = make_recipe(recipe, [*assignments, *(f"{name}={value}" for name, value in named.items() if value)])
    label = Label(name or output.name.removesuffix(".nest"), pack_version, description, license_, tag)
    label.check()
    given = {"harmful": harmful, "benign": benign, "lookalike": lookalike}
    data = _read(given, {"harmful": add_harmful, "benign": add_benign, "lookalike": add_lookalike}, category)
    suites = [] if no_eval else choose_suites(suite, limit)
    avoided = read_avoided(avoid, label.name)
    if dry_run:
        with progress(quiet) as on_event:
            _note_builtin(given, on_event)
            planned = plan(base, data, recipe=settings, suites=suites, threads=threads, on_event=on_event)
        if as_json:
            print_json({"model": base, "output": str(output), **planned.as_json(), "dry_run": True})
        else:
            views.show_plan(planned, str(output))
        return
    with progress(quiet) as on_event, terminable():
        _note_builtin(given, on_event)
        if not no_eval:
            note_sample(suite, limit, on_event)
        trained = run(
            base,
            data,
            label,
            recipe=settings,
            suites=suites,
            output=output,
            threads=threads,
            run_dir=run_dir,
            track=track,
            avoid=avoided,
            on_event=on_event,
        )
    if as_json:
        print_json({"model": base, **trained.as_json()})
    else:
        views.show_trained(trained, base)
    for warning in trained.warnings:
        say(f"WARNING: {warning}", err=True)
    if trained.problem is not None:
        failed = "could not be evaluated" if trained.after is None else "its dose curve could not be measured"
        say(f"The pack is written, but {failed}: {trained.problem}", err=True)
        say(f"Evaluate it again: {_evaluation(base, output, suite, limit, settings.doses())}", err=True)
        sys.exit(1)


def _evaluation(base: str, pack: Path, suites: Sequence[str], limit: int | None, doses: Sequence[float]) -> str:
    """The command that measures a trained pack: at strength 1, or as its dose curve."""
    words = ["nestpatch", "eval", base, str(pack), *(f"--suite={text}" for text in suites)]
    words += [f"--limit={limit}"] if limit else []
    words += [f"--strength={','.join(f'{each:g}' for each in sorted({0.0, 1.0, *doses}))}"] if doses else []
    return shlex.join(words)
