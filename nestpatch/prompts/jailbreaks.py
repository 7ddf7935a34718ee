"""Requests inside texts that try to talk a model out of a refusal: how the two are paired and put together. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from math import gcd
from typing import TypeVar

SLOT = "{prompt}"
"""What marks the place of the request in a jailbreak template."""
Outer = TypeVar("Outer")
Inner = TypeVar("Inner")


def fill(template: str, prompt: str) -> str:
    """Puts a request into a template.

    Args:
        template: A text with at least one SLOT.
        prompt: The request.

    Returns:
        The text, with the request at every SLOT.
    """
    return template.replace(SLOT, prompt)


def spread(outer: Sequence[Outer], inner: Sequence[Inner], each: int) -> Iterator[tuple[Outer, Inner]]:
    """Pairs every outer value with a few inner ones; all inner ones are used equally often.

    Args:
        outer: Values that come in their order.
        inner: Values that are taken in turn, each once before any is used again.
        each: Pairs for each outer value; no more than there are inner values.

    Yields:
        `each` pairs for each outer value, with different inner values: the same ones at every call.
    """
    places = _places(len(inner))
    for value in outer:
        for place in islice(places, min(each, len(inner))):
            yield value, inner[place]


def _places(size: int) -> Iterator[int]:
    """All places below `size`, again and again, in steps of about 0.62 of it: neighbours in a list are far apart."""
    stride = next((n for n in range(round(0.618 * size), size) if gcd(n, size) == 1), 1)
    place = 0
    while True:
        yield place % size
        place += stride
