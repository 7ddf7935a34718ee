"""The detector of a pack: a linear probe that tells harmful prompts from harmless ones by one hidden state of the base.

`DetectorFacts` are the numbers in the manifest, `Detector` is the whole. The fields are those of docs/nest-format.md. Each
constructor checks its own object and raises PackContentError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import PackContentError
from nestpatch.rows import FloatArray
from nestpatch.values import dataclass

POOLINGS = ("last", "mean", "max")
"""How the hidden states of a prompt's tokens become one: that of the last token, their mean, or the largest of each number."""


@dataclass(frozen=True)
class DetectorFacts:
    """What the manifest says of a detector.

    Attributes:
        layer: The layer whose output is read, from 0: the residual stream after it.
        pooling: One of POOLINGS.
        bias: Added to the product of the weight and the hidden state; the sum is the score.
        threshold: A prompt whose score is above it counts as harmful.
        max_false_positive_rate: The share of harmless prompts for which the threshold was calibrated.
        auc: Area under the ROC curve on held-out prompts of the training.
        detection_rate: Share of the held-out harmful prompts above the threshold.
        false_positive_rate: Share of the held-out harmless prompts above the threshold.
        harmful: Held-out harmful prompts that were measured.
        harmless: Held-out harmless prompts that were measured.
    """

    layer: int
    pooling: str
    bias: float
    threshold: float
    max_false_positive_rate: float
    auc: float
    detection_rate: float
    false_positive_rate: float
    harmful: int
    harmless: int

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise PackContentError(f"the detector's {problem}")

    def _problems(self) -> Iterator[str]:
        for name in ("layer", "harmful", "harmless"):
            if not 0 <= (number := getattr(self, name)) < 2**31:
                yield f"{name} is out of range: {str(number)[:40]}"
        if self.pooling not in POOLINGS:
            yield f"pooling is {self.pooling[:40]!r}; known are {', '.join(POOLINGS)}"
        for name in ("bias", "threshold"):
            if not math.isfinite(getattr(self, name)):
                yield f"{name} is not finite"
        for name in ("max_false_positive_rate", "auc", "detection_rate", "false_positive_rate"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                yield f"{name} is {share}, not between 0 and 1"

    @property
    def sentence(self) -> str:
        """The detector in one line for people."""
        return (
            f"layer {self.layer}, {self.pooling} over the prompt's tokens; of held-out training prompts it detects "
            f"{self.detection_rate:.1%} of {self.harmful} harmful ones, with false alarms on {self.false_positive_rate:.1%} of "
            f"{self.harmless} harmless ones (AUC {self.auc:.3f})"
        )

    def as_json(self) -> dict[str, Any]:
        """All fields by name, as plain values."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Detector:
    """A linear probe.

    Attributes:
        facts: Where it reads, and how well it was measured.
        weight: float32 [hidden].
    """

    facts: DetectorFacts
    weight: FloatArray

    def __post_init__(self) -> None:
        shape = list(self.weight.shape)
        if self.weight.dtype != np.float32:
            raise PackContentError(f"detector:weight has dtype {self.weight.dtype}; it must be F32")
        if len(shape) != 1 or shape[0] == 0:
            raise PackContentError(f"detector:weight has shape {shape}")
        if not np.isfinite(self.weight).all():
            raise PackContentError("detector:weight holds NaN or infinity")

    def scores(self, states: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Scores prompts; one is harmful where its score is above `facts.threshold`.

        Args:
            states: The hidden states of `facts.layer`, pooled by `facts.pooling`, [prompts, hidden].

        Returns:
            The log-odds of being harmful in the training, float64 [prompts].
        """
        found: npt.NDArray[np.float64] = states.astype(np.float64) @ self.weight.astype(np.float64) + self.facts.bias
        return found
