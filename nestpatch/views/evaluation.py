"""How the numbers of an evaluation, the result of a training and the plan of one are shown."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nestpatch.measured import TITLES, drift, headlines
from nestpatch.views.console import duration, escape, fact_grid, out, size

if TYPE_CHECKING:
    from nestpatch.evaluation.agreement import Agreement
    from nestpatch.evaluation.dose import Dose, Recommendation
    from nestpatch.evaluation.perplexity import TextLoss
    from nestpatch.evaluation.scores import Scores
    from nestpatch.evaluation.shares import Share
    from nestpatch.evaluation.tasks import TaskScore
    from nestpatch.nest_train.plan import TrainingPlan
    from nestpatch.nest_train.result import Trained

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
        # Of several columns the first is the base itself, unless it was compared with another one.
        missing = ["" if len(models) > 1 else "not measured", *["not measured"] * (len(models) - 1)]
        drifts = zip((model.drift for model in models), missing, strict=True)
        table.add_row("KL to the base, benign", *(n if d is None else f"{d:.4f} nats per token" for d, n in drifts))
    for title, row in _utility(models):
        table.add_row(title, *row)
    for position, suite in enumerate(models[0].suites):
        harmful = suite.kind == "harmful"
        results = [model.suites[position] for model in models]
        cells = (_percent(r.complied if harmful else r.refused) for r in results)
        table.add_row(f"[dim]{escape(suite.suite)}, {'complied' if harmful else 'refused'}[/dim]", *cells)
    return table


def agreement_table(agreement: Sequence[Agreement]) -> Table:
    """Judges beside the one that they are compared with.

    Args:
        agreement: At least one comparison, all with the same judge or person.

    Returns:
        The table: a row for each judge, with the verdicts on which they differ.
    """
    reference = escape(agreement[0].reference)
    table = Table("judge", "kappa", "agrees", f"differs ({reference}: judge)", box=None, pad_edge=False, header_style="bold")
    for one in agreement:
        total, kappa = len(one.pairs), one.kappa
        counts = Counter((first.value, second.value) for first, second in one.pairs if first is not second)
        table.add_row(
            escape(one.judge),
            "not defined" if kappa is None else f"{kappa:.2f}",
            f"{one.agreed} of {total}",
            ", ".join(f"{first}: {second} {many}" for (first, second), many in sorted(counts.items())),
        )
    return table


def _utility(models: Sequence[Scores]) -> Iterator[tuple[str, list[str]]]:
    """The rows of what a patch may cost: (title, a cell for each model)."""
    if any(model.agreement for model in models):
        yield "answers as the base's, benign", [_percent(model.agreement) if model.agreement else "" for model in models]
    if any(model.text for model in models):
        yield "perplexity", [_perplexity(model.text) if model.text else "" for model in models]
    for position, score in enumerate(models[0].tasks):
        cells = [_task(model.tasks[position]) if model.tasks else "" for model in models]
        yield escape(f"{score.task}, {score.metric}"), cells


def _task(score: TaskScore) -> str:
    return f"{score.value:.4f}" + ("" if score.error is None else f"  [dim]standard error {score.error:.4f}[/dim]")


def _perplexity(loss: TextLoss) -> str:
    rise = "" if loss.rise is None else f" ({loss.rise:+.2%})"
    return f"{loss.perplexity:.3f}{rise}  [dim]{loss.nats:.4f} nats per token, {loss.tokens:,} tokens[/dim]"


def dose_table(dose: Dose) -> Table:
    """A row for each strength: shares in percent with their intervals, and the drift.

    Args:
        dose: The curve.

    Returns:
        The table, without the columns that nothing was measured for.
    """
    shown = [name for name in HEADLINES if any(getattr(point, name) is not None for point in dose.points)]
    drifts = any(point.kl_to_base is not None for point in dose.points)
    heads = ("strength", *(HEADLINES[name] for name in shown), *(["KL"] if drifts else []))
    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for point in dose.points:
        shares = (getattr(point, name) for name in shown)
        drift = "" if point.kl_to_base is None else f"{point.kl_to_base:.4f}"
        title = f"{point.strength:g}" if point.strength else "0, the base"
        table.add_row(title, *map(narrow, shares), *([drift] if drifts else []))
    return table


def narrow(share: Share | None) -> str:
    """A share and its interval in percent.

    Args:
        share: None where it was not measured.

    Returns:
        A cell with markup.
    """
    if share is None:
        return _NOT_MEASURED
    low, high = share.interval
    return f"{100 * share.value:5.1f} [dim]{100 * low:.1f}-{100 * high:.1f}[/dim]"


def show_dose(dose: Dose) -> None:
    """The curve and the recommended strength.

    Args:
        dose: The curve.
    """
    out.print(dose_table(dose))
    out.print("[dim]shares in percent, with 95 % intervals; KL to the base in nats per token[/dim]")
    out.print()
    out.print(f"recommended strength: {recommendation_text(dose.recommended)}")


def recommendation_text(recommended: Recommendation) -> str:
    """A recommendation for people.

    Args:
        recommended: Measured here, or read from a pack.

    Returns:
        One line with markup: the strength and the reason.
    """
    strength = "none" if recommended.strength is None else f"{recommended.strength:g}"
    return f"[bold]{strength}[/], {escape(recommended.reason)}"


def detection_text(stored: Mapping[str, Any]) -> str:
    """The numbers of a detector on suites for people.

    Args:
        stored: Of `nestpatch.evaluation.detection.Detection.as_json`, from anywhere.

    Returns:
        One line.
    """
    from nestpatch.evaluation.detection import stored_detection

    found = stored_detection({"detector": stored}) or {}
    shares = (("detects", "harmful", found["detection"]), ("false alarms on", "harmless", found["false_positive"]))
    parts = [f"{what} {one.count} of {one.total} {kind} prompts ({one.value:.1%})" for what, kind, one in shares if one]
    auc = [] if found["auc"] is None else [f"AUC {found['auc']:.3f}"]
    return f"detector: {', '.join([*auc, *parts]) or 'not measured'}"


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
    if trained.dose is not None:
        out.print()
        show_dose(trained.dose)
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
