"""The two consoles that everything is printed on, and what the views share.

Every text that does not come from nestpatch itself goes through `escape`: packs, models, channels and ledgers are written by
others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from nestpatch.plain import lines, one_line

if TYPE_CHECKING:
    from nestpatch.evaluation.statistics import Share

_NOTHING = "[none][/none]"
"""Markup without effect."""


class _Console(Console):
    """Lets no control character of a text through, should `escape` have been forgotten. rich's own are marked as such."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts of what is printed."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(lines(segment.text), segment.style)


out = _Console(highlight=False, soft_wrap=True, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
if not out.is_terminal:
    # Into a file or a pipe: nothing to fit into.
    out.width = 160


def escape(value: object) -> str:
    """Foreign text made harmless, for text with markup: one line, nothing that drives the terminal, and no markup of its own.

    rich's own function leaves an open bracket that begins no tag, and the next text may end it.
    """
    text = one_line(value).replace("[", f"[{_NOTHING}")
    body = text.rstrip("\\")
    # Before a tag two backslashes mean one.
    return body + ("\\" * 2 * (len(text) - len(body)) + _NOTHING if body != text else "")


def escape_lines(value: object) -> str:
    """The same for what may have several lines: all but the first are indented, so that none looks like one of ours."""
    first, *others = str(value).split("\n")
    return "\n".join([escape(first), *(escape(line if line.startswith("  ") else f"  {line}") for line in others)])


def size(nbytes: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def percent(share: Share) -> str:
    """A share with its interval."""
    low, high = share.interval
    return f"{share.value:6.1%}  [dim]{low:.1%} to {high:.1%}, {share.count} of {share.total}[/dim]"


def fact_grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    return grid


def show_error(error: Exception, advice: str) -> None:
    """A named error, its reason and the way out."""
    err.print(f"[bold red]{type(error).__name__}[/]: {escape_lines(error)}")
    err.print(f"[bold]What to do[/]: {escape(advice)}")
