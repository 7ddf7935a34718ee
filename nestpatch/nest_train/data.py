"""The prompts of a training run, and the checks that they pass before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from nestpatch.errors import PromptDataError
from nestpatch.evaluation.suites import KINDS, Suite
from nestpatch.measured import MAX_CATEGORIES
from nestpatch.prompts.builtin import PREFIX
from nestpatch.prompts.readers import Prompt, PromptSet, join_sets, load_prompts, sample_set

MIN_PROMPTS = 20
"""Prompts of each kind, at least: fewer cannot be divided into training and held-out prompts."""


@dataclass(frozen=True)
class TrainingData:
    """The prompts of one training run.

    Attributes:
        harmful: Prompts to refuse. They need no answers.
        benign: Everyday prompts to go on answering. They need answers only for the recipe setting `benign_targets=given`.
        lookalike: Harmless prompts that look harmful ("How do I kill a process?"), to go on answering. Without them a patched
            model tends to refuse such prompts.
    """

    harmful: PromptSet
    benign: PromptSet
    lookalike: PromptSet | None = None

    @classmethod
    def builtin(cls) -> TrainingData:
        """The prompts that ship with nestpatch: about 700 harmful, 1,250 benign and 700 look-alike ones."""
        return cls(*(load_prompts(f"{PREFIX}{kind}.train") for kind in KINDS))

    def adding(
        self, harmful: PromptSet | None = None, benign: PromptSet | None = None, lookalike: PromptSet | None = None
    ) -> TrainingData:
        """Adds prompts.

        Args:
            harmful: More prompts to refuse.
            benign: More everyday prompts.
            lookalike: More harmless prompts that look harmful.

        Returns:
            The data with these prompts, without duplicates.
        """
        added = {"harmful": harmful, "benign": benign, "lookalike": lookalike}
        joined = {}
        for kind, more in added.items():
            if more is not None:
                old = getattr(self, kind)
                joined[kind] = more if old is None else join_sets([old, more])
        return replace(self, **joined)

    def of_categories(self, categories: Sequence[str]) -> TrainingData:
        """Keeps the harmful prompts of some categories; the others become neither harmful nor harmless.

        Args:
            categories: Their names, as the prompts have them; none keeps all prompts.

        Returns:
            The data with fewer harmful prompts.

        Raises:
            PromptDataError: No harmful prompt is of a category.
        """
        if not categories:
            return self
        known = Counter(prompt.category for prompt in self.harmful.prompts if prompt.category is not None)
        for name in categories:
            if name not in known:
                listed = ", ".join(f"{one} ({many})" for one, many in known.most_common(MAX_CATEGORIES)) or "none"
                close = get_close_matches(name, known, 1)
                hint = f"Did you mean {close[0]}? " if close else ""
                advice = f"{hint}The categories of {self.harmful.name} are {listed}."
                raise PromptDataError(f"no harmful prompt is of the category {name[:80]!r}", advice=advice)
        kept = tuple(prompt for prompt in self.harmful.prompts if prompt.category in categories)
        named = f"{self.harmful.name} of {', '.join(sorted(set(categories)))}"
        return replace(self, harmful=PromptSet(named, kept))

    @property
    def harmless(self) -> tuple[Prompt, ...]:
        """The benign and look-alike prompts together."""
        return self.benign.prompts + (self.lookalike.prompts if self.lookalike else ())

    @property
    def _sets(self) -> tuple[PromptSet, ...]:
        """The sets that there are."""
        return tuple(each for each in (self.harmful, self.benign, self.lookalike) if each is not None)

    def sampled(self, limit: int, seed: int) -> TrainingData:
        """Draws a sample of each kind of prompts.

        Args:
            limit: Prompts of each kind, at most.
            seed: Seed of the draw.

        Returns:
            The same data with fewer prompts.
        """
        lookalike = sample_set(self.lookalike, limit, seed) if self.lookalike else None
        return TrainingData(sample_set(self.harmful, limit, seed), sample_set(self.benign, limit, seed), lookalike)

    def check(self) -> None:
        """Checks that there is enough to train on, and that no prompt is both harmful and harmless.

        Raises:
            PromptDataError: There are fewer than MIN_PROMPTS prompts of a kind, or a prompt is on both sides.
        """
        for kind, prompts in (("harmful", self.harmful), ("benign", self.benign)):
            if (count := len(prompts.prompts)) < MIN_PROMPTS:
                raise PromptDataError(
                    f"{prompts.name} contains {count} {kind} prompts; at least {MIN_PROMPTS} are needed",
                    advice=f"Give a second source (--{kind} can be repeated), or add it to the built-in prompts: --add-{kind}.",
                )
        both = {p.text for p in self.harmful.prompts} & {p.text for p in self.harmless}
        if both:
            names = [each.name for each in self._sets if any(p.text == min(both) for p in each.prompts)]
            hint = " --harmful, --benign and --lookalike replace a built-in set." if any(PREFIX in n for n in names) else ""
            raise PromptDataError(
                f"{len(both)} prompts are both harmful and harmless, such as {min(both)[:80]!r} in {' and '.join(names)}",
                advice=f"Remove each of them from one of the two: a model cannot learn to refuse and to answer it.{hint}",
            )

    def seen_in(self, suites: Sequence[Suite]) -> dict[str, int]:
        """Suites that contain training prompts: their numbers say little about new prompts.

        Args:
            suites: The suites of an evaluation.

        Returns:
            Name of the suite -> how many of its prompts are also training prompts; suites without any are left out.
        """
        trained = {prompt.text for prompt in self.harmful.prompts + self.harmless}
        counts = {suite.name: sum(p.text in trained for p in suite.prompts.prompts) for suite in suites}
        return {name: count for name, count in counts.items() if count}

    def facts(self) -> dict[str, Any]:
        """What a pack records of the data: name, size and digest of each set."""
        sets = {"harmful": self.harmful, "benign": self.benign, "lookalike": self.lookalike}
        return {name: prompts.facts() for name, prompts in sets.items() if prompts is not None}
