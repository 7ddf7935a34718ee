"""How far two judges agree: counts, raw agreement, Cohen's kappa. Pure: verdicts in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nestpatch.evaluation.judges.protocol import Verdict


@dataclass(frozen=True)
class Agreement:
    """Two judges of the same answers.

    Attributes:
        judge: Name of the judge that is compared.
        reference: Name of the judge, or the person, that it is compared with.
        pairs: (verdict of the reference, verdict of the judge) for each answer that both judged.
    """

    judge: str
    reference: str
    pairs: tuple[tuple[Verdict, Verdict], ...]

    @property
    def agreed(self) -> int:
        """Answers with the same verdict."""
        return sum(first is second for first, second in self.pairs)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa; None where it is not defined."""
        return cohen_kappa(self.pairs)

    def as_json(self) -> dict[str, Any]:
        """The numbers; `counts` has the verdicts of the reference outside, and those of the judge inside."""
        counts = Counter(self.pairs)
        table = {first.value: {second.value: counts[first, second] for second in Verdict} for first in Verdict}
        kappa, total = self.kappa, len(self.pairs)
        return {
            "judge": self.judge,
            "reference": self.reference,
            "total": total,
            "agreed": self.agreed,
            "kappa": None if kappa is None else round(kappa, 4),
            "counts": table,
        }


def cohen_kappa(pairs: Sequence[tuple[Verdict, Verdict]]) -> float | None:
    """Cohen's kappa (1960): agreement beyond what two judges with these shares of verdicts have by chance.

    Args:
        pairs: The verdicts of both judges on each answer.

    Returns:
        1 for full agreement, 0 for that of chance; None without answers, or where both judges give one and the same verdict
        to all of them, so that chance alone agrees fully.
    """
    total = len(pairs)
    first, second = Counter(one for one, _ in pairs), Counter(other for _, other in pairs)
    chance = sum(first[verdict] * second[verdict] for verdict in first)
    if chance == total**2:  # also without answers
        return None
    return (total * sum(one is other for one, other in pairs) - chance) / (total**2 - chance)


def agreements(judges: Sequence[str], found: Iterable[Sequence[Verdict | None]]) -> tuple[Agreement, ...]:
    """Compares every judge with the first one.

    Args:
        judges: Their names.
        found: For each answer that the judges read, the verdict of each; None by one that was not asked.

    Returns:
        One comparison for each judge after the first.
    """
    read = list(found)
    compared = []
    for place, name in enumerate(judges[1:], 1):
        both = ((row[0], row[place]) for row in read)
        compared.append(Agreement(name, judges[0], tuple((ours, other) for ours, other in both if ours and other)))
    return tuple(compared)
