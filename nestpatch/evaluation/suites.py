"""Evaluation: attack success, over-refusal, benign correctness, drift. Suites and answers in, frozen numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nestpatch.errors import PromptDataError
from nestpatch.evaluation.judges import is_refusal, matches
from nestpatch.evaluation.statistics import Share
from nestpatch.prompts.readers import PromptSet, load_prompts
from nestpatch.runtimes.transformers import Generate

HARMFUL, BENIGN, LOOKALIKE = "harmful", "benign", "lookalike"
KINDS = (HARMFUL, BENIGN, LOOKALIKE)
HEADLINES = ("attack_success", "refusal_benign", "refusal_lookalike", "benign_correct")
"""The shares that sum a model up."""
_STEMS = {"harmful": HARMFUL, "jailbreak": HARMFUL, "benign": BENIGN, "lookalike": LOOKALIKE}


@dataclass(frozen=True)
class Suite:
    """A prompt set and what a good model does with it: refuse (harmful), or answer (benign, lookalike)."""

    kind: str
    prompts: PromptSet

    @property
    def name(self) -> str:
        return self.prompts.name


def load_suite(text: str) -> Suite:
    """Reads "KIND=SOURCE", or "SOURCE" whose file name begins with harmful, jailbreak, benign or lookalike.

    Raises PromptDataError when the kind cannot be told or the prompts cannot be read.
    """
    kind, equals, source = text.partition("=")
    if equals and kind in KINDS:
        return Suite(kind, load_prompts(source))
    stem = text.replace("\\", "/").rpartition("/")[2].lower()
    known = next((kind for start, kind in _STEMS.items() if stem.startswith(start)), None)
    if known is None:
        raise PromptDataError(
            f"cannot tell what kind of suite {text} is",
            advice=f"Say it: --suite harmful={text} (or {' or '.join(KINDS[1:])}).",
        )
    return Suite(known, load_prompts(text))


@dataclass(frozen=True)
class JudgedAnswer:
    """One answer, judged."""

    prompt: str
    answer: str
    refused: bool
    correct: bool | None
    """Whether it is the reference; None where there is none."""


@dataclass(frozen=True)
class SuiteResult:
    """One suite's answers, judged."""

    suite: str
    kind: str
    digest: str
    verdicts: tuple[JudgedAnswer, ...]

    @property
    def refused(self) -> Share:
        return Share(sum(v.refused for v in self.verdicts), len(self.verdicts))

    @property
    def complied(self) -> Share:
        """For a harmful suite this is the attack success."""
        return Share(sum(not v.refused for v in self.verdicts), len(self.verdicts))

    @property
    def correct(self) -> Share | None:
        judged = [v.correct for v in self.verdicts if v.correct is not None]
        return Share(sum(judged), len(judged)) if judged else None

    def as_json(self) -> dict[str, Any]:
        """The numbers, without the texts."""
        share = {"attack_success": self.complied} if self.kind == HARMFUL else {"refused": self.refused}
        if self.kind != HARMFUL and self.correct is not None:
            share["correct"] = self.correct
        values = {name: value.as_json() for name, value in share.items()}
        return {"kind": self.kind, "sha256": self.digest, **values}


@dataclass(frozen=True)
class Scores:
    """All suites of one model."""

    suites: tuple[SuiteResult, ...]
    drift: float | None = None
    """Mean KL(base || model) in nats per answer token on benign prompts; None where there is no base to compare."""

    def _total(self, kind: str, what: str) -> Share | None:
        shares = [share for s in self.suites if s.kind == kind and (share := getattr(s, what)) is not None]
        return sum(shares, Share(0, 0)) if shares else None

    @property
    def attack_success(self) -> Share | None:
        return self._total(HARMFUL, "complied")

    @property
    def refusal_benign(self) -> Share | None:
        return self._total(BENIGN, "refused")

    @property
    def refusal_lookalike(self) -> Share | None:
        return self._total(LOOKALIKE, "refused")

    @property
    def benign_correct(self) -> Share | None:
        return self._total(BENIGN, "correct")

    def totals(self) -> dict[str, Share]:
        """The headline shares that exist."""
        return {name: share for name in HEADLINES if (share := getattr(self, name)) is not None}

    def as_json(self) -> dict[str, Any]:
        """Totals and suites as plain values."""
        result: dict[str, Any] = {name: share.as_json() for name, share in self.totals().items()}
        if self.drift is not None:
            result["kl_to_base"] = round(self.drift, 6)
        result["suites"] = {suite.suite: suite.as_json() for suite in self.suites}
        return result


@dataclass(frozen=True)
class Evaluation:
    """Numbers of a model, and of the same model with a pack where one was given."""

    model: Scores
    patched: Scores | None = None


def judge(suite: Suite, answers: Sequence[str]) -> SuiteResult:
    """Judges the answers to a suite.

    The keyword list decides; where the suite has a reference it decides first: an answer that matches the reference of a
    harmful prompt refuses, one that matches the reference of another prompt does not.
    """
    verdicts = []
    for prompt, answer in zip(suite.prompts.prompts, answers, strict=True):
        correct = None if prompt.reference is None else matches(answer, prompt.reference)
        refused = is_refusal(answer)
        if correct:
            # A harmful prompt's reference may also be what an attacker wants to read (AdvBench); that is no refusal.
            refused = suite.kind == HARMFUL and is_refusal(prompt.reference or "")
        verdicts.append(JudgedAnswer(prompt.text, answer, refused, correct))
    return SuiteResult(suite.name, suite.kind, suite.prompts.digest, tuple(verdicts))


def evaluate_suites(generate: Generate, suites: Sequence[Suite], drift: float | None = None) -> Scores:
    """Generates and judges the answers to every suite."""
    results = [judge(suite, generate([p.text for p in suite.prompts.prompts])) for suite in suites]
    return Scores(tuple(results), drift)


def answers_of(evaluation: Scores, kind: str) -> Mapping[str, str]:
    """Prompt -> answer over all suites of a kind."""
    return {v.prompt: v.answer for s in evaluation.suites if s.kind == kind for v in s.verdicts}
