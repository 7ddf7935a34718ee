r"""Text that others wrote, made safe to show: it cannot drive a terminal, hide what it says, or look like another line.

Every string of a pack, a model, a channel, a ledger, a file name or an error goes through `one_line` or `lines` before a
person sees it. Characters that are not visible are written as Python writes them: a bell as \x07, an override of the
direction of writing as \u202e.
"""

from __future__ import annotations

import math
import re

_BLANK = frozenset("\u034f\u115f\u1160\u3164\uffa0")
"""Letters and marks that are counted as visible, and are not."""
_ESCAPED_BYTES = range(0xDC80, 0xDD00)
"""How Python writes the bytes of a file name that are no UTF-8."""
_MARKDOWN = frozenset("\\`*_[]<>#|~&$!")
_BLOCK = re.compile(r"\A(?P<number>\d*)(?P<mark>[-+=:]|(?<=\d)[.)](?=\s|\Z))", re.ASCII)
_MOST = 10**15
"""Beyond this no count is one."""


def one_line(text: object) -> str:
    r"""The text on one line: line breaks are written as \n."""
    return "".join(map(_visible, str(text)))


def lines(text: object) -> str:
    """The text on its own lines, for what has several on purpose."""
    return "".join(c if c == "\n" else _visible(c) for c in str(text))


def is_visible(character: str) -> bool:
    """Whether it shows as itself, or as a space, and does nothing else."""
    return character.isprintable() and character not in _BLANK


def _visible(character: str) -> str:
    if is_visible(character):
        return character
    if ord(character) in _ESCAPED_BYTES:
        return f"\\x{ord(character) - 0xDC00:02x}"
    if "\u2000" <= character <= "\u200a" or character in "\u00a0\u202f\u205f\u3000":  # spaces of another width
        return " "
    return character.encode("unicode_escape").decode("ascii")


def markdown(text: object) -> str:
    """The text on one line of a Markdown document: without markup, HTML and links, and as the beginning of nothing.

    Line breaks and other blanks become spaces, which Markdown joins.
    """
    blanks = "".join(" " if c.isspace() else c for c in str(text)).strip()
    escaped = "".join(f"\\{c}" if c in _MARKDOWN else c for c in one_line(blanks))
    # What begins a list, a rule, or the underline of a heading.
    return _BLOCK.sub(r"\g<number>\\\g<mark>", escaped, count=1)


def number(value: object, form: str) -> str:
    """A number of a file in some format, "?" for what is none: text, truth values, NaN, more digits than a float has."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "?"
    try:
        return format(value, form) if math.isfinite(value) else "?"
    except OverflowError:
        return "?"


def count(value: object) -> str:
    """A whole number of a file, "?" for what is none."""
    return str(value) if type(value) is int and abs(value) < _MOST else "?"
