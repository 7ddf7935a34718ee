"""Limits for pipelines: a model passes an evaluation or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from nestpatch.errors import DataError
from nestpatch.evaluation.scores import BESIDE_BASE, Scores
from nestpatch.evaluation.shares import HEADLINES
from nestpatch.evaluation.suites import Suite
from nestpatch.measured import BENIGN, HARMFUL, LOOKALIKE

_NAMES = (*HEADLINES, *BESIDE_BASE)
_NEEDS = {"answer_agreement": ", on a benign suite", "perplexity_rise": ", on --text", "task_fall": ", on --task"}
"""What else a number that compares two models needs."""


def parse_limits(
    texts: Iterable[str],
    suites: Sequence[Suite] | None = None,
    *,
    compared: bool = False,
    texts_given: bool = False,
    tasks_given: bool = False,
) -> dict[str, float]:
    """Reads limits, and makes sure before any work that the suites measure them.

    Args:
        texts: NAME=SHARE each, with a share between 0 and 1.
        suites: What will be evaluated; None: names are not checked.
        compared: Whether a model is measured beside its base.
        texts_given: Whether the perplexity is measured.
        tasks_given: Whether tasks are run before and after a patch.

    Returns:
        Name -> share.

    Raises:
        DataError: A text is not a limit, or no suite measures its number.
    """
    limits = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            limits[name] = float(share)
        except ValueError:
            limits[name] = -1.0
        if not 0 <= limits[name] <= 1:
            raise DataError(f"{text!r} is not a limit", advice="Write NAME=SHARE, such as attack_success=0.05.")
    if suites is not None:
        kinds = {suite.kind for suite in suites}
        known = any(prompt.reference is not None for s in suites if s.kind == BENIGN for prompt in s.prompts.prompts)
        found: tuple[bool, ...] = (HARMFUL in kinds, HARMFUL in kinds, BENIGN in kinds, LOOKALIKE in kinds, known)
        found += (compared and BENIGN in kinds, compared and texts_given, compared and tasks_given)
        _require_measured(limits, [name for name, measured in zip(_NAMES, found, strict=True) if measured])
    return limits


def _require_measured(names: Iterable[str], measured: Sequence[str]) -> None:
    """Raises DataError for names that were not measured: a limit that is not checked must not look kept."""
    missing = sorted(set(names) - set(measured))
    if not missing:
        return
    listed = ", ".join(measured) or "nothing that a limit can be set for"
    if missing[0] in BESIDE_BASE:
        advice = f"It compares MODEL with PACK, or with --base{_NEEDS[missing[0]]}."
        raise DataError(f"{missing[0]} is not measured here", advice=advice)
    if missing[0] not in HEADLINES:
        close = get_close_matches(missing[0], _NAMES, 1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise DataError(f"{missing[0]!r} is not a number of an evaluation", advice=f"{hint}These suites measure {listed}.")
    raise DataError(f"no suite measures {missing[0]}", advice=f"These suites measure {listed}.")


def exceeded(scores: Scores, over: Mapping[str, float], under: Mapping[str, float]) -> tuple[str, ...]:
    """Compares scores with limits.

    Args:
        scores: Of one model.
        over: Name -> the largest share that passes.
        under: Name -> the smallest share that passes.

    Returns:
        What is over or under its limit, for people; empty where the model passes.

    Raises:
        DataError: A number was not measured.
    """
    values = scores.numbers()
    _require_measured(over.keys() | under.keys(), tuple(values))
    # Turned this way so that NaN, a share of nothing, passes neither.
    found = [f"{name} is {values[name]:.2%}, over {limit:.2%}" for name, limit in over.items() if not values[name] <= limit]
    found += [f"{name} is {values[name]:.2%}, under {limit:.2%}" for name, limit in under.items() if not values[name] >= limit]
    return tuple(found)
