"""The prompt sets that ship with nestpatch, written for it and released under CC0: harmful, benign and look-alike requests.

Each kind is divided into a set to train with and a set to measure with, which share no topic and no wording. The jailbreak set
puts harmful test prompts into the wrappers; nothing trains with it. sets/README.md describes the sets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import files

from nestpatch.errors import PromptDataError
from nestpatch.prompts.jailbreaks import fill, spread

PREFIX = "builtin:"
"""What the name of a built-in set begins with where a source is asked for: "builtin:harmful.test"."""
SETS = tuple(f"{kind}.{split}" for kind in ("harmful", "benign", "lookalike") for split in ("train", "test"))
JAILBREAK = "jailbreak.test"
WRAPPERS = "jailbreak.wrappers"
"""The texts that jailbreak prompts are put into."""
_PER_WRAPPER = 3


def builtin_rows(name: str) -> Iterator[dict[str, str]]:
    """Reads a built-in set.

    Args:
        name: One of SETS, JAILBREAK or WRAPPERS.

    Yields:
        Rows with "prompt", "category", "form" and "topic".

    Raises:
        PromptDataError: There is no such set.
    """
    if name == JAILBREAK:
        yield from _jailbreaks()
        return
    if name not in (*SETS, WRAPPERS):
        close = get_close_matches(name, (*SETS, JAILBREAK), 1)
        hint = f"Did you mean {PREFIX}{close[0]}? " if close else ""
        raise PromptDataError(
            f"there is no built-in set {name[:60]!r}", advice=f"{hint}The built-in sets are {', '.join((*SETS, JAILBREAK))}."
        )
    yield from _read(name)


def _read(name: str) -> Iterator[dict[str, str]]:
    text = files("nestpatch.prompts").joinpath("sets", f"{name}.jsonl").read_text("utf-8")
    for line in text.splitlines():
        yield json.loads(line)


def _jailbreaks() -> Iterator[dict[str, str]]:
    """Every wrapper around a few harmful test prompts."""
    for wrapper, inner in spread(list(_read(WRAPPERS)), list(_read("harmful.test")), _PER_WRAPPER):
        yield inner | {"prompt": fill(wrapper["prompt"], inner["prompt"]), "form": wrapper["category"]}
