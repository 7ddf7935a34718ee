"""The two consoles that everything is printed on, and the formatting that the views share.

Every text that does not come from nestpatch itself goes through `escape`: packs, models, channels and ledgers are written by
others.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from nestpatch.plain import lines, one_line

_NOTHING = "[none][/none]"
"""Markup without effect."""


class _Console(Console):
    """Escapes the control characters of every text, in case `escape` was forgotten. Those of rich are marked as its own."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(lines(segment.text), segment.style)


out = _Console(highlight=False, soft_wrap=True, emoji=False)
"""stdout: results."""
err = _Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
"""stderr: progress, messages and errors."""
if not out.is_terminal and "COLUMNS" not in os.environ:
    # A file or a pipe has no width to fit into.
    out.width = 160


def escape(value: object) -> str:
    """Makes foreign text safe inside a text with markup: one line, no control characters, no markup of its own.

    rich's own function leaves an open bracket that begins no tag, and the next text may end it.

    Args:
        value: What is shown; its text is taken.

    Returns:
        Markup that shows the text as it is.
    """
    text = one_line(value).replace("[", f"[{_NOTHING}")
    body = text.rstrip("\\")
    # Before a tag, rich reads two backslashes as one.
    return body + ("\\" * 2 * (len(text) - len(body)) + _NOTHING if body != text else "")


def size(nbytes: float) -> str:
    """Formats a number of bytes for people.

    Args:
        nbytes: The number.

    Returns:
        Such as "33.4 MB", in powers of 1000.
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def duration(seconds: float) -> str:
    """Formats a time for people.

    Args:
        seconds: The time.

    Returns:
        Such as "40 s", "12 min" or "3 h 5 min".
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def fact_grid() -> Table:
    """Makes an empty table of facts: a name, a value.

    Returns:
        The table; values that are too long continue on the next line.
    """
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    return grid


def table_of(first: str, *numbers: str) -> Table:
    """Makes an empty table.

    Args:
        first: Title of the column of names, which continue on the next line where they are too long.
        numbers: Titles of the columns after it, which hold numbers.

    Returns:
        The table.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def show_error(error: Exception, advice: str) -> None:
    """Shows an error on stderr.

    Args:
        error: Its class is shown, and its text as the reason.
        advice: What to do about it.
    """
    first, *others = str(error).split("\n")
    # A reason of several lines is indented, so that no line of it looks like one of nestpatch.
    reason = "\n".join([escape(first), *(escape(line if line.startswith("  ") else f"  {line}") for line in others)])
    err.print(f"[bold red]{type(error).__name__}[/]: {reason}")
    err.print(f"[bold]What to do[/]: {escape(advice)}")
