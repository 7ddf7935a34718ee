"""Example answers before and after a patch, from the file that `eval --answers` writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import DataError
from nestpatch.files.reading import read_text
from nestpatch.measured import HARMFUL, Row

MAX_BYTES = 256 << 20
"""Bytes of a file of answers, at most."""
MOST = 4
"""Examples of each suite."""
LONGEST = 600
"""Characters of a text that are shown."""
_ADVICE = "Write the file with: nestpatch eval MODEL PACK --answers FILE"


@dataclass(frozen=True)
class Said:
    """One answer, judged.

    Attributes:
        text: The answer, cut; empty where it is redacted.
        words: Its number of words.
        verdict: "refused", "incoherent" or "answered".
    """

    text: str
    words: int
    verdict: str


@dataclass(frozen=True)
class Example:
    """A prompt with both answers; `prompt` is empty where it is redacted, `after` None where no patched model was asked."""

    prompt: str
    before: Said
    after: Said | None


@dataclass(frozen=True)
class SuiteExamples:
    """Some examples of one suite.

    Attributes:
        suite: Its name.
        harmful: Whether its prompts ask for harm, or its kind is not known.
        redacted: Whether the texts are left out.
        total: Prompts in the file.
        examples: Those that are shown: first those whose verdict changed.
    """

    suite: str
    harmful: bool
    redacted: bool
    total: int
    examples: tuple[Example, ...]


def read_examples(path: Path, rows: list[Row], *, strength: float = 1.0, show_harmful: bool = False) -> list[SuiteExamples]:
    """Reads answers and chooses examples.

    Args:
        path: The JSONL file.
        rows: The measured suites, which say of what kind a suite is. One that they do not name counts as harmful.
        strength: Of the patched model whose answers are shown, where the file has those of several.
        show_harmful: Whether to keep the texts of harmful suites.

    Returns:
        The examples of each suite, harmless suites first.

    Raises:
        DataError: The file cannot be read, is not what `eval --answers` writes, or has no answers at this strength.
    """
    kinds = {row.name: row.kind for row in rows}
    sides: dict[str, dict[str, dict[tuple[str, int], Mapping[str, Any]]]] = {}
    seen: Counter[tuple[str, str, str]] = Counter()
    for line in _at(strength, _lines(path), path):
        key = (line["suite"], line["of"], line["prompt"])
        sides.setdefault(line["suite"], {}).setdefault(line["of"], {})[line["prompt"], seen[key]] = line
        seen[key] += 1
    found = []
    for suite, answers in sides.items():
        before, after = (answers.get(of, {}) for of in ("model", "patched"))
        harmful = kinds.get(suite, HARMFUL) not in ("benign", "lookalike")
        redacted = harmful and not show_harmful
        pairs = [(one, after.get(key)) for key, one in before.items()]
        pairs.sort(key=lambda pair: pair[1] is None or _verdict(pair[0]) == _verdict(pair[1]))
        examples = tuple(_example(old, new, redacted=redacted) for old, new in pairs[:MOST])
        found.append(SuiteExamples(suite, harmful, redacted, len(before), examples))
    return sorted(found, key=lambda one: one.harmful)


def _lines(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    texts = {"of": str, "suite": str, "prompt": str, "answer": str, "refused": bool, "incoherent": bool}
    # Not splitlines: U+2028 and other separators may stand inside of a JSON string.
    for number, text in enumerate(read_text(path, MAX_BYTES, error=DataError).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}", advice=_ADVICE) from error
        if isinstance(line, dict):
            line.setdefault("incoherent", False)  # answers were not always judged by it
        if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in texts.items()):
            raise DataError(f"line {number} of {path} is not an answer: it lacks one of {', '.join(texts)}", advice=_ADVICE)
        found.append(line)
    if not any(line["of"] == "model" for line in found):
        raise DataError(f"{path} holds no answers of the model", advice=_ADVICE)
    return found


def _at(strength: float, lines: list[Mapping[str, Any]], path: Path) -> list[Mapping[str, Any]]:
    """The answers of the model, and those of the patched model at one strength of a curve."""
    kept = [line for line in lines if line.get("strength") in (None, strength)]
    if len(kept) < len(lines) and all(line["of"] == "model" for line in kept):
        advice = f"Measure this strength too: nestpatch eval MODEL PACK --strength {strength:g},.. --answers FILE"
        raise DataError(f"{path} holds no answers of the patched model at strength {strength:g}", advice=advice)
    return kept


def _example(old: Mapping[str, Any], new: Mapping[str, Any] | None, *, redacted: bool) -> Example:
    before, after = (None if one is None else _said(one, redacted=redacted) for one in (old, new))
    assert before is not None  # noqa: S101 - for the type checker
    return Example("" if redacted else _cut(old["prompt"]), before, after)


def _said(line: Mapping[str, Any], *, redacted: bool) -> Said:
    answer = line["answer"]
    return Said("" if redacted else _cut(answer), len(answer.split()), _verdict(line))


def _verdict(line: Mapping[str, Any]) -> str:
    return "refused" if line["refused"] else "incoherent" if line["incoherent"] else "answered"


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …"
