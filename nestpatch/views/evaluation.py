"""How the numbers of an evaluation, the result of a training and the plan of one are shown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, out, percent, size

if TYPE_CHECKING:
    from nestpatch.evaluation.suites import Scores
    from nestpatch.lab.demo import FormatResult
    from nestpatch.nest_train.plan import TrainingPlan
    from nestpatch.nest_train.train import Trained

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
        table.add_row(escape(one.what), *shares, "" if one.retention is None else f"{one.retention:.1%}")
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
