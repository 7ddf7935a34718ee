"""What a method is, and what all methods of a seed share: the base, the examples and the selections."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bench._base import BaseRun, Clock
from nestpatch.nest_train._layers import Choose, busy_blocks, find_clusters
from nestpatch.nest_train._neurons import Clusters, Selection
from nestpatch.nest_train._targets import Examples, distil
from nestpatch.nest_train._tune import Loss, Trainable, batch_loss
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.states import layers_of
from nestpatch.runtimes.weights import MlpBlock

Layers = list[tuple[Selection, Clusters]]
Neurons = Sequence[npt.NDArray[np.int64]]
"""Numbers of neurons for each block."""
_SELECTION = ("seed", "max_prompts", "probe_holdout", "probe_c", "probe_margin", "selector", "threshold", "sign")
_SELECTION += ("first_layer", "k_min", "k_max", "profile_prompts")
"""The settings on which selection and clusters depend."""


class Change(Trainable, Protocol):
    """What `tune` trains, and what a measurement needs besides."""

    def off(self) -> AbstractContextManager[None]:
        """Inside, the attached change does nothing: the model answers as the base."""
        ...

    def scaled(self, values: Sequence[torch.Tensor], strength: float) -> list[torch.Tensor]:
        """Values of a `snapshot`, such that the change is `strength` times as large."""
        ...


@dataclass(frozen=True)
class Attempt:
    """What one method trains, on what, and towards what."""

    change: Change
    examples: Examples
    loss: Loss = batch_loss
    layers: Layers | None = None
    """What a pack records of the selection; None where no pack can hold the change."""
    first: Neurons | None = None
    """The neurons whose loss the change is to survive; None where they are all that it patches."""

    @property
    def switchable(self) -> Neurons:
        """The neurons that a measurement switches off; none where no neurons were selected."""
        return self.first or [selection.neurons for selection, _ in self.layers or ()]


@dataclass(frozen=True)
class Method:
    """One method or ablation.

    Attributes:
        name: For the command line and the results.
        about: One line.
        make: Prepares it on a scene that has its settings.
        settings: Settings of the recipe that differ.
        lookalikes: Whether it trains with look-alikes.
        rounding: Whether deltas are trained through the rounding with which they are measured.
    """

    name: str
    about: str
    make: Callable[[Scene], Attempt]
    settings: Mapping[str, Any] = field(default_factory=dict)
    lookalikes: bool = True
    rounding: bool = True

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe with the method's settings."""
        return dataclasses.replace(recipe, **self.settings)

    def data(self, data: TrainingData) -> TrainingData:
        """The prompts that it trains with."""
        return data if self.lookalikes else dataclasses.replace(data, lookalike=None)

    def prepare(self, scene: Scene) -> tuple[Scene, Attempt]:
        """The scene with the method's settings, and what is to be trained there; its values start the same for a seed."""
        run = dataclasses.replace(scene.run, recipe=self.recipe(scene.run.recipe), decisions=dict(scene.run.decisions))
        examples = scene.examples if self.lookalikes else dataclasses.replace(scene.examples, lookalike=())
        own = dataclasses.replace(scene, run=run, data=self.data(scene.data), examples=examples)
        torch.manual_seed(run.recipe.seed)
        return own, self.make(own)


@dataclass(frozen=True, eq=False)
class Scene:
    """A base and its training examples, for one recipe."""

    run: BaseRun
    blocks: tuple[MlpBlock, ...]
    data: TrainingData
    examples: Examples
    clock: Clock
    _found: dict[Any, tuple[Layers, Counter[str]]] = field(default_factory=dict)

    @classmethod
    def start(cls, model: str, recipe: Recipe, data: TrainingData, clock: Clock) -> Scene:
        """Loads the base, and asks it what to keep."""
        data = data.sampled(recipe.max_prompts, recipe.seed)
        run = BaseRun.start(model, recipe, clock)
        blocks = busy_blocks(run, data, run.blocks())
        return cls(run, blocks, data, distil(run, data), clock)

    def layers(self, choose: Choose | None = None) -> Layers:
        """Selection and clusters by the recipe, found once; their seconds count for every method that asks."""
        recipe = self.run.recipe
        key = (choose, self.data.lookalike is None, *(getattr(recipe, name) for name in _SELECTION))
        if key in self._found:
            self.clock.seconds.update(self._found[key][1])
        else:
            before = self.clock.seconds.copy()
            found = find_clusters(self.run, self.data, self.blocks, choose)
            self._found[key] = found, self.clock.seconds - before
        return self._found[key][0]

    @property
    def first_layer(self) -> int:
        """The lowest layer that deltas patch."""
        return next(clusters.layer for _, clusters in self.layers() if clusters.k)

    @property
    def decoder(self) -> nn.ModuleList:
        """The model's layers, one for each block."""
        return layers_of(self.run.model, self.blocks[0])[0]


@contextmanager
def watched(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Fills a list with the outputs of the layers, [batch, tokens, width], in the order in which they run."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
