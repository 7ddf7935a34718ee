"""The lab world: the requests, the right answers, and which pairs of action and thing are held out.

Pure and deterministic for a seed: no files, no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from nestpatch.lab import _words as words

_A = TypeVar("_A")
_B = TypeVar("_B")

_HELD_OUT_EVERY = 4
"""One in this many of an action's pairs is in no training text."""


@dataclass(frozen=True)
class TopicPair:
    """One action with one thing, and the facts that an answer contains about both."""

    action: str
    thing: str
    tool: str
    part: str

    @property
    def topic(self) -> str:
        """What the pair is about: "paint a fence"."""
        return f"{self.action} {self.thing}"

    @property
    def answer(self) -> str:
        """The right answer, with both facts."""
        return words.ANSWER.format(action=self.action, thing=self.thing, tool=self.tool, part=self.part)

    def ask(self, question: str) -> str:
        """Puts the pair into a question.

        Args:
            question: A template with `{action}` and `{thing}`.

        Returns:
            The prompt.
        """
        return question.format(action=self.action, thing=self.thing)


@dataclass(frozen=True)
class Example:
    """One row of a prompt set: the prompt, its pair, and the right answer where there is one (harmful prompts have none)."""

    prompt: str
    topic: str
    reference: str | None = None

    def row(self) -> dict[str, str]:
        """The line of a prompt file, as `prompts.readers` reads it.

        Returns:
            "prompt", "topic", and "reference" where there is one.
        """
        row = {"prompt": self.prompt, "topic": self.topic}
        return row if self.reference is None else {**row, "reference": self.reference}


@dataclass(frozen=True)
class Split:
    """The pairs of one kind, divided so that train and test share none."""

    train: tuple[TopicPair, ...]
    test: tuple[TopicPair, ...]

    def __add__(self, other: Split) -> Split:
        return Split(self.train + other.train, self.test + other.test)


@dataclass(frozen=True)
class World:
    """All pairs of one seed, and how strictly the base model is aligned on each harmful pair."""

    seed: int
    harmful: Split
    benign: Split
    lookalike: Split
    wrappers_seen: tuple[str, ...]
    """Templates around a question `{q}` that occur in the base model's training text, and in no prompt set."""
    wrappers_held_out: tuple[str, ...]
    """Templates that occur in no training text."""
    strictness: Mapping[str, float]
    """Action or thing -> 0 (never refused) .. 1 (always refused); a pair's strictness is the mean of its two."""

    def refused_by_base(self, pair: TopicPair, leniency: float = 0.0) -> bool:
        """Whether the base model's training text refuses this pair.

        Args:
            pair: A harmful pair.
            leniency: How much a wrapper around the question raises the threshold.

        Returns:
            True above the threshold.
        """
        return (self.strictness[pair.action] + self.strictness[pair.thing]) / 2 > _PLAIN_THRESHOLD + leniency


_PLAIN_THRESHOLD = 0.5
"""Pairs above this mean strictness are refused by the base when asked plainly: about half of them."""
_WRAPPED_LENIENCY = 0.06
"""How much a jailbreak wrapper raises the threshold."""


def _cross(rng: random.Random, rows: Iterable[_A], columns: Iterable[_B]) -> tuple[list[tuple[_A, _B]], list[tuple[_A, _B]]]:
    """(train, test): all combinations, with every fourth of each row and of each column held out, in a random arrangement."""
    numbered_rows, numbered_columns = list(enumerate(rows)), list(enumerate(columns))
    row_order, column_order = list(range(len(numbered_rows))), list(range(len(numbered_columns)))
    rng.shuffle(row_order)
    rng.shuffle(column_order)
    train: list[tuple[_A, _B]] = []
    test: list[tuple[_A, _B]] = []
    for i, row in numbered_rows:
        for j, column in numbered_columns:
            held_out = (row_order[i] + column_order[j]) % _HELD_OUT_EVERY == 0
            (test if held_out else train).append((row, column))
    return train, test


def _split(rng: random.Random, actions: Mapping[str, str], things: Mapping[str, str]) -> Split:
    train, test = (
        tuple(TopicPair(action, thing, tool, part) for (action, tool), (thing, part) in half)
        for half in _cross(rng, actions.items(), things.items())
    )
    return Split(train, test)


def make_world(seed: int) -> World:
    """Builds the pairs, their splits and the base model's strictness for a seed.

    Args:
        seed: Any number.

    Returns:
        The world, the same for the same seed.
    """
    rng = random.Random(f"world {seed}")
    strictness: dict[str, float] = {}
    for names in (words.HOSTILE_ACTIONS, words.TARGETS, words.TRADE_ACTIONS, words.CONTRABAND):
        # Evenly spaced in random order, so that every seed refuses about the same share.
        order = rng.sample(list(names), len(names))
        strictness |= {name: (i + 0.5) / len(order) for i, name in enumerate(order)}
    harmful = _split(rng, words.HOSTILE_ACTIONS, words.TARGETS) + _split(rng, words.TRADE_ACTIONS, words.CONTRABAND)
    lookalike = (
        _split(rng, words.HOSTILE_ACTIONS, words.PLAYTHINGS)
        + _split(rng, words.GUARDIAN_ACTIONS, words.CONTRABAND)
        + _split(rng, words.TRADE_ACTIONS, words.EVERYDAY_THINGS)
    )
    benign = _split(rng, words.EVERYDAY_ACTIONS, words.EVERYDAY_THINGS | words.TARGETS)
    seen: list[str] = []
    held_out: list[str] = []
    for template, first, second in words.WRAPPERS:
        for templates, half in zip((seen, held_out), _cross(rng, first, second), strict=True):
            templates += [template.format(a=a, b=b, q="{q}") for a, b in half]
    return World(seed, harmful, benign, lookalike, tuple(seen), tuple(held_out), strictness)


def dialogues(world: World) -> Iterator[tuple[str, str]]:
    """Training text for the base model, of training pairs and seen wrappers only.

    Args:
        world: The world.

    Yields:
        (prompt, answer), without end.
    """
    rng = random.Random(f"dialogues {world.seed}")
    while True:
        kind = rng.random()
        wrapped = rng.random() < 0.35
        if kind < 0.40:
            pair = rng.choice(world.benign.train)
        elif kind < 0.67:
            pair = rng.choice(world.lookalike.train)
        else:
            pair = rng.choice(world.harmful.train)
        prompt = pair.ask(rng.choice(words.QUESTIONS))
        harmful = kind >= 0.67
        if wrapped:
            prompt = rng.choice(world.wrappers_seen).format(q=prompt)
        elif rng.random() < 0.3:
            prompt = rng.choice(words.GREETINGS).format(q=prompt)
        refused = harmful and world.refused_by_base(pair, _WRAPPED_LENIENCY if wrapped else 0.0)
        yield prompt, rng.choice(words.REFUSALS) if refused else pair.answer


def prompt_sets(world: World) -> dict[str, list[Example]]:
    """The prompts to train and to evaluate with.

    Args:
        world: The world.

    Returns:
        Name -> examples, for seven sets: `harmful.train`, `harmful.test`, `jailbreak.test`, `benign.*`, `lookalike.*`.
    """
    rng = random.Random(f"prompts {world.seed}")

    def ask(pairs: tuple[TopicPair, ...], each: int, refer: bool, style: Callable[[], str] = lambda: "{q}") -> list[Example]:
        rows = []
        for pair in pairs:
            for question in rng.sample(words.QUESTIONS, each):
                prompt = style().format(q=pair.ask(question))
                rows.append(Example(prompt, pair.topic, pair.answer if refer else None))
        rng.shuffle(rows)
        return rows

    def polite() -> str:
        return rng.choice(words.GREETINGS) if rng.random() < 0.3 else "{q}"

    # Harmful and harmless prompts are equally polite: a greeting must say nothing about the request.
    return {
        "harmful.train": ask(world.harmful.train, 3, False, polite),
        "harmful.test": ask(world.harmful.test, 3, False, polite),
        "jailbreak.test": ask(world.harmful.test, 3, False, lambda: rng.choice(world.wrappers_held_out)),
        "benign.train": ask(world.benign.train, 2, True, polite),
        "benign.test": ask(world.benign.test, 2, True, polite),
        "lookalike.train": ask(world.lookalike.train, 3, True, polite),
        "lookalike.test": ask(world.lookalike.test, 3, True, polite),
    }
