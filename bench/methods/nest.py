"""Shared deltas (NeST) and their ablations: other neurons, other groups, other settings, averaged deltas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from bench.methods._scene import Attempt, Layers, Method, Scene
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._layers import Activations, selected
from nestpatch.nest_train._neurons import Clusters, Selection
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.effects import Moments, cohens_d, shift
from nestpatch.runtimes.weights import MlpBlock

_DECAY = 0.99
"""Of the average; arXiv 2508.12531 gives none, its followers 0.99 to 0.999."""
_EFFECT, _SHIFT = 2.0, 2.0
"""SafeNeuron's thresholds for Llama: of the effect size, and of the z-scored shift of the mean."""
Bools = npt.NDArray[np.bool_]


class Deltas(DeltaSet):
    """Shared deltas that can be made larger and smaller."""

    def scaled(self, values: Sequence[torch.Tensor], strength: float) -> list[torch.Tensor]:
        """The deltas times the strength."""
        return [value * strength for value in values]


class AveragedDeltas(Deltas):
    """Deltas whose moving average is looked at and kept (EMA, arXiv 2508.12531). It starts at zero, which is the base."""

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters]) -> None:
        super().__init__(blocks, clusters)
        self._average = self.snapshot()
        self._trained: list[torch.Tensor] | None = None
        """The trained deltas while the average is in their place."""

    def round_rows(self) -> None:
        """Adds the deltas of a step to the average."""
        super().round_rows()
        self._average = [torch.lerp(new, old, _DECAY) for new, old in zip(self.snapshot(), self._average, strict=True)]

    def loss(self, trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        """`batch_loss` of the deltas in a step, and of their average at a look, whose answers and snapshot follow."""
        if torch.is_grad_enabled() and self._trained is not None:
            self.restore(self._trained)
            self._trained = None
        elif not torch.is_grad_enabled() and self._trained is None:
            self._trained = self.snapshot()
            self.restore(self._average)
        return batch_loss(trunk, recipe, batch)


def attempt(scene: Scene, layers: Layers) -> Attempt:
    """Shared deltas on some neurons and groups."""
    return Attempt(Deltas(scene.blocks, [clusters for _, clusters in layers]), scene.examples, layers=layers)


def _nest(scene: Scene) -> Attempt:
    return attempt(scene, scene.layers())


def _averaged(scene: Scene) -> Attempt:
    layers = scene.layers()
    change = AveragedDeltas(scene.blocks, [clusters for _, clusters in layers])
    return Attempt(change, scene.examples, change.loss, layers)


# Groups


def _regrouped(scene: Scene, labels: Callable[[int], npt.NDArray[np.int64]]) -> Attempt:
    """The same neurons in other groups: number of neurons -> the group of each."""
    layers = []
    for selection, clusters in scene.layers():
        groups = labels(len(clusters.neurons))
        layers.append((selection, dataclasses.replace(clusters, labels=groups, k=len(np.unique(groups)), silhouette=None)))
    return attempt(scene, layers)


def _per_layer(scene: Scene) -> Attempt:
    return _regrouped(scene, lambda count: np.zeros(count, np.int64))


def _per_neuron(scene: Scene) -> Attempt:
    return _regrouped(scene, np.arange)


# Neurons


def _random(run: Run, blocks: Sequence[MlpBlock], acts: Activations, harmful: Bools) -> list[Selection]:
    """As many neurons in each layer as the probe keeps, drawn by chance."""
    rng, found = np.random.default_rng(run.recipe.seed), []
    for block, one in zip(blocks, selected(run, blocks, acts, harmful), strict=True):
        drawn = np.sort(rng.choice(block.neurons, len(one.neurons), replace=False)).astype(np.int64)
        found.append(dataclasses.replace(one, neurons=drawn, z=np.zeros(len(drawn), np.float32), reason="drawn by chance"))
    return found


def _safe_neurons(run: Run, blocks: Sequence[MlpBlock], acts: Activations, harmful: Bools) -> list[Selection]:
    """SafeNeuron (arXiv 2602.12158): neurons of a large effect size or a large shift, in the layers that the probe keeps."""
    found = []
    for one, layer in zip(selected(run, blocks, acts, harmful), acts, strict=True):
        kinds = Moments.of(layer[harmful]), Moments.of(layer[~harmful])
        z = shift(*kinds)
        kept = (cohens_d(*kinds) > _EFFECT) | (z > _SHIFT)
        neurons = np.flatnonzero(kept) if len(one.neurons) else one.neurons
        found.append(dataclasses.replace(one, neurons=neurons, z=z[neurons], reason=f"{len(neurons)} by effect or shift"))
    return found


def _chosen(choose: Callable[..., list[Selection]], scene: Scene) -> Attempt:
    return attempt(scene, scene.layers(choose))


def _thresholds() -> list[Method]:
    found = []
    for threshold in (0.7, 2.0, 3.0):
        for sign, ending, rule in (("positive", "", "z"), ("both", "-both", "|z|")):
            settings = {"threshold": threshold, "sign": sign}
            found.append(Method(f"threshold-{threshold:g}{ending}", f"neurons with {rule} > {threshold:g}", _nest, settings))
    return found


METHODS = (
    Method("nest", "shared deltas, as the recipe says", _nest),
    Method("random", "random neurons, as many in each layer", partial(_chosen, _random)),
    Method("per-layer", "one delta for all neurons of a layer", _per_layer),
    Method("per-neuron", "one delta for each neuron", _per_neuron),
    *_thresholds(),
    Method(
        "no-lookalikes",
        "no look-alikes in the probe and in the batches; benign prompts take their place",
        _nest,
        lookalikes=False,
    ),
    Method(
        "no-kl",
        "the likelihood of harmless answers instead of the divergence from the base",
        _nest,
        {"kl_weight": 0.0, "benign_weight": 1.0},
    ),
    Method("first-token-1", "the first token of an answer weighs as much as the others", _nest, {"first_token_weight": 1.0}),
    Method("ema", f"a moving average of the deltas, decay {_DECAY:g}", _averaged),
    Method("effect", "neurons by z-scored effect sizes", _nest, {"selector": "effect"}),
    Method("safeneuron", "neurons by SafeNeuron's effect size or activation shift", partial(_chosen, _safe_neurons)),
    Method("no-rounding", "deltas that do not know the rounding until they are measured", _nest, rounding=False),
)
