"""The tables of `bench.adaptive`."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeAlias

from nestpatch.evaluation.shares import Share

Row: TypeAlias = dict[str, Any]


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line for each attack, a column for each system.

    Args:
        rows: Of `bench.adaptive`.

    Returns:
        Attack success in per cent with its 95 % interval, mean over the seeds, and where it was measured the loss of the base's
        answers to harmless prompts.
    """
    cells: dict[tuple[str, str, int | None], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row["attack"], row["variant"], row["step"]][row["system"]].append(row)
    lines = []
    for (attack, variant, step), found in cells.items():
        name = ": ".join(filter(None, (attack, variant))) + ("" if step is None else f", {step} steps")
        lines.append((name, {system: _cell(some) for system, some in found.items()}))
    return _markdown("attack success, %", lines)


def half_table(rows: Sequence[Row]) -> str:
    """A Markdown table: after how many steps of training half of what a system gained over the base is lost.

    Args:
        rows: Of `bench.adaptive`.

    Returns:
        The steps for each seed; empty where nothing was trained.
    """
    cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    last = max((row["step"] or 0 for row in rows), default=0)
    for row in rows:
        if row["step"] == 0 and row["system"] != "base":
            lost = f"over {last}" if row["half_lost"] is None else str(row["half_lost"])
            cells[f"{row['attack']}: {row['variant']}"][row["system"]].append(lost if row["gained"] > 0 else "nothing gained")
    lines = [(name, {system: ", ".join(some) for system, some in found.items()}) for name, found in cells.items()]
    return _markdown("steps until half is lost", lines) if lines else ""


def _markdown(head: str, lines: Sequence[tuple[str, dict[str, str]]]) -> str:
    systems = list(dict.fromkeys(system for _, cells in lines for system in cells))
    rows = [[head, *systems], *([name, *(cells.get(system, "") for system in systems)] for name, cells in lines)]
    text = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([text[0], "|" + "---|" * len(rows[0]), *text[1:]])


def _cell(rows: Sequence[Row]) -> str:
    counts, total = [row["success"]["count"] for row in rows], rows[0]["success"]["total"]
    # The seeds were asked the same prompts: their answers do not make the interval narrower.
    low, high = Share(round(statistics.mean(counts)), total).interval
    damage = [row["damage"] for row in rows if "damage" in row]
    lost = f", loss {statistics.mean(damage):.2f}" if damage else ""
    return f"{100 * statistics.mean(counts) / total:.1f} ({100 * low:.0f}-{100 * high:.0f}){lost}"
