"""Stage 3: neurons that respond alike share one delta. k-means on activation profiles, k by silhouette (NeST, clustering)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestpatch.nest_train.probe import FloatArray, IntArray, Selection, standardise
from nestpatch.nest_train.recipe import Recipe

SILHOUETTE_SAMPLE = 2000
"""Neurons in a silhouette, at most: its cost is quadratic."""


@dataclass(frozen=True, eq=False)
class Clusters:
    """The selected neurons of one layer, in groups."""

    layer: int
    neurons: IntArray
    """Sorted neuron indices, [neurons]."""
    labels: npt.NDArray[np.int64]
    """The cluster of each, [neurons], numbered from 0 by their first neuron."""
    k: int
    silhouette: float | None
    reason: str


def cluster(selection: Selection, acts: FloatArray, recipe: Recipe) -> Clusters:
    """Groups one layer's selected neurons.

    acts: float32 [prompts, all neurons of the layer]. Neurons whose profiles cannot be told apart make one cluster.
    """
    neurons = selection.neurons
    if len(neurons) == 0:
        return Clusters(selection.layer, neurons, np.empty(0, np.int64), 0, None, "no neurons")
    rng = np.random.default_rng(recipe.seed)
    prompts = np.arange(len(acts))
    if len(prompts) > recipe.profile_prompts:
        prompts = np.sort(rng.choice(prompts, recipe.profile_prompts, replace=False))
    profiles = standardise(acts[np.ix_(prompts, neurons)]).T
    labels, k, silhouette, reason = _choose_k(profiles, recipe)
    return Clusters(selection.layer, neurons, _renumber(labels), k, silhouette, reason)


def _choose_k(profiles: FloatArray, recipe: Recipe) -> tuple[npt.NDArray[np.int64], int, float | None, str]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    distinct = len(np.unique(profiles, axis=0))
    # A silhouette needs 2 <= k < number of points.
    top = min(recipe.k_max, distinct - 1)
    one = np.zeros(len(profiles), np.int64)
    if recipe.k_max == 1 or top < max(2, recipe.k_min):
        return one, 1, None, f"one cluster: {distinct} distinct profiles, k at most {recipe.k_max}"
    scored = []
    for k in range(max(2, recipe.k_min), top + 1):
        labels = KMeans(k, n_init=4, random_state=recipe.seed).fit(profiles).labels_
        sample = min(SILHOUETTE_SAMPLE, len(profiles))
        score = float(silhouette_score(profiles, labels, sample_size=sample, random_state=recipe.seed))
        scored.append((score, k, labels.astype(np.int64)))
    # The smaller k wins a tie: fewer trained parameters.
    score, k, labels = max(scored, key=lambda entry: (entry[0], -entry[1]))
    tried = ", ".join(f"{k}: {s:.3f}" for s, k, _ in scored)
    return labels, k, score, f"best silhouette of k = {tried}"


def _renumber(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Clusters numbered in the order in which they first occur, so that equal groupings look equal."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
