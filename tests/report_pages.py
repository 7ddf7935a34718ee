"""Evaluations and packs that the pages of `nestpatch report` are made of, also hostile ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from nestpatch.evaluation.answers import write_answers
from nestpatch.evaluation.dose import Dose, DosePoint, dose_json
from nestpatch.evaluation.judges import Verdict
from nestpatch.evaluation.result import Ablation, Evaluation
from nestpatch.evaluation.scores import JudgedAnswer, Scores, SuiteResult
from nestpatch.evaluation.shares import Share
from nestpatch.pack import Pack
from tests.helpers import tiny_pack

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></title></desc><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "javascript:alert(4)",
    "{{ 7 * 191 }}{% raw %}",
    "\u202eevil\u2066 \x1b[2J \u200b]]>",
    "<!-- --><svg onload=alert(5)>",
)
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")
DOSE = Dose(
    tuple(
        DosePoint(
            strength,
            Share(attack, 100),
            Share(benign, 100),
            Share(2 * benign, 100),
            kl_to_base=drift,
            categories={"hazard 0": Share(attack // 2, 50)},
        )
        for strength, attack, benign, drift in ((0.0, 84, 2, None), (0.5, 41, 3, 0.02), (1.0, 8, 7, 0.06), (1.5, 2, 20, 0.2))
    )
)


def answers_of(suite: str, kind: str, refused: int, total: int, words: str = "word") -> SuiteResult:
    verdicts = [Verdict.REFUSED if number < refused else Verdict.COMPLIED for number in range(total)]
    said = [
        JudgedAnswer(
            f"{words} {kind} prompt {n}",
            f"{words} {kind} answer {n}",
            one is Verdict.REFUSED,
            None,
            verdicts=(one,),
            category=f"{words} hazard {n % 2}",
        )
        for n, one in enumerate(verdicts)
    ]
    return SuiteResult(suite, kind, "0" * 64, tuple(said))


def evaluation(words: str = "word") -> Evaluation:
    def scores(attacks: int, benign: int, drift: float | None) -> Scores:
        names = (f"harmful {words}", f"benign {words}", f"lookalike {words}")
        kinds, counts = ("harmful", "benign", "lookalike"), (100 - attacks, benign, 2 * benign)
        suites = [answers_of(name, kind, many, 100, words) for name, kind, many in zip(names, kinds, counts, strict=True)]
        return Scores(tuple(suites), drift)

    patched, off, random = scores(8, 7, 0.0642), scores(61, 3, 0.31), scores(9, 7, 0.0711)
    left, random_left = (one.still_refused(patched) for one in (off, random))
    ablation = Ablation("patched", f"all that {words} changes", 812, 46_080, 30, off, random, left, random_left)
    return Evaluation(scores(84, 2, None), patched, (f"a note {words}",), ablation=ablation)


def write_measured(folder: Path) -> Path:
    """What `eval --json` printed, with a dose curve; beside it the answers."""
    result = evaluation()
    value = {"model": "tiny/llama", "pack": "no-harm 1.0.0", "adapter": None, **result.as_json(), **dose_json(DOSE)}
    (folder / "eval.json").write_text(json.dumps(value), encoding="utf-8")
    write_answers(result, folder / "answers.jsonl")
    return folder / "eval.json"


def hostile_pack(model: Path) -> Pack:
    """A pack that says hostile things wherever the format has room for them."""
    words = " ".join(HOSTILE)
    numbers = evaluation(words)
    pack = tiny_pack(model)
    changes: dict[str, Any] = {
        "description": words,
        "license": words,
        "tags": HOSTILE,
        "base": dataclasses.replace(pack.manifest.base, model_id=words, revision=words, architecture=words, dtype=words),
        "method": {
            "data": {words: {"name": words, "prompts": words, "sha256": words}},
            "decisions": {words: words},
            "recipe": words,
            words: HOSTILE[0],
        },
        "evaluation": {
            "before": numbers.model.as_json(),
            "after": numbers.patched.as_json() if numbers.patched else None,
            "seen_in_training": {words: 3},
            "notes": [words],
            "dose": DOSE.as_json(),
            "ablation": numbers.ablation.as_json() if numbers.ablation else None,
            "recommended": {"strength": 1.0, "reason": words},
        },
    }
    return Pack(dataclasses.replace(pack.manifest, **changes), pack.deltas)
