"""The dose curve of a pack: attack success, refusals and drift against its strength, and the strength to use. Pure.

`Dose` is the curve, `recommend` the rule, `parse_strengths` reads what a user asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from decimal import Decimal
from typing import Any, NamedTuple

from nestpatch.errors import DataError
from nestpatch.evaluation.concerns import MAX_RISE, MIN_PROMPTS, harm_done
from nestpatch.evaluation.shares import HEADLINES, Share
from nestpatch.measured import BY_CATEGORY, is_number
from nestpatch.measured import categories as by_category
from nestpatch.patcher.plan import check_strength
from nestpatch.values import dataclass

MAX_STRENGTHS = 32
"""Strengths of a curve, at most: each costs a whole evaluation."""
_FORMS = "Write a number over 0 and at most 1.5, a list such as 0,0.5,1, or a range such as 0:1.5:0.25."
_MAX_REASON = 500
"""Characters of a stored reason that are read."""


@dataclass(frozen=True)
class DosePoint:
    """The numbers of a model with a pack at one strength. What was not measured is None.

    Attributes:
        strength: Factor of the pack's change; 0 is the model without the pack.
        attack_success: Harmful prompts that were answered.
        refusal_benign: Benign prompts that were refused.
        refusal_lookalike: Look-alike prompts that were refused.
        benign_correct: Benign prompts whose answer is the reference.
        kl_to_base: Mean KL(base || model) in nats per answer token on benign prompts.
        incoherent: Harmful prompts that were answered by broken text.
        categories: Category -> its harmful prompts that were answered; empty without categories.
    """

    strength: float
    attack_success: Share | None = None
    refusal_benign: Share | None = None
    refusal_lookalike: Share | None = None
    benign_correct: Share | None = None
    kl_to_base: float | None = None
    incoherent: Share | None = None
    categories: Mapping[str, Share] = field(default_factory=dict, hash=False)

    @classmethod
    def of(
        cls, strength: float, totals: Mapping[str, Share], kl_to_base: float | None, categories: Mapping[str, Share]
    ) -> DosePoint:
        """Makes a point of what was measured.

        Args:
            strength: Factor of the pack's change.
            totals: Name -> share, of a model's scores; names other than HEADLINES are left out.
            kl_to_base: Its drift from the base.
            categories: Its attack success by category.

        Returns:
            The point.
        """
        shares = {name: totals[name] for name in HEADLINES if name in totals}
        return cls(strength, **shares, kl_to_base=kl_to_base, categories=categories)

    @classmethod
    def from_json(cls, stored: Any) -> DosePoint | None:
        """Reads a point that a pack stores.

        Args:
            stored: Anything: packs come from anywhere.

        Returns:
            The point; None for what is not one.
        """
        if not isinstance(stored, Mapping) or not is_number(strength := stored.get("strength")) or strength < 0:
            return None
        shares = {name: Share.from_json(stored.get(name)) for name in HEADLINES}
        drift = stored.get("kl_to_base")
        categories = {row.name: Share(row.before.count, row.before.total) for row in by_category(stored, None) if row.before}
        return cls(float(strength), **shares, kl_to_base=float(drift) if is_number(drift) else None, categories=categories)

    def as_json(self) -> dict[str, Any]:
        """The point as plain values; None for what was not measured."""
        shares = {name: None if (share := getattr(self, name)) is None else share.as_json() for name in HEADLINES}
        drift = None if self.kl_to_base is None else round(self.kl_to_base, 6)
        categories = {name: share.as_json() for name, share in self.categories.items()}
        return {"strength": self.strength, **shares, BY_CATEGORY: categories, "kl_to_base": drift}


class Recommendation(NamedTuple):
    """The strength to apply a pack at.

    Attributes:
        strength: Factor of the pack's change; None where no measured strength is to be recommended.
        reason: Why, in one sentence with the numbers.
    """

    strength: float | None
    reason: str

    def as_json(self) -> dict[str, Any]:
        """Both as plain values."""
        return self._asdict()

    @classmethod
    def from_json(cls, stored: Any) -> Recommendation | None:
        """Reads a recommendation that a pack stores.

        Args:
            stored: Anything: packs come from anywhere.

        Returns:
            The recommendation, whose reason is foreign text; None for what is not one.
        """
        if not isinstance(stored, Mapping) or not isinstance(reason := stored.get("reason"), str):
            return None
        strength = stored.get("strength")
        try:
            if strength is not None:
                check_strength(strength if is_number(strength) else -1)
        except DataError:
            return None
        return cls(None if strength is None else float(strength), reason[:_MAX_REASON])


@dataclass(frozen=True)
class Dose:
    """The curve: the base, then the same model with a pack at rising strengths.

    Attributes:
        points: In the order of their strengths, which all differ; the first one has strength 0.
    """

    points: tuple[DosePoint, ...]

    @property
    def recommended(self) -> Recommendation:
        """The strength to use, by the rule of `recommend`."""
        return recommend(self.points)

    def as_json(self) -> list[dict[str, Any]]:
        """The points as plain values."""
        return [point.as_json() for point in self.points]

    @classmethod
    def from_json(cls, stored: Any) -> Dose | None:
        """Reads a curve that a pack stores.

        Args:
            stored: Anything: packs come from anywhere.

        Returns:
            The curve; None for what is not one.
        """
        if not isinstance(stored, list) or not 2 <= len(stored) <= MAX_STRENGTHS + 1:
            return None
        points = [point for one in stored if (point := DosePoint.from_json(one)) is not None]
        strengths = [point.strength for point in points]
        if len(points) < len(stored) or strengths[0] != 0 or strengths != sorted(set(strengths)):
            return None
        return cls(tuple(points))


def dose_json(dose: Dose | None) -> dict[str, Any]:
    """A curve and its recommendation, as `--json` prints them and packs store them.

    Args:
        dose: The curve; None where none was measured.

    Returns:
        "dose" and "recommended"; both None without a curve.
    """
    if dose is None:
        return {"dose": None, "recommended": None}
    return {"dose": dose.as_json(), "recommended": dose.recommended.as_json()}


def recommend(points: Sequence[DosePoint]) -> Recommendation:
    """Chooses the strength to apply a pack at.

    The rule: of the strengths that cost harmless prompts nothing that `concerns` warns of, the smallest whose attack success is
    at most MAX_RISE above the lowest of them. All strengths answer the same prompts, so a larger difference is no accident of
    the sample; intervals of few prompts would let a weak dose pass as equal.

    Args:
        points: The base, then the measured strengths in rising order.

    Returns:
        The strength and the reason. No strength where none is within the limits, where the lowest attack success is within
        chance of the base's, and where attack success or every kind of refusal was not measured.
    """
    base, *tried = points
    attacks = {point.strength: point.attack_success for point in points if point.attack_success is not None}
    if len(attacks) < len(points):
        return Recommendation(None, "attack success was not measured")
    if base.refusal_benign is None and base.refusal_lookalike is None:
        return Recommendation(None, "refusals of harmless prompts were not measured")
    harm = {point.strength: harm_done(base.as_json(), point.as_json()) for point in tried}
    over = {strength: found[0].partition(";")[0] for strength, found in harm.items() if found}
    within = [point.strength for point in tried if point.strength not in over]
    if not within:
        return Recommendation(None, f"no strength is within the limits for harmless prompts: {_first(over)}")
    best = min(within, key=lambda strength: (attacks[strength].value, strength))
    lowest, before = attacks[best], attacks[base.strength]
    if lowest.interval[1] >= before.interval[0]:
        numbers = f"{before.value:.1%} without the pack, {lowest.value:.1%} at {best:g}"
        return Recommendation(None, f"no strength within the limits lowers attack success beyond chance: {numbers}")
    chosen = next(strength for strength in within if _as_good(attacks[strength], lowest))
    return Recommendation(chosen, _reason(base, attacks[chosen], lowest, best if chosen != best else None, over))


def _as_good(share: Share, lowest: Share) -> bool:
    """Whether an attack success counts as the lowest one."""
    more = round((share.value - lowest.value) * lowest.total)  # in whole prompts: exact
    return more / lowest.total <= MAX_RISE


def _reason(base: DosePoint, chosen: Share, lowest: Share, best: float | None, over: Mapping[float, str]) -> str:
    """Why a strength was chosen; `best` is the one with the lowest attack success where that is another."""
    above = "" if best is None else f"at most {100 * MAX_RISE:g} points above "
    reason = f"attack success is {chosen.value:.1%}, {above}the lowest within the limits for harmless prompts"
    reason += "" if best is None else f" ({lowest.value:.1%} at {best:g})"
    if over:
        reason += f"; not within the limits: {', '.join(f'{strength:g}' for strength in over)} ({_first(over)})"
    if chosen.total < MIN_PROMPTS:
        reason += f"; measured on {chosen.total} harmful prompts only"
    for title, share in (("benign", base.refusal_benign), ("look-alike", base.refusal_lookalike)):
        if share is None:
            reason += f"; refusals of {title} prompts were not measured"
    return reason


def _first(over: Mapping[float, str]) -> str:
    """What the smallest strength over the limits costs."""
    strength = min(over)
    return f"at {strength:g}, {over[strength]}"


def check_strengths(strengths: Iterable[float]) -> tuple[float, ...]:
    """Checks the strengths that a pack is to be measured at.

    Args:
        strengths: Factors of the pack's change, in any order; 0 names the model without the pack.

    Returns:
        Each once, in rising order.

    Raises:
        DataError: One is not between 0 and 1.5, there are too many, or none is over 0.
    """
    found = tuple(sorted(set(strengths)))
    for strength in found:
        if strength != 0:
            check_strength(strength)
    if not any(found):
        raise DataError("strength 0 is the model without the pack", advice=f"Add a strength over 0. {_FORMS}")
    if len(found) > MAX_STRENGTHS:
        raise DataError(f"{len(found)} strengths were given; at most {MAX_STRENGTHS} are measured", advice=_FORMS)
    return found


def parse_strengths(text: str) -> tuple[float, ...]:
    """Reads the strengths that a user asks for.

    Args:
        text: Numbers and ranges START:STOP:STEP, which include STOP where a step ends on it, separated by commas.

    Returns:
        As `check_strengths`.

    Raises:
        DataError: The text has another form, or as `check_strengths`.
    """
    try:
        return check_strengths(float(number) for part in text.split(",") for number in _expanded(part))
    except (ArithmeticError, ValueError):  # of decimal; float() refuses a signalling NaN
        raise DataError(f"{text!r} names no strengths", advice=_FORMS) from None


def _expanded(part: str) -> Iterator[Decimal]:
    """The numbers of one part; decimal, so that the steps of a range add up exactly. Raises ArithmeticError, DataError."""
    numbers = [Decimal(number.strip()) for number in part.split(":")]
    if len(numbers) == 1:
        yield numbers[0]
        return
    if len(numbers) != 3 or not all(number.is_finite() for number in numbers) or numbers[2] <= 0:
        raise DataError(f"{part!r} is not a range of strengths", advice=_FORMS)
    start, stop, step = numbers
    if stop < start or (stop - start) / step >= MAX_STRENGTHS:
        raise DataError(f"{part!r} is not a range of 1 to {MAX_STRENGTHS} strengths", advice=_FORMS)
    for position in range(int((stop - start) / step) + 1):
        yield start + position * step
