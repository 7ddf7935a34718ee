"""The few statistics that an evaluation reports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with its 95 % Wilson score interval."""

    count: int
    total: int

    @property
    def value(self) -> float:
        """Between 0 and 1; NaN for an empty total."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927): holds its level for shares near 0 and 1, where the normal approximation does not."""
        if not self.total:
            return 0.0, 1.0
        z, n, p = 1.959963984540054, self.total, self.value
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low = 0.0 if self.count == 0 else centre - half
        high = 1.0 if self.count == n else centre + half
        return low, high

    def __add__(self, other: Share) -> Share:
        return Share(self.count + other.count, self.total + other.total)

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded to what the sample can bear."""
        low, high = self.interval
        return {
            "value": round(self.value, 4),
            "count": self.count,
            "total": self.total,
            "low": round(low, 4),
            "high": round(high, 4),
        }
