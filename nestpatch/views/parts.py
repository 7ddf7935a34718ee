"""How the parts of an evaluation are shown: attack success by category, and a model without some of its neurons."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, out
from nestpatch.views.evaluation import HEADLINES, narrow

if TYPE_CHECKING:
    from nestpatch.evaluation.result import Ablation, Evaluation
    from nestpatch.evaluation.scores import Scores


def show_categories(result: Evaluation) -> None:
    """Attack success by category, a row for each, of every model that was measured.

    Args:
        result: What was measured.
    """
    columns = [(_title(result, place, strength), scores.categories()) for place, (strength, scores) in enumerate(result.sides)]
    out.print()
    if not columns[0][1]:
        out.print("[dim]no category is known of the harmful prompts: give them a column category[/dim]")
        return
    table = Table("attack success", *(title for title, _ in columns), "prompts", box=None, pad_edge=False, header_style="bold")
    for name, share in columns[0][1].items():
        table.add_row(escape(name), *(narrow(shares.get(name)) for _, shares in columns), str(share.total))
    out.print(table)
    out.print("[dim]in percent, with 95 % intervals[/dim]")


def _title(result: Evaluation, place: int, strength: float | None) -> str:
    if not place:
        return "model"
    return f"at {strength:g}" if result.curve and strength is not None else "patched"


def show_ablation(result: Evaluation, ablation: Ablation) -> None:
    """What is left of a model's safety without some of its neurons.

    Args:
        result: What was measured.
        ablation: Its ablation.
    """
    count = f"{ablation.neurons:,}"
    sides = [("model", result.model), ("patched", result.patched)]
    sides += [(f"without {count} chosen neurons", ablation.chosen), (f"without {count} random ones", ablation.random)]
    measured = [(title, scores) for title, scores in sides if scores is not None]
    shown = [name for name in HEADLINES if any(name in scores.totals() for _, scores in measured)]
    table = Table("", *(HEADLINES[name] for name in shown), "KL", box=None, pad_edge=False, header_style="bold")
    for title, scores in measured:
        table.add_row(title, *_cells(scores, shown))
    out.print()
    out.print(table)
    out.print("[dim]shares in percent, with 95 % intervals; KL to the model without a pack in nats per token[/dim]")
    if ablation.left is not None and ablation.random_left is not None:
        left, random = ablation.left, ablation.random_left
        out.print(
            f"of {left.total} harmful prompts that it refuses, it still refuses {left.count} without the chosen neurons "
            f"([bold]{left.value:.1%}[/]), and {random.count} without random ones ({random.value:.1%})"
        )
    out.print(f"[dim]{escape(ablation.how)}; {ablation.total:,} neurons in all[/dim]")


def _cells(scores: Scores, shown: list[str]) -> Iterator[str]:
    totals = scores.totals()
    yield from (narrow(totals.get(name)) for name in shown)
    yield "" if scores.drift is None else f"{scores.drift:.4f}"
