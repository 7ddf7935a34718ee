"""How the numbers of an evaluation, the result of a training and the plan of one are shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.measured import TITLES, drift, headlines
from nestpatch.views.console import duration, escape, fact_grid, out, size

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Scores, Share
    from nestpatch.nest_train.plan import TrainingPlan
    from nestpatch.nest_train.train import Trained

HEADLINES = TITLES
_NOT_MEASURED = "[dim]not measured[/dim]"


def _percent(share: Share) -> str:
    """A share with its interval and its counts."""
    low, high = share.interval
    return f"{share.value:6.1%}  [dim]{low:.1%} to {high:.1%}, {share.count} of {share.total}[/dim]"


def evaluation_table(columns: Mapping[str, Scores]) -> Table:
    """Models side by side: the headline numbers, then every suite.

    Args:
        columns: Title of a column -> the numbers of a model. All models ran the same suites.

    Returns:
        The table.
    """
    table = Table("", *map(escape, columns), box=None, pad_edge=False, header_style="bold")
    models = list(columns.values())
    for name, title in HEADLINES.items():
        shares = [model.totals().get(name) for model in models]
        if any(share is not None for share in shares):
            table.add_row(title, *("" if share is None else _percent(share) for share in shares))
    if len(models) > 1 or models[0].drift is not None:
        # Of two columns the first is the base itself, unless it was compared with another one.
        missing = ["" if len(models) > 1 else "not measured", *["not measured"] * (len(models) - 1)]
        drifts = zip((model.drift for model in models), missing, strict=True)
        table.add_row("KL to the base, benign", *(n if d is None else f"{d:.4f} nats per token" for d, n in drifts))
    for position, suite in enumerate(models[0].suites):
        harmful = suite.kind == "harmful"
        results = [model.suites[position] for model in models]
        cells = (_percent(r.complied if harmful else r.refused) for r in results)
        table.add_row(f"[dim]{escape(suite.suite)}, {'complied' if harmful else 'refused'}[/dim]", *cells)
    return table


def headline_table(title: str, before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Table:
    """The headline numbers before and after a patch, as packs store them.

    Args:
        title: Of the column of names.
        before: Name -> {"value", "count", "total"}, of the base.
        after: The same of the patched model, with "kl_to_base"; None where it was not evaluated.

    Returns:
        The table; "not measured" stands for every number that is missing or malformed.
    """
    table = Table(title, "before", "after", box=None, pad_edge=False, header_style="dim")
    for row in headlines(before, after):
        shares = (row.before, row.after)
        cells = (f"{one.value:6.1%}  [dim]{one.count} of {one.total}[/dim]" if one else _NOT_MEASURED for one in shares)
        table.add_row(row.title, *cells)
    moved = drift(after)
    table.add_row("KL to the base, benign", "", _NOT_MEASURED if moved is None else f"{moved:.4f} nats per token")
    return table


def show_trained(trained: Trained, base: str) -> None:
    """One screen: where the pack is, what changed in numbers, and the next command.

    Args:
        trained: The result.
        base: The base as the user named it, for the next command.
    """
    pack = trained.pack
    share = trained.trained_parameters / trained.model_parameters
    rows = sum(delta.neurons for delta in pack)
    where = "" if trained.output is None else f"  {escape(trained.output)}, {size(trained.nbytes)}"
    out.print(f"[bold]{escape(pack.label)}[/]{where}")
    out.print(
        f"[dim]changes {rows:,} rows of {len(pack.deltas)} tensors; "
        f"{trained.trained_parameters:,} values trained, {share:.2%} of the model's[/]"
    )
    if trained.before is not None:
        out.print()
        out.print(headline_table("", trained.before.as_json(), trained.after.as_json() if trained.after is not None else None))
    if trained.output is not None:
        out.print()
        file = shlex.quote(str(trained.output))
        out.print(f"next: [bold]nestpatch apply {escape(shlex.quote(base))} {escape(file)} -o PATCHED[/]")


def show_plan(plan: TrainingPlan, output: str) -> None:
    """What a training would do, and how long it would take.

    Args:
        plan: The plan.
        output: The file that would be written.
    """
    grid = fact_grid()
    grid.add_row("base", f"{escape(plan.model)} ({escape(plan.architecture)}), {plan.model_parameters:,} parameters")
    grid.add_row("runs on", f"{escape(plan.device)} in {escape(plan.dtype)}")
    grid.add_row("layers", f"{plan.layers} feed-forward blocks with {plan.neurons:,} neurons; the probe chooses among them")
    share = plan.trained_parameters / plan.model_parameters
    grid.add_row("trained", f"about {plan.trained_parameters:,} values ({share:.2%}) in {plan.steps} steps at most")
    grid.add_row("prompts", ", ".join(f"{many} {escape(kind)}" for kind, many in plan.prompts.items()))
    grid.add_row("evaluated", f"{plan.suite_prompts} prompts, before and after" if plan.suite_prompts else _NOT_MEASURED)
    for suite, many in plan.seen_in_training.items():
        grid.add_row("warning", f"{many} prompts of suite {escape(suite)} are also training prompts")
    total = sum(plan.seconds.values())
    # Only the stages that take a noticeable part of it.
    parts = ", ".join(f"{escape(name)} {duration(value)}" for name, value in plan.seconds.items() if value >= 0.02 * total)
    grid.add_row("time", f"about {duration(total)}: {parts}")
    out.print(f"would write [bold]{escape(output)}[/]")
    out.print(grid)
