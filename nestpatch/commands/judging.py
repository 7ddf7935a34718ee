"""The command that compares judges with a person, judge; and the options of every command that judges answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nestpatch.commands.options import (
    ModelType,
    PathType,
    device_option,
    examples,
    json_option,
    print_json,
    progress,
    quiet_option,
    say,
)

if TYPE_CHECKING:
    from nestpatch.evaluation.agreement import Agreement

F = TypeVar("F", bound=Callable[..., Any])


class _Judge(click.types.StringParamType):
    """The name of a judge. A model is a path that exists, or a Hub id."""

    name = "judge"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the text. Raises MissingInputError for a path of a model that does not exist."""
        from nestpatch.evaluation.judges.opening import MODEL_JUDGES

        kind, _, model = value.partition("=")
        if kind in MODEL_JUDGES and model:
            ModelType.convert(model, param, ctx)
        return value


def judge_options(command: F) -> F:
    """--judge and --judge-label, for every command that judges answers."""
    text = "What a label of a classifier means: LABEL=refused, complied or incoherent. Repeatable."
    command = click.option("--judge-label", "judge_labels", multiple=True, metavar="LABEL=VERDICT", help=text)(command)
    text = "keywords, keywords-strict, keywords-broad, KIND=MODEL (guard= ...), or endpoint=URL#MODEL. The first decides."
    option = click.option("--judge", "judges", multiple=True, default=["keywords"], show_default=True, type=_Judge(), help=text)
    return option(command)


def say_agreement(agreement: Sequence[Agreement]) -> None:
    """Prints how far judges agree."""
    from nestpatch.views.console import out
    from nestpatch.views.evaluation import agreement_table

    if agreement:
        out.print()
        out.print(agreement_table(agreement))


@click.command(
    "judge",
    epilog=examples(
        "nestpatch judge sheet.csv",
        "nestpatch judge sheet.csv --judge keywords --judge guard=meta-llama/Llama-Guard-3-1B",
    ),
)
@click.argument("sheet", type=PathType)
@judge_options
@device_option("Of judges that are models")
@quiet_option
@json_option
def judge(sheet: Path, judges: tuple[str, ...], judge_labels: tuple[str, ...], device: str, quiet: bool, as_json: bool) -> None:
    """Compare judges with a person who filled in SHEET, a CSV file of `nestpatch eval --label`.

    The column verdict of SHEET says refused, complied or incoherent; answers without a verdict are left out.
    """
    from nestpatch.evaluation.judges.opening import open_judges, parse_judge_labels, require_judges
    from nestpatch.evaluation.labelling import compare_with_person, read_sheet

    labels = parse_judge_labels(judge_labels)
    require_judges(judges, labels)
    labelled, empty = read_sheet(sheet)
    with progress(quiet) as on_event, ExitStack() as stack:
        opened = open_judges(judges, labels=labels, device=device, stack=stack)
        found = compare_with_person(labelled, opened, on_event)
    if empty:
        say(f"{empty} of {empty + len(labelled)} answers have no verdict and were left out", err=True)
    if as_json:
        print_json({"sheet": str(sheet), "judged": len(labelled), "agreement": [one.as_json() for one in found]})
    else:
        say_agreement(found)
