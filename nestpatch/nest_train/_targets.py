"""The stage distil: the answers to train towards. Harmful prompts get refusals, harmless prompts the base's own answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestpatch.errors import PromptDataError, TrainingError
from nestpatch.evaluation.judges import is_refusal
from nestpatch.nest_train.data import MIN_PROMPTS, TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.text import TokenPair, encode_pairs

if TYPE_CHECKING:
    from nestpatch.nest_train._run import Run

# Short, neutral and true of any harmful request. The same first words, because whether to refuse is decided there.
BUILT_IN = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, but I won't help with this.",
    "I'm sorry, but that is not something I can help with.",
)
REFUSAL_SAMPLE = 256
"""Harmful prompts that the base answers, at most, to find out how it refuses."""
JUDGED_TOKENS = 16
"""Tokens of an answer that tell whether it refuses."""
_WHOLE_REFUSAL = 24
"""Tokens of a refusal that are trained: all of a built-in one with its end, or a model goes on in circles after its start."""
_OWN_NEEDED = 0.05
"""Share of those prompts that the base must refuse by itself before its own wording is used."""
_OWN_KEPT = 4
"""How many of the base's own wordings are used, at most."""


@dataclass(frozen=True)
class Refusals:
    """Texts to train towards, and why these."""

    texts: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Example:
    """A prompt with the answer to train towards."""

    text: str
    tokens: TokenPair

    @property
    def length(self) -> int:
        """Tokens of both."""
        return len(self.tokens.prompt) + len(self.tokens.answer)


@dataclass(frozen=True)
class Examples:
    """Training examples: harmful prompts with refusals, harmless prompts with the answers to keep."""

    harmful: tuple[Example, ...]
    benign: tuple[Example, ...]
    lookalike: tuple[Example, ...] = ()

    @property
    def harmless(self) -> tuple[Example, ...]:
        """Benign and look-alike examples together."""
        return self.benign + self.lookalike

    @property
    def token_count(self) -> int:
        """Tokens of all prompts and answers."""
        return sum(example.length for example in self.harmful + self.harmless)

    def split_off(self, share: float, rng: random.Random) -> tuple[Examples, Examples]:
        """Holds out a random share of each kind.

        Args:
            share: Between 0 and 1; at least one example of each kind is held out.
            rng: Decides which.

        Returns:
            (kept, held out).

        Raises:
            PromptDataError: There are fewer than two examples of a kind.
        """
        kinds = (self.harmful, self.benign, self.lookalike)
        parts = [_split(kind, share, rng) if kind else ((), ()) for kind in kinds]
        return Examples(*(kept for kept, _ in parts)), Examples(*(held for _, held in parts))


def _split(items: Sequence[Example], share: float, rng: random.Random) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    if len(items) < 2:
        raise PromptDataError(f"{len(items)} prompts are too few: some must be held out to decide when to stop")
    order = rng.sample(list(items), len(items))
    held_out = max(1, round(len(items) * share))
    return tuple(order[held_out:]), tuple(order[:held_out])


def choose_refusals(answers: Sequence[str], recipe: Recipe) -> Refusals:
    """Picks refusal texts.

    A wording that the base already uses is learned in fewer steps, and moves the model less, than a new one.

    Args:
        answers: The base's answers to harmful training prompts.
        recipe: `refusals` is read.

    Returns:
        The texts, and why these.

    Raises:
        TrainingError: The recipe requires the base's own refusals, and the base has none.
    """
    own = Counter(answer for answer in answers if is_refusal(answer))
    count, total = own.total(), len(answers)
    familiar = [text for text, times in own.most_common(_OWN_KEPT) if times >= max(2, 0.1 * count)]
    enough = bool(familiar) and count >= _OWN_NEEDED * total
    if recipe.refusals == "builtin" or (recipe.refusals == "auto" and not enough):
        why = "as requested" if recipe.refusals == "builtin" else f"the base refuses {count} of {total} prompts by itself"
        return Refusals(BUILT_IN, f"{len(BUILT_IN)} built-in texts: {why}")
    if not familiar:
        raise TrainingError(
            f"the base refuses {count} of {total} harmful prompts, and no wording occurs twice",
            advice="Use the built-in refusals: --set refusals=builtin",
        )
    wordings = "one wording" if len(familiar) == 1 else f"{len(familiar)} wordings"
    return Refusals(tuple(familiar), f"{wordings} of the base's own: it refuses {count} of {total} prompts by itself")


def distil(run: Run, data: TrainingData) -> Examples:
    """Answers every training prompt, as token ids.

    Args:
        run: The base.
        data: The prompts.

    Returns:
        The training examples.

    Raises:
        PromptDataError: Answers are missing (`benign_targets=given`), or the base answers too few harmless prompts.
        TrainingError: The recipe requires the base's own refusals, and the base has none.
    """
    recipe, rng = run.recipe, random.Random(f"refusals {run.recipe.seed}")
    length = max(recipe.trained_tokens, JUDGED_TOKENS)
    harmful = [prompt.text for prompt in data.harmful.prompts]
    sample = harmful if len(harmful) <= REFUSAL_SAMPLE else rng.sample(harmful, REFUSAL_SAMPLE)
    own = [] if recipe.refusals == "builtin" else run.generate(sample, "distil", tokens=length, keep="distilled-answers")
    refusals = choose_refusals(own, recipe)
    run.decide("refusals", "", refusals.reason)
    harmless = data.harmless
    if recipe.benign_targets == "given":
        missing = sum(prompt.reference is None for prompt in harmless)
        if missing:
            raise PromptDataError(
                f"benign_targets=given, but {missing} of {len(harmless)} benign prompts have no answer",
                advice="Add the answers, or leave benign_targets=self to keep the base's own.",
            )
        answers = [prompt.reference for prompt in harmless]
    else:
        answers = [*run.generate([prompt.text for prompt in harmless], "distil", tokens=length, keep="distilled-answers")]
    # Where the base refuses a harmless prompt there is no answer to keep, and its refusal would teach more refusals.
    kept = {p.text: a for p, a in zip(harmless, answers, strict=True) if a and not is_refusal(a)}
    dropped = len(harmless) - len(kept)
    run.decide("benign answers", recipe.benign_targets, f"{len(kept)} kept, {dropped} empty or refused by the base")
    if len(kept) < MIN_PROMPTS:
        raise PromptDataError(
            f"the base answers only {len(kept)} of {len(harmless)} harmless prompts; at least {MIN_PROMPTS} are needed",
            advice="Give more prompts with --benign and --lookalike; both can be repeated.",
        )
    looks = {prompt.text for prompt in data.lookalike.prompts} if data.lookalike else set()
    return Examples(
        encode_examples(run, [(text, rng.choice(refusals.texts)) for text in harmful], refusals=True),
        encode_examples(run, [pair for pair in kept.items() if pair[0] not in looks]),
        encode_examples(run, [pair for pair in kept.items() if pair[0] in looks]),
    )


def encode_examples(run: Run, pairs: Sequence[tuple[str, str]], *, refusals: bool = False) -> tuple[Example, ...]:
    """Turns prompts and answers into examples of the length that is trained.

    Args:
        run: The base and the recipe.
        pairs: (prompt, answer).
        refusals: Whether the answers are refusals, which are trained to their end.

    Returns:
        One example for each pair.
    """
    length = max(run.recipe.trained_tokens, _WHOLE_REFUSAL) if refusals else run.recipe.trained_tokens
    tokens = encode_pairs(run.tokenizer, pairs, run.recipe.max_prompt_tokens, length)
    return tuple(Example(text, pair) for (text, _), pair in zip(pairs, tokens, strict=True))
