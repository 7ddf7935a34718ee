"""Which neurons respond to harmful prompts, and which of them share a delta: the stages probe, select and cluster.

Source: NeST (arXiv 2602.16835), sections on neuron activation, selection and clustering.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import TrainingError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train import _ranks
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.effects import Moments, cohens_d
from nestpatch.runtimes.sharded import is_sharded
from nestpatch.runtimes.states import Places, hidden_size, layers_of, pooled_states
from nestpatch.runtimes.weights import MlpBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nestpatch.runtimes.experts import Batch

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
_NEAR = 0.03
"""Balanced accuracy by which the probe of the lowest patched layer may be below the best."""
_SILHOUETTE_SAMPLE = 2000
"""Neurons in a silhouette, at most: its cost is quadratic."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The result of one layer's probe."""

    layer: int
    accuracy: float
    """Balanced accuracy on held-out prompts: the mean over harmful and harmless ones; 0.5 is chance."""
    neurons: IntArray
    """Indices of the kept neurons, int64 [kept], sorted; empty when the layer is skipped."""
    z: FloatArray
    """Their z-scored scores, float32 [kept]."""
    reason: str
    """Why these neurons, or why none."""

    def skipped(self, reason: str) -> Selection:
        """The same layer without neurons.

        Args:
            reason: Why none.
        """
        return _without_neurons(self.layer, self.accuracy, reason)


def _without_neurons(layer: int, accuracy: float, reason: str) -> Selection:
    return Selection(layer, accuracy, np.empty(0, np.int64), np.empty(0, np.float32), reason)


@dataclass(frozen=True, eq=False)
class Clusters:
    """The selected neurons of one layer, in groups that share a delta."""

    layer: int
    neurons: IntArray
    """Indices of the neurons, int64 [neurons], sorted."""
    labels: IntArray
    """The cluster of each, int64 [neurons], numbered from 0 by the first neuron of each cluster."""
    k: int
    silhouette: float | None
    reason: str
    """Why this number of clusters."""


def _batches(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], recipe: Recipe, pad: int, batch: Batch
) -> Iterator[tuple[Sequence[int], int]]:
    """Runs the prompts through the model, dealt out to the ranks; one without a prompt is in step with them by another's.

    Yields after each forward pass the numbers of the batch, none where this rank had none, and how many prompts are done.
    """
    from nestpatch.runtimes.experts import run_batch

    # Prompts of similar length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = recipe.probe_batch
    for places, done in _ranks.rounds([order[start : start + size] for start in range(0, len(order), size)]):
        if places or is_sharded(model):
            run_batch(model, [prompts[i] for i in places or order[:1]], pad, batch, counted=bool(places))
        yield places, done


def routed(
    model: PreTrainedModel,
    blocks: Sequence[MlpBlock],
    harmful: Sequence[Sequence[int]],
    recipe: Recipe,
    pad: int,
    on_event: OnEvent = ignore,
) -> tuple[MlpBlock, ...]:
    """Leaves to each mixture the experts that the router chooses most often in harmful prompts.

    Args:
        model: The frozen base.
        blocks: Its feed-forward blocks.
        harmful: Token ids of each harmful prompt.
        recipe: `probe_batch` is read.
        pad: The id of the padding token.
        on_event: Called once per batch.

    Returns:
        The blocks; without mixtures the same.
    """
    import torch

    from nestpatch.runtimes.experts import Batch, busiest, counting

    if not any(block.mixture for block in blocks):
        return tuple(blocks)
    batch = Batch()
    with counting(blocks, batch) as counts:
        for _, done in _batches(model, harmful, recipe, pad, batch):
            on_event(Event("probe", done, len(harmful), "experts"))
    parts = [part for part in _ranks.gathered(counts) if part]  # a rank without a batch has counted nothing

    def chosen(block: MlpBlock) -> MlpBlock:
        return block.of_experts(busiest(torch.stack([part[block.name] for part in parts]).sum(0)))

    return tuple(chosen(block) if block.mixture else block for block in blocks)


def collect(
    model: PreTrainedModel,
    blocks: Sequence[MlpBlock],
    prompts: Sequence[Sequence[int]],
    folder: Path,
    recipe: Recipe,
    pad: int,
    on_event: OnEvent = ignore,
    places: Places = (),
) -> list[FloatArray]:
    """Runs the prompts and max-pools every neuron's activation over each prompt's tokens.

    Neurons of an expert that no token of a prompt is routed to have the activation 0.

    Args:
        model: The frozen base.
        blocks: Its feed-forward blocks.
        prompts: Token ids of each prompt.
        folder: Where the activations are stored: memory does not grow with the prompts.
        recipe: `probe_batch` is read.
        pad: The id of the padding token.
        on_event: Called once per batch.
        places: Where hidden states are recorded as well, pooled as each place says.

    Returns:
        One array per block, float32 [prompts, neurons], then one per place, [prompts, hidden], mapped from files in `folder`;
        nothing on ranks beside the first.
    """
    from nestpatch.runtimes.experts import Batch, pooling

    widths = [block.neurons for block in blocks] + [hidden_size(model)] * len(places)
    stored = [
        np.lib.format.open_memmap(folder / f"{number}.npy", mode="w+", dtype=np.float32, shape=(len(prompts), width))
        for number, width in enumerate(widths if _ranks.is_first() else ())
    ]
    batch, (layers, _) = Batch(), layers_of(model, blocks[0])
    with pooling(blocks, batch) as pooled, pooled_states(layers, places, lambda: batch.mask) as states:
        for numbers, done in _batches(model, prompts, recipe, pad, batch):
            found = [*(pooled[block.name] for block in blocks), *(states[place] for place in places)] if numbers else []
            for part, rows in _ranks.at_first((numbers, [values.cpu().numpy() for values in found])):
                for out, values in zip(stored, rows, strict=False):
                    out[part] = values
            on_event(Event("probe", done, len(prompts)))
    return [np.asarray(out) for out in stored]


def standardise(acts: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Scales each neuron to mean 0 and standard deviation 1 over the prompts; constant ones to 0.

    Args:
        acts: [prompts, neurons].

    Returns:
        float32 [prompts, neurons].
    """
    spread = acts.std(axis=0, dtype=np.float64)
    centred = acts - acts.mean(axis=0, dtype=np.float64)
    return np.where(spread > 1e-8, centred / np.maximum(spread, 1e-8), 0.0).astype(np.float32)


def select(layer: int, acts: FloatArray, harmful: npt.NDArray[np.bool_], recipe: Recipe) -> Selection:
    """Fits the layer's linear probe and keeps the neurons whose z-scored score is over the threshold.

    A layer whose probe is no better than chance on held-out prompts is skipped: its weights carry no information.

    Args:
        layer: The layer's number, for the result.
        acts: float32 [prompts, neurons].
        harmful: bool [prompts].
        recipe: The settings named probe_*, `selector`, `threshold` and `sign` are read.

    Returns:
        The kept neurons, and how well the probe predicts.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split

    features = standardise(acts)
    fit, held_out = train_test_split(
        np.arange(len(harmful)), test_size=recipe.probe_holdout, stratify=harmful, random_state=recipe.seed
    )
    probe = LogisticRegression(C=recipe.probe_c, max_iter=300, class_weight="balanced")
    probe.fit(features[fit], harmful[fit])
    accuracy = float(balanced_accuracy_score(harmful[held_out], probe.predict(features[held_out])))
    if accuracy < (needed := 0.5 + recipe.probe_margin):
        return _without_neurons(layer, accuracy, f"skipped: probe accuracy {accuracy:.2f}, below {needed:.2f}")
    score = probe.coef_[0] if recipe.selector == "probe" else effect_sizes(acts, harmful)
    z = ((score - score.mean()) / max(float(score.std()), 1e-12)).astype(np.float32)
    neurons = np.flatnonzero(_over(z, score, recipe))
    rule = f"z > {recipe.threshold:g}" if recipe.sign == "positive" else f"|z| > {recipe.threshold:g}"
    reason = f"probe accuracy {accuracy:.2f}, {len(neurons)} of {len(z)} neurons with {rule}"
    return Selection(layer, accuracy, neurons, z[neurons], reason)


def _over(z: FloatArray, score: npt.NDArray[np.floating[Any]], recipe: Recipe) -> npt.NDArray[np.bool_]:
    """Which neurons are over the threshold; positive ones also have a positive score, as in NeuroStrike."""
    over: npt.NDArray[np.bool_] = np.abs(z) > recipe.threshold
    return over & (z > 0) & (score > 0) if recipe.sign == "positive" else over


def effect_sizes(acts: npt.NDArray[np.floating[Any]], harmful: npt.NDArray[np.bool_]) -> FloatArray:
    """How far apart harmful and harmless prompts are in each neuron: `cohens_d`. Needs no fit.

    Args:
        acts: [prompts, neurons].
        harmful: bool [prompts].

    Returns:
        float32 [neurons], in pooled standard deviations; 0 for constant neurons.
    """
    return cohens_d(Moments.of(acts[harmful]), Moments.of(acts[~harmful]))


def choose_first_layer(selections: Sequence[Selection], recipe: Recipe) -> tuple[int, str]:
    """Chooses the lowest layer that is patched.

    A step costs as much as the layers from there up. The layers below the first one whose probe is as good as the best, within
    `_NEAR`, are left out, but no more than half of all layers. Only layers with neurons count.

    Args:
        selections: The results of all blocks, in the order of their layers; at least one has neurons.
        recipe: `first_layer` decides where it is given.

    Returns:
        (layer, reason).
    """
    layers = selections[-1].layer + 1
    if recipe.first_layer >= 0:
        return min(recipe.first_layer, layers - 1), "asked for"
    able = [selection for selection in selections if len(selection.neurons)]
    best = max(selection.accuracy for selection in able)
    near = next(selection.layer for selection in able if selection.accuracy >= best - _NEAR)
    first = min(near, layers // 2)
    at = max(selection.accuracy for selection in selections if selection.layer == first)
    return first, f"probe accuracy {at:.2f} there, at best {best:.2f}; a step computes {layers - first} of {layers} layers"


def require_neurons(selections: Sequence[Selection]) -> None:
    """Checks that some layer kept a neuron.

    Args:
        selections: The results of all layers.

    Raises:
        TrainingError: No layer did.
    """
    if not any(len(s.neurons) for s in selections):
        found = "; ".join(f"layer {s.layer}: {s.reason}" for s in selections)
        raise TrainingError(f"no neuron separates harmful prompts from harmless ones ({found})")


def cluster(selection: Selection, acts: FloatArray, recipe: Recipe) -> Clusters:
    """Groups one layer's selected neurons by k-means on their activation profiles; k is chosen by the silhouette.

    Args:
        selection: The layer's neurons.
        acts: float32 [prompts, all neurons of the layer].
        recipe: `k_min`, `k_max`, `profile_prompts` and `seed` are read.

    Returns:
        The groups; one group where the profiles are too few or too similar to be divided.
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
    # Clusters are numbered in the order in which they first occur, so that equal groupings look equal.
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return Clusters(selection.layer, neurons, rank[inverse], k, silhouette, reason)


def _choose_k(profiles: FloatArray, recipe: Recipe) -> tuple[IntArray, int, float | None, str]:
    """(labels, k, silhouette, reason) for profiles of shape [neurons, prompts]."""
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
        sample = min(_SILHOUETTE_SAMPLE, len(profiles))
        score = float(silhouette_score(profiles, labels, sample_size=sample, random_state=recipe.seed))
        scored.append((score, k, labels.astype(np.int64)))
    # The smaller k wins a tie: fewer trained parameters.
    score, k, labels = max(scored, key=lambda entry: (entry[0], -entry[1]))
    tried = ", ".join(f"{k}: {s:.3f}" for s, k, _ in scored)
    return labels, k, score, f"best silhouette of k = {tried}"
