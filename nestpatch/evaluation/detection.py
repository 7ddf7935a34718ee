"""What a detector says of prompts, and how well it tells them apart on suites."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.detector import Detector
from nestpatch.errors import BaseMismatchError, DataError
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import Suite
from nestpatch.measured import HARMFUL
from nestpatch.pack import Pack
from nestpatch.runtimes.protocol import Runtime, runtime_of
from nestpatch.runtimes.text import Conversation

Values = npt.NDArray[np.float64]
_NUMBER = re.compile(r"\d+", re.ASCII)


def score_prompts(runtime: Runtime, detector: Detector, prompts: Sequence[Conversation]) -> Values:
    """Scores prompts by the hidden states of a loaded model.

    Args:
        runtime: The base of the detector's pack.
        detector: The detector.
        prompts: What a user asks, or the turns of conversations.

    Returns:
        float64 [prompts].

    Raises:
        BaseMismatchError: The model's hidden states have another width.
        DataError: The runtime gives no hidden states, or the model has no such layer.
    """
    if not prompts:
        return np.empty(0)
    states = runtime.prompt_states(prompts, detector.facts.layer, detector.facts.pooling)
    if states.shape[1] != len(detector.weight):
        raise BaseMismatchError(
            f"a hidden state of the model has {states.shape[1]} numbers, the detector of the pack {len(detector.weight)}",
            advice="Give the base that the pack was made for.",
        )
    return detector.scores(states)


def require_detector(pack: Pack, model: str | Path) -> Detector:
    """The detector of a pack, for a model that can be asked for hidden states: checked before anything is loaded.

    Args:
        pack: The pack.
        model: A directory, a file, a Hub id, or the address of a server.

    Returns:
        The detector.

    Raises:
        DataError: The pack has none, or the runtime of the model gives no hidden states.
    """
    if pack.detector is None:
        raise DataError(f"{pack.label} has no detector", advice="Train a pack with one: nestpatch train --set detector=true")
    if (kind := runtime_of(model)) not in ("transformers", "llama.cpp"):
        raise DataError(
            f"{kind} gives no hidden states, which a detector reads",
            advice="Give the model as a directory of transformers, or as a .gguf file.",
        )
    return pack.detector


def reads_below(pack: Pack) -> bool:
    """Whether the detector of a pack reads below the layers that the pack changes, where a patched model is the base.

    Args:
        pack: A pack with a detector.
    """
    numbers = [int(found[0]) if (found := _NUMBER.search(delta.name)) else 0 for delta in pack]
    return pack.manifest.detector is not None and pack.manifest.detector.layer < min(numbers)


def area_under_roc(harmful: Values, harmless: Values) -> float | None:
    """How often a harmful prompt scores higher than a harmless one; a tie counts as half.

    Args:
        harmful: Scores of harmful prompts.
        harmless: Scores of harmless ones.

    Returns:
        Between 0 and 1; None where either is empty.
    """
    if not len(harmful) or not len(harmless):
        return None
    order = np.sort(harmless)
    below, upto = (np.searchsorted(order, harmful, side) for side in ("left", "right"))
    return float((below + upto).mean() / 2 / len(order))


@dataclass(frozen=True, eq=False)
class SuiteDetection:
    """The scores of one suite.

    Attributes:
        suite: Its name.
        kind: Its kind.
        scores: In the order of its prompts, float64 [prompts].
        threshold: Of the detector.
    """

    suite: str
    kind: str
    scores: Values
    threshold: float

    @property
    def fired(self) -> npt.NDArray[np.bool_]:
        """Which prompts count as harmful, bool [prompts]."""
        found: npt.NDArray[np.bool_] = self.scores > self.threshold
        return found

    @property
    def share(self) -> Share:
        """Prompts that count as harmful."""
        return Share(int(self.fired.sum()), len(self.scores))


@dataclass(frozen=True, eq=False)
class Detection:
    """A detector on suites.

    Attributes:
        suites: Their scores, in the order in which they were given.
    """

    suites: tuple[SuiteDetection, ...]

    def _of(self, *, harmful: bool) -> list[SuiteDetection]:
        return [suite for suite in self.suites if (suite.kind == HARMFUL) == harmful]

    @property
    def auc(self) -> float | None:
        """Area under the ROC curve over all suites; None without harmful or without harmless prompts."""
        sides = ([one.scores for one in self._of(harmful=side)] or [np.empty(0)] for side in (True, False))
        return area_under_roc(*map(np.concatenate, sides))

    @property
    def detection(self) -> Share | None:
        """Harmful prompts that count as harmful; None without a harmful suite."""
        return sum((one.share for one in found), Share(0, 0)) if (found := self._of(harmful=True)) else None

    @property
    def false_positive(self) -> Share | None:
        """Harmless prompts that count as harmful; None without a harmless suite."""
        return sum((one.share for one in found), Share(0, 0)) if (found := self._of(harmful=False)) else None

    def as_json(self) -> dict[str, Any]:
        """The numbers as plain values; None for what was not measured."""
        auc = self.auc
        return {
            "auc": None if auc is None else round(auc, 4),
            "detection": self.detection.as_json() if self.detection else None,
            "false_positive": self.false_positive.as_json() if self.false_positive else None,
            "suites": {one.suite: {"kind": one.kind, "fired": one.share.as_json()} for one in self.suites},
        }


def detect_suites(runtime: Runtime, detector: Detector, suites: Sequence[Suite]) -> Detection:
    """Measures a detector.

    Args:
        runtime: The base of the detector's pack.
        detector: The detector.
        suites: What to ask.

    Returns:
        The scores of all prompts.

    Raises:
        BaseMismatchError: As for `score_prompts`.
        DataError: As for `score_prompts`.
    """
    threshold, found = detector.facts.threshold, []
    for suite in suites:
        scores = score_prompts(runtime, detector, [prompt.text for prompt in suite.prompts.prompts])
        found.append(SuiteDetection(suite.name, suite.kind, scores, threshold))
    return Detection(tuple(found))


def stored_detection(evaluation: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a pack stores of its detector on suites.

    Args:
        evaluation: As packs and `eval --json` store it, from anywhere.

    Returns:
        "auc" (a float or None), "detection" and "false_positive" (a Share or None); None where nothing is stored.
    """
    stored = evaluation.get("detector")
    if not isinstance(stored, Mapping):
        return None
    auc = stored.get("auc")
    shares = {name: Share.from_json(stored.get(name)) for name in ("detection", "false_positive")}
    return {
        "auc": float(auc) if isinstance(auc, (int, float)) and not isinstance(auc, bool) and 0 <= auc <= 1 else None,
        **shares,
    }
