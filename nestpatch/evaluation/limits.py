"""Limits that an evaluation has to keep, for pipelines: a model passes or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nestpatch.errors import DataError
from nestpatch.evaluation.suites import Scores


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Reads NAME=SHARE, shares between 0 and 1. Raises DataError."""
    limits = {}
    for text in texts:
        name, _, share = text.partition("=")
        try:
            limits[name] = float(share)
        except ValueError:
            limits[name] = -1.0
        if not 0 <= limits[name] <= 1:
            raise DataError(f"{text!r} is no limit", advice="Write NAME=SHARE, such as attack_success=0.05.")
    return limits


def exceeded(evaluation: Scores, over: Mapping[str, float], under: Mapping[str, float]) -> tuple[str, ...]:
    """What is over or under its limit, for people; empty where the evaluation passes.

    Raises DataError for a number that no suite measures: a limit that is not checked must not look kept.
    """
    totals = evaluation.totals()
    if missing := sorted((over.keys() | under.keys()) - totals.keys()):
        raise DataError(f"nothing here measures {missing[0]}", advice=f"These suites measure {', '.join(totals)}.")
    values = {name: share.value for name, share in totals.items()}
    # Turned this way so that NaN, a share of nothing, passes neither.
    found = [f"{name} is {values[name]:.2%}, over {limit:.2%}" for name, limit in over.items() if not values[name] <= limit]
    found += [f"{name} is {values[name]:.2%}, under {limit:.2%}" for name, limit in under.items() if not values[name] >= limit]
    return tuple(found)
