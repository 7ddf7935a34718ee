"""The stage detector: a linear probe of the residual stream that ships with the pack.

The prompts are divided into three parts: the probe is fitted on the first; layer, pooling and threshold are chosen by the
second; the third measures it. Source: the guard of Disentangled Safety Adapters (arXiv 2506.00166), a light head on the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.detector import POOLINGS, Detector, DetectorFacts
from nestpatch.errors import PackContentError
from nestpatch.evaluation.detection import area_under_roc
from nestpatch.nest_train.recipe import Recipe
from nestpatch.rows import FloatArray
from nestpatch.runtimes.states import Places

Flags = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
States = Callable[[int], FloatArray]
"""Number of a place -> float32 [prompts, hidden]."""
SETTINGS = ("seed", "probe_holdout", "probe_c", "detector_false_positives")
"""The settings of the stage."""
_MOST_LAYERS = 16
"""Layers that are tried, at most: neighbours are alike."""
_MOST_PROMPTS = 1000
"""Prompts that a probe is fitted on while layer and pooling are chosen, at most."""


def candidates(layers: int) -> Places:
    """Where the probe may read.

    Args:
        layers: Layers of the model.

    Returns:
        (layer, pooling) of evenly spaced layers. Not of the last: runtimes compute it for the last token alone, or normalised.
    """
    chosen = np.linspace(0, layers - 2, min(_MOST_LAYERS, layers - 1)).round().astype(int) if layers > 1 else ()
    return [(int(layer), pooling) for layer in dict.fromkeys(chosen) for pooling in POOLINGS]


def fit_detector(places: Places, states: States, harmful: Flags, first_patched: int, recipe: Recipe) -> tuple[Detector, str]:
    """The stage detector.

    Args:
        places: From `candidates`.
        states: The pooled hidden states of each place.
        harmful: bool [prompts].
        first_patched: The lowest layer that the pack changes.
        recipe: The settings named in SETTINGS are read.

    Returns:
        (the detector, why this layer and pooling).
    """
    fit, calibrate, measure = _three_parts(harmful, recipe)
    few = fit if len(fit) <= _MOST_PROMPTS else _sample(fit, harmful, recipe)
    found = []
    for number in range(len(places)):
        values = states(number)
        weight, bias = _fit(values[few], harmful[few], recipe)
        found.append(_auc(values[calibrate] @ weight + bias, harmful[calibrate]))
    chosen, reason = _choose(places, found, harmful[calibrate], first_patched)
    values = states(chosen)
    weight, bias = _fit(values[fit], harmful[fit], recipe)
    scores = values[np.concatenate([calibrate, measure])].astype(np.float64) @ weight.astype(np.float64) + bias
    calibrated, measured = scores[: len(calibrate)], scores[len(calibrate) :]
    threshold = conformal_threshold(calibrated[~harmful[calibrate]], recipe.detector_false_positives)
    fired, bad = measured > threshold, harmful[measure]
    facts = DetectorFacts(
        layer=places[chosen][0],
        pooling=places[chosen][1],
        bias=bias,
        threshold=threshold,
        max_false_positive_rate=recipe.detector_false_positives,
        auc=round(_auc(measured, bad), 4),
        detection_rate=round(float(fired[bad].mean()), 4),
        false_positive_rate=round(float(fired[~bad].mean()), 4),
        harmful=int(bad.sum()),
        harmless=int((~bad).sum()),
    )
    return Detector(facts, weight), reason


def _three_parts(harmful: Flags, recipe: Recipe) -> tuple[IntArray, IntArray, IntArray]:
    """The numbers of the prompts that fit, calibrate and measure; the last two are half of `probe_holdout` each."""
    from sklearn.model_selection import train_test_split

    # Small sets need some prompts of each side in both halves.
    share = max(recipe.probe_holdout, 4 / min(harmful.sum(), (~harmful).sum()))
    fit, held_out = train_test_split(np.arange(len(harmful)), test_size=share, stratify=harmful, random_state=recipe.seed)
    calibrate, measure = train_test_split(held_out, test_size=0.5, stratify=harmful[held_out], random_state=recipe.seed)
    return fit, calibrate, measure


def _sample(prompts: IntArray, harmful: Flags, recipe: Recipe) -> IntArray:
    from sklearn.model_selection import train_test_split

    chosen: IntArray = train_test_split(prompts, train_size=_MOST_PROMPTS, stratify=harmful[prompts], random_state=recipe.seed)[
        0
    ]
    return chosen


def _fit(states: FloatArray, harmful: Flags, recipe: Recipe) -> tuple[FloatArray, float]:
    """Logistic regression on standardised states; returns weight float32 [hidden] and bias for states as they are."""
    from sklearn.linear_model import LogisticRegression

    mean, spread = states.mean(0, dtype=np.float64), states.std(0, dtype=np.float64)
    scale = np.where(spread > 1e-8, 1 / np.maximum(spread, 1e-8), 0.0)
    probe = LogisticRegression(C=recipe.probe_c, max_iter=300, class_weight="balanced")
    probe.fit((states - mean) * scale, harmful)
    weight = (probe.coef_[0] * scale).astype(np.float32)
    return weight, float(probe.intercept_[0] - weight.astype(np.float64) @ mean)


def _auc(scores: npt.NDArray[Any], harmful: Flags) -> float:
    return area_under_roc(scores[harmful], scores[~harmful]) or 0.0


def _choose(places: Places, aucs: Sequence[float], harmful: Flags, first_patched: int) -> tuple[int, str]:
    """The best place; one below the patched layers where it is as good within a standard error: there the patched model has the
    base's hidden states.
    """
    best = max(range(len(aucs)), key=lambda number: aucs[number])
    noise = standard_error(aucs[best], int(harmful.sum()), int((~harmful).sum()))
    low = [number for number in range(len(aucs)) if places[number][0] < first_patched and aucs[number] >= aucs[best] - noise]
    chosen = max(low, key=lambda number: aucs[number], default=best)
    where = "below the patched layers, so it works on the patched model too" if low else "among the patched layers"
    reason = f"AUC {aucs[chosen]:.3f} of {len(aucs)} places, at best {aucs[best]:.3f} in layer {places[best][0]}; {where}"
    return chosen, reason


def standard_error(auc: float, harmful: int, harmless: int) -> float:
    """The standard error of an area under the ROC curve. Source: Hanley and McNeil (1982).

    Args:
        auc: The area.
        harmful: Harmful prompts.
        harmless: Harmless prompts.

    Returns:
        In the unit of the area.
    """
    first, second = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    variance = auc * (1 - auc) + (harmful - 1) * (first - auc * auc) + (harmless - 1) * (second - auc * auc)
    return math.sqrt(max(0.0, variance / (harmful * harmless)))


def conformal_threshold(harmless: npt.NDArray[np.float64], rate: float) -> float:
    """The score that new harmless prompts exceed in at most a share of the cases, on average over calibrations.

    Source: split conformal prediction (Vovk; Papadopoulos et al., 2002).

    Args:
        harmless: Scores of harmless prompts that the probe was not fitted on, at least one.
        rate: The share.

    Returns:
        One of the scores; the largest where there are too few for the share.
    """
    place = math.ceil((len(harmless) + 1) * (1 - rate))
    return float(np.sort(harmless)[min(place, len(harmless)) - 1])


def row_of(detector: Detector, reason: str) -> dict[str, Any]:
    """A result as a JSON value; its floats are read back exactly.

    Args:
        detector: From `fit_detector`.
        reason: Likewise.
    """
    return {"facts": detector.facts.as_json(), "weight": detector.weight.tolist(), "reason": reason}


def of_row(row: Mapping[str, Any]) -> tuple[Detector, str]:
    """A result of `row_of`.

    Args:
        row: Anything.

    Returns:
        (detector, reason).

    Raises:
        ValueError, TypeError, LookupError: It is none.
    """
    try:
        return Detector(DetectorFacts(**row["facts"]), np.array(row["weight"], np.float32)), str(row["reason"])
    except PackContentError as error:
        raise ValueError(str(error)) from error
