"""A sheet of answers for a person to judge, and the person's verdicts beside those of judges."""

from __future__ import annotations

import csv
import io
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from nestpatch.errors import PromptDataError
from nestpatch.evaluation.agreement import Agreement
from nestpatch.evaluation.judges.panel import verdicts
from nestpatch.evaluation.judges.protocol import Judge, Verdict
from nestpatch.evaluation.result import Evaluation
from nestpatch.evaluation.suites import KINDS
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import MAX_JSON, read_text
from nestpatch.measured import HARMFUL

ANSWERS = 50
"""Answers in a sheet."""
COLUMNS = ("kind", "suite", "prompt", "answer", "verdict")
_ADVICE = f"Use a sheet of `eval --label`, and fill its column verdict with {', '.join(one.value for one in Verdict)}."
_FORMULA = ("=", "+", "-", "@", "\t", "'")
"""Beginnings of cells that a spreadsheet calculates or hides; an apostrophe before them makes it text."""


@dataclass(frozen=True)
class LabelledAnswer:
    """An answer with the verdict of a person.

    Attributes:
        kind: Of its suite: harmful, benign or lookalike.
        prompt: What was asked.
        answer: What the model answered.
        verdict: Of the person.
    """

    kind: str
    prompt: str
    answer: str
    verdict: Verdict


def write_sheet(evaluation: Evaluation, path: Path, seed: int = 0) -> int:
    """Writes a CSV file of answers without their verdicts.

    The answers are drawn in turn from every suite and verdict, so that rare verdicts are in the sheet too, and shuffled.

    Args:
        evaluation: What was measured.
        path: The file to write.
        seed: Of the sample: the same answers and seed give the same sheet.

    Returns:
        The number of answers in it, 50 at most.

    Raises:
        OutputError: The file cannot be written.
    """
    strata: dict[tuple[str, bool, bool], list[tuple[str, ...]]] = defaultdict(list)
    for _, scores in evaluation.sides:
        for suite in scores.suites:
            for one in suite.verdicts:
                strata[suite.suite, one.refused, one.incoherent].append((suite.kind, suite.suite, one.prompt, one.answer))
    rng = random.Random(seed)
    drawn = [rng.sample(rows, len(rows)) for _, rows in sorted(strata.items())]
    turns = (row for turn in zip_longest(*drawn) for row in turn if row is not None)
    rows = list(dict.fromkeys(turns))[:ANSWERS]  # a model and its patched version may answer alike
    rng.shuffle(rows)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows([*("'" + cell if cell.startswith(_FORMULA) else cell for cell in row), ""] for row in rows)
    write_bytes(path, text.getvalue().encode("utf-8-sig"))  # spreadsheets recognise UTF-8 by its mark
    return len(rows)


def read_sheet(path: Path) -> tuple[list[LabelledAnswer], int]:
    """Reads a sheet that a person filled in.

    Args:
        path: A CSV file with commas or semicolons.

    Returns:
        (answers with a verdict, number of answers without one).

    Raises:
        PromptDataError: It is no such sheet, a verdict is not one, or there is none.
    """
    try:
        text = read_text(path, MAX_JSON).removeprefix("\ufeff")
        delimiter = ";" if text.partition("\n")[0].count(";") >= len(COLUMNS) - 1 else ","
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise PromptDataError(f"the sheet {path} cannot be read: {error}", advice=_ADVICE) from error
    found = []
    for number, row in enumerate(rows, 1):
        kind, prompt, answer, verdict = (row.get(name) for name in ("kind", "prompt", "answer", "verdict"))
        if kind not in KINDS or prompt is None or answer is None or verdict is None:
            raise PromptDataError(f"answer {number} of the sheet {path} lacks a column", advice=_ADVICE)
        said = verdict.strip().lower()
        if said and said not in {one.value for one in Verdict}:
            raise PromptDataError(f"answer {number} of the sheet {path} has the verdict {verdict!r}", advice=_ADVICE)
        if said:
            found.append(LabelledAnswer(kind, _cell(prompt), _cell(answer), Verdict(said)))
    if not found:
        raise PromptDataError(f"the sheet {path} contains no verdict", advice=_ADVICE)
    return found, len(rows) - len(found)


def _cell(text: str) -> str:
    """A cell as it was before the sheet was written."""
    return text[1:] if text.startswith("'") and text[1:].startswith(_FORMULA) else text


def compare_with_person(
    labelled: Sequence[LabelledAnswer], judges: Sequence[Judge], on_event: OnEvent = ignore
) -> tuple[Agreement, ...]:
    """Compares judges with a person.

    Args:
        labelled: The answers, with the person's verdicts.
        judges: Whom to ask.
        on_event: Receives the progress.

    Returns:
        One comparison for each judge. A judge of harm is compared on the harmful prompts alone.

    Raises:
        JudgeError: A judge fails.
    """
    sides = [[one for one in labelled if (one.kind == HARMFUL) is harmful] for harmful in (True, False)]
    found = []
    for judge in judges:
        pairs: list[tuple[Verdict, Verdict]] = []
        for harmful, side in zip((True, False), sides, strict=True):
            said = verdicts([judge], [(one.prompt, one.answer) for one in side], harmful=harmful, on_event=on_event)
            pairs += [(one.verdict, verdict) for one, (verdict,) in zip(side, said, strict=True) if verdict is not None]
        found.append(Agreement(judge.name, "person", tuple(pairs)))
    return tuple(found)
