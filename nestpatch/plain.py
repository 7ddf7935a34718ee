r"""Makes untrusted text safe to show: it cannot control a terminal, hide characters, or imitate another line of output.

Every string from a pack, a model, a channel, a ledger, a file name or an error goes through `one_line` or `lines` before it is
shown. Characters that are not visible are escaped as in Python: a bell as \x07, a right-to-left override as \u202e.
`finite` takes out of JSON values the numbers that JSON does not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

_BLANK = frozenset("\u034f\u115f\u1160\u3164\uffa0")
"""Letters and marks that Python counts as printable, and that are not visible."""
_ESCAPED_BYTES = range(0xDC80, 0xDD00)
"""How Python represents bytes of a file name that are not UTF-8."""
_MARKDOWN = frozenset("\\`*_[]<>#|~&$!")
_BLOCK = re.compile(r"\A(?P<number>\d*)(?P<mark>[-+=:]|(?<=\d)[.)](?=\s|\Z))", re.ASCII)
_MOST = 10**15
"""Larger numbers are not counts."""


def one_line(text: object) -> str:
    r"""Makes text safe to show on one line; line breaks are written as \n.

    Args:
        text: Anything; it is converted with str().

    Returns:
        Printable text without line breaks.
    """
    return "".join(map(_visible, str(text)))


def lines(text: object) -> str:
    """Makes text safe to show on several lines.

    Args:
        text: Anything; it is converted with str().

    Returns:
        Printable text with the same line feeds.
    """
    return "".join(c if c == "\n" else _visible(c) for c in str(text))


def is_visible(character: str) -> bool:
    """Whether a character is shown as itself, or as a space, and has no other effect.

    Args:
        character: One character.
    """
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
    """Makes text safe to put on one line of a Markdown document, where it starts no markup, HTML, link or block.

    Args:
        text: Anything; it is converted with str().

    Returns:
        Escaped text; line breaks and other white space are spaces, which Markdown joins.
    """
    blanks = "".join(" " if c.isspace() else c for c in str(text)).strip()
    escaped = "".join(f"\\{c}" if c in _MARKDOWN else c for c in one_line(blanks))
    # What begins a list, a rule, or the underline of a heading.
    return _BLOCK.sub(r"\g<number>\\\g<mark>", escaped, count=1)


def number(value: object, form: str) -> str:
    """Formats a number that was read from a file.

    Args:
        value: Anything.
        form: A format specification, such as ".1f".

    Returns:
        The number; "?" for text, booleans, NaN, infinities, and integers that no float can hold.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return "?"
    try:
        return format(value, form) if math.isfinite(value) else "?"
    except OverflowError:
        return "?"


def count(value: object) -> str:
    """Formats a count that was read from a file.

    Args:
        value: Anything.

    Returns:
        The count; "?" for anything but an integer of a plausible size.
    """
    return str(value) if type(value) is int and abs(value) < _MOST else "?"


def finite(value: Any) -> Any:
    """Replaces the numbers that JSON does not have.

    Args:
        value: Plain values, nested.

    Returns:
        The value with None for NaN and infinity; tuples become lists.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
