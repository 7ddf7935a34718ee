"""How the verdicts of a detector are shown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape, out

if TYPE_CHECKING:
    from nestpatch.evaluation.detecting import Detected


def show_detected(found: Detected) -> None:
    """A line for each prompt, and what the detector is worth.

    Args:
        found: The verdicts.
    """
    table = Table("", "score", "prompt", box=None, pad_edge=False, header_style="dim")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for one in found.prompts:
        table.add_row("[bold]harmful[/]" if one.harmful else "harmless", f"{one.score:+.2f}", escape(one.prompt))
    out.print(table)
    out.print(f"\n[dim]harmful above {found.facts.threshold:+.2f}; {escape(found.facts.sentence)}[/]")
