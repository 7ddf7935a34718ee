"""How the results of the demos are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, fact_grid
from nestpatch.views.evaluation import HEADLINES, evaluation_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from nestpatch.demo.lab import FormatResult, LabDemo
    from nestpatch.demo.model import Answered, Digests, ModelDemo

_LONGEST = 200
"""Characters of an answer that are shown."""


def show_demo(result: LabDemo | ModelDemo, console: Console) -> None:
    """Shows the result of a demo: its stages, the numbers of both models, and what it alone has to show.

    Args:
        result: The result.
        console: Where to print: `out`, or `err` where stdout is for a JSON object.
    """
    from nestpatch.demo.lab import LabDemo

    parts = [_stages(result.stages), evaluation_table({"base": result.before, "patched": result.after})]
    if isinstance(result, LabDemo):
        parts += [_formats(result.formats)] if result.formats else []
    else:
        parts += [_answers(result.answers), _digests(result.digests)]
    for number, part in enumerate(parts):
        if number:
            console.print()
        console.print(part)


def _stages(stages: dict[str, tuple[float, str]]) -> Table:
    table = Table("stage", "seconds", "what happened", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for stage, (seconds, what) in stages.items():
        table.add_row(escape(stage), f"{seconds:.1f}", escape(what))
    table.add_row("[dim]all[/dim]", f"[dim]{sum(seconds for seconds, _ in stages.values()):.1f}[/dim]")
    return table


def _formats(formats: Sequence[FormatResult]) -> Table:
    table = Table("patched model as", *HEADLINES.values(), "retention", box=None, pad_edge=False, header_style="bold")
    for one in formats:
        totals = one.evaluation.totals()
        shares = (f"{totals[name].value:.1%}" if name in totals else "" for name in HEADLINES)
        table.add_row(escape(one.what), *shares, "" if one.retention is None else f"{one.retention:.1%}")
    return table


def _answers(answers: Sequence[Answered]) -> Table:
    """Base and patched model side by side, a question a row."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 1, 0))
    for title, ratio in (("question", 3), ("base answers", 4), ("patched answers", 4)):
        table.add_column(title, ratio=ratio, overflow="fold")
    for one in answers:
        table.add_row(escape(one.prompt), f"[dim]{_shortened(one.before)}[/dim]", _shortened(one.after))
    return table


def _shortened(answer: str) -> str:
    """An answer on one line, with dots where it was cut here or by its number of tokens."""
    text = " ".join(answer.split())
    cut = text[:_LONGEST]
    return escape(cut if cut == text and cut.endswith((".", "!", "?")) else f"{cut}...")


def _digests(digests: Digests) -> Table:
    grid = fact_grid()
    grid.add_row("sha256 before", escape(digests.before))
    grid.add_row("patched", escape(digests.patched))
    same = "[bold green]the file before, byte for byte[/]" if digests.restored else "[bold red]another file than before[/]"
    grid.add_row("reverted", f"{escape(digests.reverted)}  {same}")
    return grid
