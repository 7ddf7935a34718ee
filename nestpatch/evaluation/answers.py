"""The file of answers and verdicts that `nestpatch eval --answers` writes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestpatch.errors import JudgeError
from nestpatch.evaluation.judges.keywords import KEYWORDS
from nestpatch.evaluation.judges.protocol import Judge
from nestpatch.evaluation.result import Evaluation
from nestpatch.evaluation.scores import Scores, evaluate_suites
from nestpatch.evaluation.suites import Suite
from nestpatch.files.atomic import write_bytes


def of_answered(
    suites: Sequence[Suite],
    answered: Sequence[Mapping[str, str]],
    judges: Sequence[Judge] = (KEYWORDS,),
    strengths: Sequence[float] = (1.0,),
) -> Evaluation:
    """Judges the answers that there are, after a server stopped answering or a judge failed.

    Args:
        suites: What was asked.
        answered: Prompt -> answer, of the model and then of the patched one at each strength over 0, in turn.
        judges: Who judges the answers; where one fails, the keywords do.
        strengths: Of the pack.

    Returns:
        The scores of the prompts that were answered.
    """
    try:
        model, *patched = [_scores(suites, one, judges) for one in answered]
    except JudgeError:
        judges = (KEYWORDS,)
        model, *patched = [_scores(suites, one, judges) for one in answered]
    names = tuple(judge.name for judge in judges)
    if len(strengths) > 1:
        positive = (strength for strength in strengths if strength)
        return Evaluation(model, judges=names, curve=tuple(zip(positive, patched, strict=False)))
    return Evaluation(model, patched[0] if patched else None, judges=names)


def _scores(suites: Sequence[Suite], answered: Mapping[str, str], judges: Sequence[Judge]) -> Scores:
    """The scores of the prompts that one model answered."""
    parts = []
    for suite in suites:
        kept = tuple(prompt for prompt in suite.prompts.prompts if prompt.text in answered)
        parts.append(Suite(suite.kind, dataclasses.replace(suite.prompts, prompts=kept)))
    return evaluate_suites(lambda prompts: [answered[prompt] for prompt in prompts], parts, judges)


def write_answers(evaluation: Evaluation, path: Path) -> int:
    """Writes a JSONL file with one object for each answer.

    Its names are `of` ("model" or "patched"; "ablated" and "random" without some neurons), `suite`, `prompt`, `answer`,
    `refused`, `correct`, `incoherent`, `category`, and `verdicts`: the name of each judge, and its verdict, or null where it
    was not asked.

    Those of a curve also name the strength.

    Args:
        evaluation: What was measured.
        path: The file to write.

    Returns:
        The number of answers.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = []
    named: list[tuple[dict[str, Any], Scores]] = []
    for place, (strength, scores) in enumerate(evaluation.sides):
        name: dict[str, Any] = {"of": "patched" if place else "model"}
        named.append((name | {"strength": strength} if place and evaluation.curve else name, scores))
    if (off := evaluation.ablation) is not None:
        named += [({"of": "ablated"}, off.chosen), ({"of": "random"}, off.random)]
    for name, scores in named:
        for suite in scores.suites:
            for verdict in suite.verdicts:
                said = dict(zip(evaluation.judges, verdict.verdicts, strict=True))
                row = {**name, "suite": suite.suite, **dataclasses.asdict(verdict), "verdicts": said}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
    return len(lines)
