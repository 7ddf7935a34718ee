"""Suites: prompt sets, and what a good model does with them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations

from nestpatch.errors import DataError, PromptDataError
from nestpatch.measured import BENIGN, HARMFUL, LOOKALIKE
from nestpatch.prompts.benchmarks import BENCHMARKS, read_benchmark
from nestpatch.prompts.builtin import JAILBREAK, PREFIX
from nestpatch.prompts.readers import PromptSet, load_prompts, sample_set

KINDS = (HARMFUL, BENIGN, LOOKALIKE)
BUILTIN_LIMIT = 100
"""Prompts of each built-in suite that a command measures unless told otherwise. Shares are known within 7 to 10 points, and a
small model answers them on a CPU in minutes; `train` and `eval` draw the same ones."""
_STEMS = {"harmful": HARMFUL, "jailbreak": HARMFUL, "benign": BENIGN, "lookalike": LOOKALIKE}


@dataclass(frozen=True)
class Suite:
    """A prompt set and what a good model does with it.

    Attributes:
        kind: "harmful" prompts are to be refused, "benign" and "lookalike" ones to be answered.
        prompts: What is asked.
    """

    kind: str
    prompts: PromptSet

    @property
    def name(self) -> str:
        """The name of its prompts."""
        return self.prompts.name


def load_suites(text: str) -> list[Suite]:
    """Reads the suites of a source.

    Args:
        text: "KIND=SOURCE" with harmful, benign or lookalike; "SOURCE" whose file name begins with harmful, jailbreak, benign
            or lookalike; or a published benchmark, "NAME=SOURCE", or "NAME" for its data set on the Hub: docs/evaluation.md
            lists them. SOURCE is what `load_prompts` reads.

    Returns:
        One suite; of a benchmark one for each part, such as the safe and the unsafe prompts of xstest.

    Raises:
        PromptDataError: The kind is not known, or the prompts cannot be read.
    """
    kind, equals, source = text.partition("=")
    if equals and kind in _STEMS:
        return [Suite(_STEMS[kind], load_prompts(source))]
    if kind in BENCHMARKS and (equals or not os.path.exists(text)):  # noqa: PTH110 - answers no where Path raises
        return [Suite(part, prompts) for part, prompts in read_benchmark(kind, source)]
    if equals and re.fullmatch(r"[A-Za-z0-9_-]+", kind) and not os.path.exists(text):  # noqa: PTH110
        close = get_close_matches(kind.lower(), (*_STEMS, *BENCHMARKS), 1)
        hint = f"Did you mean {_STEMS.get(close[0], close[0])}={source}? " if close else ""
        advice = f"{hint}The kinds are {', '.join(KINDS)}; the benchmarks are {', '.join(BENCHMARKS)}."
        raise PromptDataError(f"{kind!r} is not a kind of suite", advice=advice)
    stem = text.removeprefix(PREFIX).replace("\\", "/").rpartition("/")[2].lower()
    known = next((kind for start, kind in _STEMS.items() if stem.startswith(start)), None)
    if known is None:
        raise PromptDataError(
            f"the file name does not say what kind of suite {text} is",
            advice=f"Name the kind: --suite harmful={text} (or {' or '.join(KINDS[1:])}), or the benchmark: xstest={text}.",
        )
    return [Suite(known, load_prompts(text))]


def load_suite(text: str) -> Suite:
    """Reads one suite.

    Args:
        text: As for `load_suites`.

    Returns:
        The suite.

    Raises:
        PromptDataError: As `load_suites`; or the source is a benchmark of several suites.
    """
    first, *others = load_suites(text)
    if others:
        names = ", ".join(suite.name for suite in (first, *others))
        raise PromptDataError(f"{text} is more than one suite: {names}", advice="Read it with load_suites.")
    return first


def builtin_suites(limit: int | None = None) -> list[Suite]:
    """Reads the built-in suites: harmful, jailbreak, benign and look-alike test prompts.

    Args:
        limit: Prompts of each suite at most, a fixed sample; None for all.

    Returns:
        The suites.

    Raises:
        DataError: `limit` is less than 1.
    """
    names = (f"{HARMFUL}.test", JAILBREAK, f"{BENIGN}.test", f"{LOOKALIKE}.test")
    return [limited(load_suite(PREFIX + name), limit) for name in names]


def choose_suites(sources: Sequence[str], limit: int | None = None) -> list[Suite]:
    """Reads what a command is to measure.

    Args:
        sources: As for `load_suites`; none means the built-in suites.
        limit: Prompts of each suite at most; None for BUILTIN_LIMIT of the built-in suites, and all of others.

    Returns:
        The suites.

    Raises:
        PromptDataError: As `load_suites`.
        DataError: `limit` is less than 1.
    """
    if not sources:
        return builtin_suites(BUILTIN_LIMIT if limit is None else limit)
    return [limited(suite, limit) for text in sources for suite in load_suites(text)]


def limited(suite: Suite, limit: int | None) -> Suite:
    """Draws a fixed sample of a suite.

    Args:
        suite: What to draw from.
        limit: Prompts at most; None for all.

    Returns:
        The suite with fewer prompts, which keeps its name: the digest of its prompts differs.

    Raises:
        DataError: `limit` is less than 1.
    """
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} prompts measures nothing", advice="Give 1 or more, or None for all.")
    return suite if limit is None else Suite(suite.kind, sample_set(suite.prompts, limit, 0))


def overlaps(suites: Sequence[Suite]) -> Iterator[str]:
    """Finds prompts that are in more than one suite.

    Args:
        suites: What will be evaluated together.

    Yields:
        One sentence for each pair of suites that share prompts.
    """
    texts = [{prompt.text for prompt in suite.prompts.prompts} for suite in suites]
    for (first, ours), (second, theirs) in combinations(zip(suites, texts, strict=True), 2):
        if both := ours & theirs:
            why = "they count twice" if first.kind == second.kind else f"as {first.kind} and as {second.kind}"
            yield (
                f"{len(both)} prompts are in both {first.name} and {second.name}, {why}; "
                f"the first is {next(p.text for p in first.prompts.prompts if p.text in both)[:60]!r}"
            )
