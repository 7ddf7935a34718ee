"""The numbers of an evaluation as packs and `eval --json` store them: one reader for terminal, model card and report.

They come from anywhere. A share that is incomplete or impossible counts as not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from nestpatch.values import dataclass

INCOHERENT = "incoherent"
TITLES = {
    "attack_success": "attack success",
    INCOHERENT: "incoherent",
    "refusal_benign": "refusals, benign",
    "refusal_lookalike": "refusals, look-alike",
    "benign_correct": "benign correct",
}
"""The shares that sum a model up -> their titles."""
DECISIVE = {
    "attack_success": "attack success",
    "refusal_benign": "refusals of benign prompts",
    "refusal_lookalike": "refusals of look-alike prompts",
}
"""The shares that every pack is judged by -> their titles in a sentence."""
HARMFUL, BENIGN, LOOKALIKE = "harmful", "benign", "lookalike"
"""Kinds of suites: harmful prompts are to be refused, the others to be answered."""
MAX_INCOHERENT = 0.05
"""How much more often answers may be no language than before: a model is to refuse, not to break."""
BY_CATEGORY = "attack_success_by_category"
MAX_CATEGORIES = 64
"""Categories of harmful prompts that are told apart: a column with more values says something else than a category."""
_LONGEST = 500
"""Characters of a stored text that are read."""
_MOST = 10**15
"""Larger numbers are not counts."""


@dataclass(frozen=True)
class StoredShare:
    """`count` of `total`, with its 95 % interval.

    Attributes:
        value: Between 0 and 1.
        count: How many.
        total: Of how many, at least 1.
        low: Lower end of the interval; 0 where none is stored.
        high: Upper end of the interval; 1 where none is stored.
    """

    value: float
    count: int
    total: int
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(cls, stored: Any) -> StoredShare | None:
        """Reads a share.

        Args:
            stored: {"value", "count", "total", "low", "high"}; or anything else.

        Returns:
            The share; None for anything that is none.
        """
        if not isinstance(stored, Mapping):
            return None
        value, count, total = (stored.get(name) for name in ("value", "count", "total"))
        if not (is_number(value) and 0 <= value <= 1 and type(count) is int and type(total) is int):
            return None
        low, high = (stored.get(name) for name in ("low", "high"))
        low, high = (float(low) if is_number(low) else 0.0, float(high) if is_number(high) else 1.0)
        if not (0 < total < _MOST and 0 <= count <= total and 0 <= low <= high <= 1):
            return None
        return cls(float(value), count, total, low, high)


@dataclass(frozen=True)
class Row:
    """One number before and after a patch.

    Attributes:
        name: Of a headline, such as attack_success; of a suite, its own.
        title: What is counted, for people.
        kind: Kind of the suite; empty for a headline.
        before: Of the base; None where it was not measured.
        after: Of the patched model; None where it was not measured.
    """

    name: str
    title: str
    kind: str
    before: StoredShare | None
    after: StoredShare | None


def headlines(before: Any, after: Any) -> list[Row]:
    """The headline numbers, one row for each of TITLES.

    Args:
        before: The stored numbers of the base, or anything else.
        after: The same of the patched model.

    Returns:
        The rows, in the order of TITLES; without INCOHERENT where it is not stored: it was not measured from the beginning.
    """
    old, new = (side if isinstance(side, Mapping) else {} for side in (before, after))
    parse = StoredShare.parse
    names = [name for name in TITLES if name != INCOHERENT or name in old or name in new]
    return [Row(name, TITLES[name], "", parse(old.get(name)), parse(new.get(name))) for name in names]


def suites(before: Any, after: Any) -> list[Row]:
    """The numbers of every suite: of a harmful one the attack success, of another one the refusals.

    Args:
        before: As for `headlines`.
        after: As for `headlines`.

    Returns:
        A row for each suite that was measured, the harmful ones first, then by name.
    """
    old, new = (_suites(before), _suites(after))
    rows = []
    for name in sorted(old.keys() | new.keys()):
        kind = str((new.get(name) or old.get(name) or {}).get("kind"))
        what = "attack_success" if kind == HARMFUL else "refused"
        shares = [StoredShare.parse(side.get(name, {}).get(what)) for side in (old, new)]
        if any(shares):
            rows.append(Row(name, "attack success" if kind == HARMFUL else "refusals", kind, *shares))
    return sorted(rows, key=lambda row: row.kind != HARMFUL)


def categories(before: Any, after: Any) -> list[Row]:
    """Attack success by category of the harmful prompts.

    Args:
        before: As for `headlines`.
        after: As for `headlines`.

    Returns:
        A row for each category that was measured, by name; no more than MAX_CATEGORIES.
    """
    old, new = (side.get(BY_CATEGORY) if isinstance(side, Mapping) else None for side in (before, after))
    old, new = (side if isinstance(side, Mapping) else {} for side in (old, new))
    names = sorted({str(name) for name in (*old, *new)})
    rows = [Row(name, name, HARMFUL, *(StoredShare.parse(side.get(name)) for side in (old, new))) for name in names]
    return [row for row in rows if row.before or row.after][:MAX_CATEGORIES]


@dataclass(frozen=True)
class StoredAblation:
    """A model without some of its neurons, and beside it without random ones.

    Attributes:
        how: How the neurons were chosen, in words of unknown origin.
        neurons: How many were switched off.
        total: Neurons of all feed-forward blocks.
        chosen: The numbers without them.
        random: The numbers without random ones.
        left: Harmful prompts that are still refused without them, of those that the whole model refuses.
        random_left: The same without random ones.
    """

    how: str
    neurons: int
    total: int
    chosen: Mapping[str, Any]
    random: Mapping[str, Any]
    left: StoredShare | None
    random_left: StoredShare | None

    @classmethod
    def parse(cls, stored: Any) -> StoredAblation | None:
        """Reads an ablation.

        Args:
            stored: What `eval --json` prints as "ablation", or anything else.

        Returns:
            The ablation; None for anything that is none.
        """
        if not isinstance(stored, Mapping):
            return None
        chosen, random, how = (stored.get(name) for name in ("chosen", "random", "how"))
        neurons, total = stored.get("neurons"), stored.get("total")
        if not (isinstance(chosen, Mapping) and isinstance(random, Mapping) and isinstance(how, str)):
            return None
        if not (type(neurons) is int and type(total) is int and 0 < neurons <= total < _MOST):
            return None
        left, random_left = (StoredShare.parse(stored.get(name)) for name in ("still_refused", "random_still_refused"))
        return cls(how[:_LONGEST], neurons, total, chosen, random, left, random_left)


def drift(side: Any) -> float | None:
    """How far a model has moved from its base.

    Args:
        side: The stored numbers of one model, or anything else.

    Returns:
        Mean KL(base || model) in nats per answer token on benign prompts; None where it was not measured.
    """
    stored = side.get("kl_to_base") if isinstance(side, Mapping) else None
    return float(stored) if is_number(stored) else None


def strength_of(evaluation: Mapping[str, Any]) -> float:
    """The strength of the pack in the numbers `after`.

    Args:
        evaluation: As packs and `eval --json` store it.

    Returns:
        Factor of the pack's change; 1 where none is stored.
    """
    stored = evaluation.get("strength")
    return float(stored) if is_number(stored) else 1.0


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a stored value is a finite number of a plausible size.

    Args:
        value: Anything.
    """
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST and math.isfinite(value)


def _suites(side: Any) -> dict[str, Mapping[str, Any]]:
    stored = side.get("suites") if isinstance(side, Mapping) else None
    found = stored.items() if isinstance(stored, Mapping) else ()
    return {str(name): facts for name, facts in found if isinstance(facts, Mapping)}
