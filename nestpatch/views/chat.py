"""How answers look while they grow: base and patched model side by side, on a narrow terminal one below the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.box import MINIMAL
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nestpatch.plain import lines, one_line
from nestpatch.views.console import escape, out

NARROW = 80
"""A terminal with fewer columns shows answers below each other."""
_STYLES = {"base": "yellow", "patched": "green", "model": "cyan"}
_INDENT = "  "
"""Before the lines of an answer, so that none of them looks like a heading."""
_INTERVAL = 0.05
"""Seconds between two drawings."""


def answers_table(answers: Mapping[str, str], width: int, height: int | None = None) -> RenderableType:
    """Answers side by side, or below each other where the width is less than NARROW.

    Args:
        answers: Name of a side -> its text.
        width: Columns of the terminal.
        height: Lines that may be used; of longer answers the last lines are shown. None: all of them.

    Returns:
        What to print.
    """
    beside = len(answers) > 1 and width >= NARROW
    column = (width - 5) // 2 if beside else width - 1 - len(_INDENT)
    rows = None if height is None else max(1, (height - 2 if beside else height // len(answers) - 2))
    texts = [_wrapped(text, column, rows) for text in answers.values()]
    if not beside:
        parts: list[RenderableType] = []
        for name, text in zip(answers, texts, strict=True):
            parts += [*([Text("")] if parts else []), *([_title(name)] if len(answers) > 1 else []), _indented(text)]
        return Group(*parts)
    table = Table(box=MINIMAL, padding=(0, 1), show_edge=False, border_style="dim")
    for name in answers:
        table.add_column(_title(name), width=column)
    table.add_row(*texts)
    return table


def _indented(text: Text) -> Text:
    return Text("\n").join(Text(_INDENT if line else "") + line for line in text.split("\n", allow_blank=True))


def _title(name: str) -> Text:
    return Text(one_line(name), style=f"bold {_STYLES.get(name, '')}")


def _wrapped(text: str, width: int, rows: int | None) -> Text:
    """A text of unknown origin in lines of a width, the last ones of it."""
    if not text:
        return Text("...", style="dim")
    found = Text(_plain(text)).wrap(out, max(1, width), overflow="fold", no_wrap=False)
    for line in found:
        line.rstrip()
    return Text("\n").join(list(found)[-rows:] if rows else found)


def _plain(text: str) -> str:
    """An answer without what could act on a terminal."""
    return lines(text.replace("\r\n", "\n").replace("\t", "    "))


def show_answers(answers: Mapping[str, str]) -> None:
    """Prints complete answers: as they are drawn on a terminal, elsewhere as plain text with a heading where there are two.

    Args:
        answers: Name of a side -> its text.
    """
    if out.is_terminal:
        out.print(answers_table({name: text or " " for name, text in answers.items()}, out.width))
        out.print()
        return
    for name, text in answers.items():
        if len(answers) == 1:
            out.print(_plain(text), markup=False)
        else:
            out.print(f"{escape(name)}:")
            out.print(_indented(Text(_plain(text))))


@contextmanager
def growing() -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Draws answers while they grow, and leaves nothing on the terminal; elsewhere draws nothing.

    Yields:
        A function that is called with the answers so far.
    """
    if not out.is_terminal:
        yield lambda _: None
        return
    drawn = 0.0
    with Live(console=out, auto_refresh=False, transient=True) as live:

        def draw(answers: Mapping[str, str]) -> None:
            nonlocal drawn
            if (now := time.monotonic()) - drawn >= _INTERVAL:
                drawn = now
                live.update(answers_table(answers, out.width, out.height - 1), refresh=True)

        yield draw


def show_opening(models: Mapping[str, str]) -> None:
    """Prints what an interactive chat is with, and how to end it.

    Args:
        models: Name of a side -> its model.
    """
    grid = Table.grid(padding=(0, 2))
    for name, model in models.items():
        grid.add_row(_title(name), Text(one_line(model), overflow="fold"))
    out.print(grid)
    out.print("[dim]/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends.[/]")
    out.print()
