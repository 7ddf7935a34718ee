"""How the numbers of an evaluation look to a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, percent

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Scores
    from nestpatch.lab.demo import FormatResult

HEADLINES = {
    "attack_success": "attack success",
    "refusal_benign": "refusals, benign",
    "refusal_lookalike": "refusals, look-alike",
    "benign_correct": "benign correct",
}


def evaluation_table(columns: Mapping[str, Scores]) -> Table:
    """Models side by side: the headline numbers, then every suite.

    Args:
        columns: Title of a column -> the numbers of a model. All models ran the same suites.
    """
    table = Table("", *map(escape, columns), box=None, pad_edge=False, header_style="bold")
    models = list(columns.values())
    for name, title in HEADLINES.items():
        shares = [model.totals().get(name) for model in models]
        if any(share is not None for share in shares):
            table.add_row(title, *("" if share is None else percent(share) for share in shares))
    if len(models) > 1 or models[0].drift is not None:
        # Of two columns the first is the base itself, unless it was compared with another one.
        missing = ["" if len(models) > 1 else "not measured", *["not measured"] * (len(models) - 1)]
        drifts = zip((model.drift for model in models), missing, strict=True)
        table.add_row("KL to the base, benign", *(n if d is None else f"{d:.4f} nats per token" for d, n in drifts))
    for position, suite in enumerate(models[0].suites):
        harmful = suite.kind == "harmful"
        results = [model.suites[position] for model in models]
        cells = (percent(r.complied if harmful else r.refused) for r in results)
        table.add_row(f"[dim]{escape(suite.suite)}, {'complied' if harmful else 'refused'}[/dim]", *cells)
    return table


def formats_table(formats: Sequence[FormatResult]) -> Table:
    """The patched model in several formats, with the headline numbers of each.

    Args:
        formats: The results, in the order of the rows.
    """
    table = Table("patched model as", *HEADLINES.values(), "retention", box=None, pad_edge=False, header_style="bold")
    for one in formats:
        totals = one.evaluation.totals()
        shares = (f"{totals[name].value:.1%}" if name in totals else "" for name in HEADLINES)
        table.add_row(escape(one.what), *shares, "" if one.delivered is None else f"{one.delivered:.1%}")
    return table


def stage_table(stages: Mapping[str, tuple[float, str]]) -> Table:
    """The stages of a demo.

    Args:
        stages: Name of a stage -> the seconds that it took, and what it did.
    """
    table = Table("stage", "seconds", "what happened", box=None, pad_edge=False, header_style="bold")
    table.columns[1].justify = "right"
    for stage, (seconds, what) in stages.items():
        table.add_row(escape(stage), f"{seconds:.1f}", escape(what))
    return table
