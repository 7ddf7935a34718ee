"""The command line. Parses, calls one library function, prints.

Results go to stdout, everything said to a person on the way to stderr. Exit codes: 0 ok, 1 a finding or a failure, 2 usage.
Heavy imports live inside the commands, so that --help is instant.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import click

from nestpatch import __version__
from nestpatch.errors import DataError, MissingExtraError, NestpatchError
from nestpatch.events import OnEvent, ignore

F = TypeVar("F", bound=Callable[..., Any])
PathType = click.Path(path_type=Path)


class Group(click.Group):
    """Turns every NestpatchError into its message, its advice and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except NestpatchError as error:
            from nestpatch.views import show_error

            show_error(error, error.advice)
            ctx.exit(2 if isinstance(error, DataError) else 1)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("nestpatch"):
                raise
            from nestpatch.views import show_error

            missing = MissingExtraError("train", f"`nestpatch {ctx.invoked_subcommand}` (module {error.name})")
            show_error(missing, missing.advice)
            ctx.exit(1)


def json_option(command: F) -> F:
    """--json, on every command that answers something."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def quiet_option(command: F) -> F:
    """--quiet, on every command that takes time."""
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(command)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, default=str, ensure_ascii=False))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nestpatch")
def main() -> None:
    """Safety patches for language models: train, ship, apply, prove, undo."""
    # transformers' own bars would mix with ours; a variable that the user set wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _help_recipe(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from nestpatch.views import out, recipe_table

        out.print(recipe_table())
        ctx.exit(0)


@main.command()
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
    from nestpatch import views
    from nestpatch.errors import OutputError
    from nestpatch.formats import nest
    from nestpatch.nest_train.data import join_sets, load_prompts
    from nestpatch.nest_train.evaluate import load_suite
    from nestpatch.nest_train.packing import Label
    from nestpatch.nest_train.recipe import make_recipe
    from nestpatch.nest_train.train import TrainingData
    from nestpatch.nest_train.train import train as run

    # Before minutes of work: will there be a place for the result?
    if os.path.lexists(output) or not output.absolute().parent.is_dir():
        raise OutputError(f"{output} exists already, or its directory does not")
    recipe = make_recipe(recipe_file, assignments)
    sets = [[load_prompts(source) for source in sources] for sources in (harmful, benign, lookalike)]
    data = TrainingData(join_sets(sets[0]), join_sets(sets[1]), join_sets(sets[2]) if sets[2] else None)
    label = Label(name or output.name.removesuffix(".nest"), pack_version, description, license_, tag)
    label.check()
    with views.progress(quiet) as on_event:
        trained = run(base, data, label, recipe=recipe, suites=[load_suite(s) for s in suite], on_event=on_event)
    pack_id = nest.write(trained.pack, output)
    nbytes = output.stat().st_size
    if as_json:
        facts = {"pack": str(output), "pack_id": pack_id, "bytes": nbytes, "trained_parameters": trained.trained_parameters}
        numbers = {"before": trained.before, "after": trained.after}
        _print_json(facts | {what: value.as_json() for what, value in numbers.items() if value is not None})
        return
    views.show_pack(trained.pack, pack_id, nbytes)


@main.command()
@click.argument("model", type=PathType)
@click.argument("patch", type=PathType)
@click.option("-o", "--output", type=PathType, help="Where to write.  [default: beside the model, named after the patch]")
@click.option("--in-place", is_flag=True, help="Change the model's own files, crash-safe and revertible.")
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the patch, over 0 and up to 1.5.")
@click.option("--hard-link", is_flag=True, help="Copy: let untouched shards share their files with the base.")
@click.option("--allow-overlap", is_flag=True, help="Add up with another pack that changes the same rows.")
@click.option("--allow-downgrade", is_flag=True, help="Replace a newer version.")
@click.option("--allow-base-mismatch", is_flag=True, help="Patch a model that is not the pack's base. Recorded in the ledger.")
@click.option("--detach", is_flag=True, help="In place: replace links by files of the model's own first.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@quiet_option
@json_option
def apply(
    model: Path,
    patch: Path,
    output: Path | None,
    in_place: bool,
    strength: float,
    hard_link: bool,
    allow_overlap: bool,
    allow_downgrade: bool,
    allow_base_mismatch: bool,
    detach: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Merge PATCH into MODEL, a safetensors file or a model directory: into a copy, or --in-place.

    The model is checked first: a patch only fits the base that it was made for.
    """
    if in_place and output is not None:
        raise click.UsageError("--in-place changes the model itself; leave -o out")
    if not in_place and detach:
        raise click.UsageError("--detach goes with --in-place")
    if in_place and hard_link:
        raise click.UsageError("--hard-link goes with a copy, not with --in-place")
    flags = {"allow_overlap": allow_overlap, "allow_downgrade": allow_downgrade, "allow_base_mismatch": allow_base_mismatch}
    if allow_base_mismatch:
        click.echo("WARNING: --allow-base-mismatch: the result is not what the pack's evaluation measured", err=True)
    with _progress(quiet or as_json) as on_event:
        if in_place:
            from nestpatch.patcher.inplace import apply_in_place

            common = {"strength": strength, "dry_run": dry_run, "on_event": on_event}
            done: Any = apply_in_place(model, patch, detach=detach, **common, **flags)  # type: ignore[arg-type]
        else:
            from nestpatch.patcher.apply import apply as run

            common = {"strength": strength, "dry_run": dry_run, "on_event": on_event}
            done = run(model, patch, output, hard_link=hard_link, **common, **flags)  # type: ignore[arg-type]
    _report(done, "show_changed" if in_place else "show_applied", as_json)


def _progress(quiet: bool) -> AbstractContextManager[OnEvent]:
    """Progress on stderr; without it, without the cost of loading what draws."""
    if quiet:
        from contextlib import nullcontext

        return nullcontext(ignore)
    from nestpatch import views

    return views.progress(quiet=False)


def _report(result: Any, view: str, as_json: bool) -> None:
    """A result value as JSON, or drawn by the view of that name."""
    if as_json:
        _print_json(dataclasses.asdict(result))
        return
    from nestpatch import views

    getattr(views, view)(result)


@main.command()
@click.argument("model", type=PathType)
@click.option("--to", default="base", show_default=True, metavar="base|VERSION", help="What to go back to.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@quiet_option
@json_option
def revert(model: Path, to: str, dry_run: bool, quiet: bool, as_json: bool) -> None:
    """Undo what was applied to MODEL in place, bit for bit."""
    from nestpatch.patcher.inplace import revert as run

    with _progress(quiet or as_json) as on_event:
        done = run(model, to, dry_run=dry_run, on_event=on_event)
    _report(done, "show_changed", as_json)


@main.command()
@click.argument("model", type=PathType)
@json_option
def recover(model: Path, as_json: bool) -> None:
    """End an interrupted change of MODEL: roll it back, or finish it. Every other command does this too."""
    from nestpatch.patcher.transaction import recover_model

    done = recover_model(model)
    if as_json:
        _print_json(dataclasses.asdict(done))
    else:
        click.echo(f"{model}: {'nothing to recover' if done.action == 'none' else done.action}")


@main.command()
@click.argument("model", type=PathType)
@json_option
def status(model: Path, as_json: bool) -> None:
    """Tell what is applied to MODEL, since when and by what."""
    from nestpatch.patcher.ledger import read_ledger
    from nestpatch.patcher.transaction import open_model

    checkpoint, place = open_model(model)
    ledger = read_ledger(place.ledger)
    if as_json:
        _print_json({"model": str(checkpoint.path), **ledger.as_json()})
        return
    from nestpatch import views

    views.show_status(checkpoint.path, ledger)


@main.command()
@click.argument("model", type=PathType)
@click.argument("patch", type=PathType, required=False)
@click.option("--full", is_flag=True, help="Also hash the whole tensors, not the patched rows alone.")
@json_option
def verify(model: Path, patch: Path | None, full: bool, as_json: bool) -> None:
    """Tell which state MODEL is in: base, patched, half patched or altered. Exit code 0 for base and patched, 1 otherwise."""
    from nestpatch.patcher.verify import verify as run

    result = run(model, patch, full=full)
    if as_json:
        _print_json(dataclasses.asdict(result) | {"verdict": result.verdict.value, "known": result.known})
    else:
        from nestpatch import views

        views.show_verification(model, result)
    sys.exit(0 if result.known else 1)


@main.command()
@click.argument("a", type=PathType)
@click.argument("b", type=PathType)
@click.option("-o", "--output", type=PathType, help="Extract the pack that makes B of A, and write it here.")
@click.option("--name", help="Of the extracted pack.  [default: the output's file name]")
@click.option("--version", "pack_version", help="Of the extracted pack (semver).  [default: 1.0.0]")
@click.option("--description", help="One sentence for people.")
@click.option("--license", "license_", help="License of the extracted pack (SPDX).")
@quiet_option
@json_option
def diff(
    a: Path,
    b: Path,
    output: Path | None,
    name: str | None,
    pack_version: str | None,
    description: str | None,
    license_: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compare two models, tensor by tensor and row by row, or two packs.

    Exit code 0: identical, 1: different, as diff has it; a failure also ends with 1, and says so on stderr. With -o it is 0 once
    the pack is written. Of models only the weights are compared.
    """
    facts = {"version": pack_version, "description": description, "license": license_}
    given = {what: value for what, value in facts.items() if value is not None}
    with _progress(quiet or as_json) as on_event:
        if output is not None:
            from nestpatch.patcher.extract import PackLabel, extract_to

            label = PackLabel(name or output.name.removesuffix(".nest"), **given)
            found: Any = extract_to(a, b, output, label, on_event=on_event)
        elif name is not None or given:
            raise click.UsageError("--name, --version, --description and --license go with -o")
        else:
            from nestpatch.patcher.diff import diff as run

            found = run(a, b, on_event=on_event)
    if as_json:
        _print_json(found.as_json())
    else:
        from nestpatch import views

        views.show_diff(found)
    sys.exit(0 if output is not None or found.identical else 1)


@main.command()
@click.argument("patch", type=PathType)
@json_option
def show(patch: Path, as_json: bool) -> None:
    """Explain PATCH: what it changes, what it is for, how it was trained and measured."""
    from nestpatch import views
    from nestpatch.formats import nest

    pack = nest.read(patch)
    if as_json:
        _print_json({"id": nest.pack_id(pack), "manifest": nest.manifest_json(pack.manifest)})
    else:
        views.show_pack(pack, nest.pack_id(pack), patch.stat().st_size)


@main.command("eval")
@click.argument("model")
@click.argument("patch", type=PathType, required=False)
@click.option("--suite", multiple=True, required=True, help="[KIND=]SOURCE; kinds: harmful, benign, lookalike. Repeatable.")
@click.option("--base", help="The unpatched model: measures how far MODEL has moved from it.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or mps.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of an answer.")
@click.option("--answers", type=PathType, help="Write every answer and verdict to this JSONL file.")
@quiet_option
@json_option
def evaluate(
    model: str,
    patch: Path | None,
    suite: tuple[str, ...],
    base: str | None,
    device: str,
    max_new_tokens: int,
    answers: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measure attack success and over-refusal of MODEL, alone or also with PATCH merged in memory.

    A suite's kind is told by its file name (harmful*, jailbreak*, benign*, lookalike*) or said: harmful=FILE.
    """
    from nestpatch import views
    from nestpatch.nest_train.assess import assess, write_answers
    from nestpatch.nest_train.evaluate import load_suite

    suites = [load_suite(text) for text in suite]
    options = {"patch": patch, "base": base, "device": device, "max_new_tokens": max_new_tokens}
    with views.progress(quiet) as on_event:
        result = assess(model, suites, on_event=on_event, **options)  # type: ignore[arg-type]
    if answers is not None:
        write_answers(result, answers)
    columns = {"model": result.model} | ({"patched": result.patched} if result.patched else {})
    if as_json:
        _print_json({name: evaluation.as_json() for name, evaluation in columns.items()})
    else:
        views.out.print(views.evaluation_table(columns))


@main.command()
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the lab world and of the training.")
@click.option("--keep", type=PathType, help="Leave base/, patched/, patch.nest and prompts/ in this new directory.")
@quiet_option
@json_option
def demo(seed: int, keep: Path | None, quiet: bool, as_json: bool) -> None:
    """Show the whole way on a small model made here: train, apply, evaluate. Takes a few minutes on a CPU."""
    from nestpatch import views
    from nestpatch.demo import run_demo

    with views.progress(quiet) as on_event:
        result = run_demo(seed, keep, on_event)
    # The table is for people; with --json only the object goes to stdout.
    console = views.err if as_json else views.out
    console.print(views.stage_table(result.stages))
    console.print()
    console.print(views.evaluation_table({"base": result.before, "patched": result.after}))
    if not result.helped:
        views.err.print("[bold red]The patch did not help:[/] attacks succeed about as often as before.")
    if as_json:
        _print_json(result.as_json())
    sys.exit(0 if result.helped else 1)


@main.group()
def lab() -> None:
    """The small world that the demo and the tests use."""


@lab.command()
@click.argument("directory", type=PathType)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the world and of the training.")
@quiet_option
@json_option
def build(directory: Path, seed: int, quiet: bool, as_json: bool) -> None:
    """Make a small half-aligned chat model and its prompt sets in DIRECTORY, about two minutes on two CPU cores."""
    from nestpatch import views
    from nestpatch.lab.build import build_lab

    with views.progress(quiet) as on_event:
        built = build_lab(directory, seed, on_event=on_event)
    if as_json:
        _print_json(dataclasses.asdict(built))
    else:
        state = "is there already" if built.cached else "built"
        views.out.print(f"lab of seed {seed} {state}: {built.path}, {built.parameters:,} parameters")
