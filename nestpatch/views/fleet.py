"""How the update of several models is shown: what failed on stderr, and a table of all models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import err, escape, out

if TYPE_CHECKING:
    from nestpatch.patcher.fleet import UpdatedModel
    from nestpatch.patcher.update import Updated

_COLOURS = {"failed": "bold red", "available": "yellow", "updated": "bold green"}


def show_failures(results: Sequence[UpdatedModel]) -> None:
    """Shows on stderr what failed, each error once with all models that it concerns.

    Args:
        results: One for each model.
    """
    failures: dict[tuple[str, str, str, str], list[str]] = {}
    for result in results:
        failed = [(one.error, one.reason, one.advice, one.address) for one in result.channels if one.state == "failed"]
        if result.error:
            failed = [(result.error, result.reason, result.advice, "")]
        for failure in failed:
            failures.setdefault(failure, []).append(str(result.model))
    for (name, reason, advice, address), models in failures.items():
        err.print(f"[bold red]{escape(name)}[/]: {escape(reason)}")
        err.print(f"[bold]What to do[/]: {escape(advice)}")
        what = f"Nothing was applied from [bold]{escape(address)}[/] to" if address else "Not updated:"
        err.print(f"{what} {escape(', '.join(models))}.")


def show_fleet(results: Sequence[UpdatedModel]) -> None:
    """Shows a table with a row for each channel of each model.

    Args:
        results: One for each model.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("model", "channel", "before -> after", "outcome"):
        table.add_column(title, overflow="fold")
    table.add_column("seconds", justify="right")
    for result in results:
        # The model and its seconds stand in the first of its rows.
        sides = [(escape(result.model), f"{result.seconds:.2f}")]
        for cells in _rows(result):
            model, seconds = sides.pop() if sides else ("", "")
            table.add_row(model, *cells, seconds)
    out.print(table)


def _rows(result: UpdatedModel) -> Iterable[tuple[str, str, str]]:
    """Channel, versions, and outcome."""
    if result.error:
        return [("", "", _coloured("failed", result.error))]
    return [(escape(one.address), _versions(one), _outcome(one)) for one in result.channels]


def _versions(one: Updated) -> str:
    if one.state == "failed":
        return ""
    before, after = escape(one.before or "base"), escape(one.after or "base")
    return before if one.state == "current" else f"{before} -> {after}"


def _outcome(one: Updated) -> str:
    why = one.error or (one.reason and (one.reason if one.before == one.after else f"yanked: {one.reason}"))
    return _coloured(one.state, why)


def _coloured(state: str, why: str) -> str:
    word = escape(state)
    shown = f"[{_COLOURS[state]}]{word}[/]" if state in _COLOURS else word
    return f"{shown}, {escape(why)}" if why else shown
