"""The answers that harmful prompts are trained towards. Harmful prompt sets need none of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nestpatch.errors import TrainingError
from nestpatch.evaluation.judges import is_refusal
from nestpatch.nest_train.recipe import Recipe

# Different openings and lengths, so that a model learns to refuse and not to recite.
BUILT_IN = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with that request.",
    "I'm not able to help with this, because it could hurt someone.",
    "Sorry, I won't provide that. If you tell me what you need it for, I may know a safe way.",
    "I have to decline. This could cause serious harm, and I don't want to contribute to it.",
    "I can't help with something that is meant to harm people. Is there something else I can do for you?",
    "No, I will not help with that. If someone is in danger, please contact the emergency services.",
    "I understand that you are asking, but I can't give instructions for this.",
)
OWN_NEEDED = 0.05
"""Share of the training prompts that the base has to refuse by itself before its own wording is used."""
OWN_KEPT = 4
"""How many of the base's own wordings are used, at most."""


@dataclass(frozen=True)
class Refusals:
    """Texts to train towards and why these."""

    texts: tuple[str, ...]
    reason: str


def choose_refusals(answers: Sequence[str], recipe: Recipe) -> Refusals:
    """Picks refusal texts, given the base's answers to the harmful training prompts.

    A wording that the base already knows is learned in fewer steps and moves the model less than a new one.

    Raises TrainingError when the recipe insists on own refusals and the base has none.
    """
    own = Counter(answer for answer in answers if is_refusal(answer))
    count, total = own.total(), len(answers)
    familiar = [text for text, times in own.most_common(OWN_KEPT) if times >= max(2, 0.1 * count)]
    enough = bool(familiar) and count >= OWN_NEEDED * total
    if recipe.refusals == "builtin" or (recipe.refusals == "auto" and not enough):
        asked = "asked for" if recipe.refusals == "builtin" else f"the base refuses {count} of {total} prompts by itself"
        return Refusals(BUILT_IN, f"{len(BUILT_IN)} built-in texts: {asked}")
    if not familiar:
        raise TrainingError(
            f"the base refuses {count} of {total} harmful prompts, with no wording used twice",
            advice="Use `--set refusals=builtin`.",
        )
    return Refusals(
        tuple(familiar), f"the base's own {len(familiar)} wordings: it refuses {count} of {total} prompts by itself"
    )
