"""How the result of a training looks to a person, and the plan of one."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, out, size
from nestpatch.views.evaluation import HEADLINES

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Scores
    from nestpatch.nest_train.plan import TrainingPlan
    from nestpatch.nest_train.train import Trained

_NOT_MEASURED = "[dim]not measured[/dim]"


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
        out.print(_numbers(trained.before, trained.after))
    if trained.output is not None:
        out.print()
        file = shlex.quote(str(trained.output))
        out.print(f"next: [bold]nestpatch apply {escape(shlex.quote(base))} {escape(file)} -o PATCHED[/]")


def _numbers(before: Scores, after: Scores | None) -> Table:
    """The headline numbers before and after, or "not measured"."""
    table = Table("", "before", "after", box=None, pad_edge=False, header_style="dim")
    sides = [scores.totals() if scores is not None else {} for scores in (before, after)]
    for name, title in HEADLINES.items():
        shares = [side.get(name) for side in sides]
        cells = (_NOT_MEASURED if s is None else f"{s.value:6.1%}  [dim]{s.count} of {s.total}[/dim]" for s in shares)
        table.add_row(title, *cells)
    drift = None if after is None else after.drift
    moved = _NOT_MEASURED if drift is None else f"{drift:.4f} nats per token"
    table.add_row("KL to the base, benign", "", moved)
    return table


def show_plan(plan: TrainingPlan, output: str) -> None:
    """What a training would do, and how long it would take.

    Args:
        plan: The plan.
        output: The file that would be written.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_row("base", f"{escape(plan.model)} ({escape(plan.architecture)}), {plan.model_parameters:,} parameters")
    grid.add_row("runs on", f"{escape(plan.device)} in {escape(plan.dtype)}")
    grid.add_row("layers", f"{plan.layers} feed-forward blocks with {plan.neurons:,} neurons; the probe chooses among them")
    share = plan.trained_parameters / plan.model_parameters
    grid.add_row("trained", f"about {plan.trained_parameters:,} values ({share:.2%}) in {plan.steps} steps at most")
    grid.add_row("prompts", ", ".join(f"{count} {escape(kind)}" for kind, count in plan.prompts.items()))
    grid.add_row("evaluated", f"{plan.suite_prompts} prompts, before and after" if plan.suite_prompts else _NOT_MEASURED)
    for suite, count in plan.seen_in_training.items():
        grid.add_row("warning", f"{count} prompts of suite {escape(suite)} are also training prompts")
    grid.add_row("time", _durations(plan.seconds))
    out.print(f"would write [bold]{escape(output)}[/]")
    out.print(grid)


def _durations(seconds: Mapping[str, float]) -> str:
    """The total first, then the stages that take a noticeable part of it."""

    def text(value: float) -> str:
        if value < 90:
            return f"{value:.0f} s"
        return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"

    total = sum(seconds.values())
    parts = ", ".join(f"{escape(stage)} {text(value)}" for stage, value in seconds.items() if value >= 0.02 * total)
    return f"about {text(total)}: {parts}"
