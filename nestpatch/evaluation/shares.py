"""`Share`: how many of how many, with its 95 % interval; and the names of the shares that sum a model up."""

from __future__ import annotations

import math
from typing import Any

from nestpatch.measured import TITLES, StoredShare
from nestpatch.values import dataclass

HEADLINES = tuple(TITLES)
"""The shares that sum a model up."""


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with its 95 % Wilson score interval.

    Attributes:
        count: How many.
        total: Of how many.
    """

    count: int
    total: int

    @property
    def value(self) -> float:
        """Between 0 and 1; NaN for an empty total."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high). Wilson (1927): holds its level for shares near 0 and 1, where the normal approximation does not."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959963984540054, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low = 0.0 if self.count == 0 else centre - half
        high = 1.0 if self.count == n else centre + half
        return low, high

    def __add__(self, other: Share) -> Share:
        """The share over both totals."""
        return Share(self.count + other.count, self.total + other.total)

    @classmethod
    def from_json(cls, stored: Any) -> Share | None:
        """Reads a share that a pack stores.

        Args:
            stored: Anything: packs come from anywhere.

        Returns:
            The share; None for what is not one.
        """
        found = StoredShare.parse(stored)
        return None if found is None else cls(found.count, found.total)

    def as_json(self) -> dict[str, Any]:
        """Value, count, total and interval, rounded to four digits; the value of an empty total is None."""
        low, high = self.interval
        value = round(self.value, 4) if self.total else None
        return {"value": value, "count": self.count, "total": self.total, "low": round(low, 4), "high": round(high, 4)}
