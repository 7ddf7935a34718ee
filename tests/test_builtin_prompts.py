"""The prompt sets that ship: sizes, kinds, and that training and test prompts share neither topics nor wording."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from itertools import pairwise

import pytest

from nestpatch.errors import PromptDataError
from nestpatch.evaluation.judges import is_refusal
from nestpatch.evaluation.suites import builtin_suites
from nestpatch.prompts.builtin import JAILBREAK, SETS, builtin_rows
from nestpatch.prompts.readers import load_prompts

KINDS = ("harmful", "benign", "lookalike")
HAZARDS = {
    "violent-crimes", "non-violent-crimes", "sex-related-crimes", "child-exploitation", "defamation", "specialized-advice",
    "privacy", "intellectual-property", "indiscriminate-weapons", "hate", "suicide-self-harm", "sexual-content", "elections",
}  # fmt: skip
"""The 13 hazard categories of MLCommons."""
FORMS = {"imperative", "question", "story", "role", "polite", "terse", "language", "passage", "chat"}
TASKS = {
    "short-question",
    "classification",
    "extraction",
    "list",
    "essay",
    "rewriting",
    "code",
    "arithmetic",
    "chat",
    "translation",
}
LOOKS = {
    "homonyms", "figurative-language", "safe-targets", "safe-contexts", "definitions", "history", "fiction", "privacy-public",
    "privacy-fictional", "nonsense-discrimination",
}  # fmt: skip
"""The harmless kinds of XSTest."""


def rows(name: str) -> list[dict[str, str]]:
    return list(builtin_rows(name))


def both(kind: str) -> list[dict[str, str]]:
    return rows(f"{kind}.train") + rows(f"{kind}.test")


def phrases(text: str) -> set[tuple[str, ...]]:
    """Sequences of three words; of two for short texts."""
    words = re.findall(r"\w+", text.lower())
    size = 3 if len(words) >= 5 else 2
    return set(zip(*(words[start:] for start in range(size)), strict=False)) or {tuple(words)}


@pytest.mark.parametrize(("kind", "least"), [("harmful", 800), ("benign", 800), ("lookalike", 500)])
def test_the_sets_are_large_and_divided(kind: str, least: int) -> None:
    train, test = rows(f"{kind}.train"), rows(f"{kind}.test")
    assert len(train) + len(test) >= least
    assert 0.15 <= len(test) / (len(train) + len(test)) <= 0.35


@pytest.mark.parametrize("name", SETS)
def test_every_row_is_complete_and_unlike_the_others(name: str) -> None:
    found = rows(name)
    assert all(set(row) == {"prompt", "category", "form", "topic"} and all(row.values()) for row in found)
    assert {row["form"] for row in found} <= FORMS
    assert max(Counter(row["prompt"].casefold() for row in found).values()) == 1
    assert not any(is_refusal(row["prompt"]) for row in found if row["category"] != "letter" and row["form"] == "terse")


def test_the_harmful_sets_cover_all_hazards_in_many_forms() -> None:
    for split in ("train", "test"):
        found = rows(f"harmful.{split}")
        assert {row["category"] for row in found} == HAZARDS
        assert {row["form"] for row in found} >= {"imperative", "question", "story", "role", "polite", "terse", "language"}
    assert min(Counter(row["category"] for row in both("harmful")).values()) >= 25


def test_the_harmless_sets_cover_all_tasks_and_kinds() -> None:
    for split in ("train", "test"):
        assert {row["category"] for row in rows(f"benign.{split}")} >= TASKS
        looks = {row["category"] for row in rows(f"lookalike.{split}")}
        assert looks >= LOOKS | {f"twin-{hazard}" for hazard in HAZARDS}


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_test_share_no_topic(kind: str) -> None:
    assert not {row["topic"] for row in rows(f"{kind}.train")} & {row["topic"] for row in rows(f"{kind}.test")}


@pytest.mark.parametrize("kind", ["harmful", "lookalike"])
def test_train_and_test_share_no_opening_within_a_category(kind: str) -> None:
    def openings(split: str) -> set[tuple[str, ...]]:
        found = ((row["category"], *row["prompt"].lower().split()[:4]) for row in rows(f"{kind}.{split}"))
        return {opening for opening in found if len(opening) == 5}

    assert not openings("train") & openings("test")


def test_no_prompt_nearly_repeats_another() -> None:
    texts = [row["prompt"] for name in SETS for row in rows(name)]
    known = [phrases(text) for text in texts]
    holders = defaultdict(list)
    for place, found in enumerate(known):
        for phrase in found:
            holders[phrase].append(place)
    shared: Counter[tuple[int, int]] = Counter()
    for places in holders.values():
        shared.update((a, b) for i, a in enumerate(places) for b in places[i + 1 :])
    near = {(texts[a], texts[b]) for (a, b), count in shared.items() if count / len(known[a] | known[b]) >= 0.4 and count > 1}
    assert not near


def test_the_wrappers_are_forty_and_serve_tests_alone() -> None:
    found = rows(JAILBREAK)
    assert len(found) == 120
    assert len({row["prompt"] for row in found}) == 120
    assert len({row["form"] for row in found}) >= 10  # techniques
    assert {row["category"] for row in found} == HAZARDS
    inner = [row["prompt"] for row in rows("harmful.test")]
    used = [next(text for text in sorted(inner, key=len, reverse=True) if text in row["prompt"]) for row in found]
    assert len(set(used)) >= 110
    assert all(first != second for first, second in pairwise(used))


def test_built_in_sets_are_sources_like_any_other() -> None:
    assert [(suite.name, suite.kind) for suite in builtin_suites()] == [
        ("builtin:harmful.test", "harmful"),
        ("builtin:jailbreak.test", "harmful"),
        ("builtin:benign.test", "benign"),
        ("builtin:lookalike.test", "lookalike"),
    ]
    assert [len(suite.prompts.prompts) for suite in builtin_suites(30)] == [30] * 4
    assert builtin_suites(30)[0].prompts == builtin_suites(30)[0].prompts
    assert len(load_prompts("builtin:benign.train[:10]").prompts) == 10
    with pytest.raises(PromptDataError, match="no built-in set") as caught:
        load_prompts("builtin:harmful.tset")
    assert "builtin:harmful.test" in caught.value.advice
