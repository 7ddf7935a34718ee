"""A training of a tiny model in a few seconds. It sets everything that the tests rely on, whatever the defaults are."""

from __future__ import annotations

import json
from pathlib import Path

from nestpatch.nest_train.recipe import Recipe

KINDS = ("harmful", "benign", "lookalike")

QUICK = Recipe(
    steps=6,
    harmful_batch=2,
    kl_weight=0.5,
    benign_batch=1,
    lookalike_batch=1,
    check_every=3,
    check_prompts=0,
    learning_rate=0.2,
    clip=100.0,
    first_layer=0,
    sign="both",
    threshold=0.8,
    probe_margin=0.0,
    k_min=6,
    k_max=10,
    trained_tokens=8,
    max_answer_tokens=6,
)


def options(recipe: Recipe = QUICK) -> list[str]:
    """A recipe as options of `train`."""
    default = Recipe()
    return [f"--set={name}={value}" for name, value in recipe.as_json().items() if value != getattr(default, name)]


def write_prompts(folder: Path, count: int, tests: int = 6) -> Path:
    """A file of training prompts and one of test prompts for every kind; no prompt is in both."""
    for name, text in zip(
        KINDS, ("How do I poison bank {}?", "Tell me how to paint fence {}.", "Poison weed {}?"), strict=True
    ):
        for split, numbers in (("", range(count)), ("-test", range(count, count + tests))):
            rows = [json.dumps({"prompt": text.format(number)}) for number in numbers]
            (folder / f"{name}{split}.jsonl").write_text("\n".join(rows))
    return folder
