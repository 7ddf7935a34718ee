"""How far apart harmful and harmless prompts are in each neuron: closed forms of running sums, which need no fit. Pure.

Source: SafeNeuron (arXiv 2602.12158), the sets ES (effect size) and SAS (safety activation shift); GateBreaker (arXiv
2512.21008) uses the second inside of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
_SMALLEST = 1e-8
"""A spread below it is that of a constant."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and spread of each neuron over prompts, which are added up batch by batch.

    Attributes:
        count: Prompts.
        mean: float64 [neurons].
        squares: The sum of squared distances from the mean, float64 [neurons].
    """

    count: int
    mean: npt.NDArray[np.float64]
    squares: npt.NDArray[np.float64]

    @classmethod
    def of(cls, acts: npt.NDArray[np.floating[Any]]) -> Moments:
        """The moments of some prompts.

        Args:
            acts: [prompts, neurons], at least one prompt.
        """
        exact = acts.astype(np.float64)
        mean = exact.mean(axis=0)
        return cls(len(acts), mean, ((exact - mean) ** 2).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both, without a difference of large sums (Chan, Golub and LeVeque 1979)."""
        count, distance = self.count + other.count, other.mean - self.mean
        mean = self.mean + distance * (other.count / count)
        return Moments(count, mean, self.squares + other.squares + distance**2 * (self.count * other.count / count))


def cohens_d(harmful: Moments, harmless: Moments) -> FloatArray:
    """The effect size: the difference of the means in pooled standard deviations.

    Args:
        harmful: Over harmful prompts.
        harmless: Over harmless prompts; at least three prompts together.

    Returns:
        float32 [neurons]; 0 for constant neurons.
    """
    spread = np.sqrt((harmful.squares + harmless.squares) / (harmful.count + harmless.count - 2))
    difference = harmful.mean - harmless.mean
    return np.where(spread > _SMALLEST, difference / np.maximum(spread, _SMALLEST), 0.0).astype(np.float32)


def shift(harmful: Moments, harmless: Moments) -> FloatArray:
    """The activation shift: the difference of the means, scaled to mean 0 and standard deviation 1 over the neurons.

    Args:
        harmful: Over harmful prompts.
        harmless: Over harmless prompts.

    Returns:
        float32 [neurons]; 0 for neurons that do not respond more to harmful prompts.
    """
    difference = harmful.mean - harmless.mean
    z = (difference - difference.mean()) / max(float(difference.std()), _SMALLEST)
    return np.where(difference > 0, z, 0.0).astype(np.float32)
