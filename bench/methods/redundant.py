"""Redundancy: a second set of rows learns to refuse while the first set's neurons are switched off.

Source: SafeNeuron (arXiv 2602.12158), which freezes the neurons that carry safety, zeroes them in the forward pass and trains
the rest, so that pruning them does not remove all of it. Here both sets are rows of one pack, and every step computes the
loss twice: with all neurons, and without the first set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from bench._base import Off
from bench.methods._scene import Attempt, Method, Neurons, Scene
from bench.methods.nest import Bools, attempt
from nestpatch.nest_train._layers import Activations, selected
from nestpatch.nest_train._neurons import Selection
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.weights import MlpBlock


@contextmanager
def switched_off(blocks: Sequence[MlpBlock], neurons: Neurons) -> Iterator[Off]:
    """Inside, the activations of some neurons are zero.

    Args:
        blocks: Feed-forward blocks without mixtures of experts.
        neurons: Those of each block.

    Yields:
        A context in which the neurons are on again.
    """
    is_off = True

    def zeroed(places: torch.Tensor, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].index_fill(-1, places, 0), *args[1:]) if is_off else args

    @contextmanager
    def on() -> Iterator[None]:
        nonlocal is_off
        is_off = False
        try:
            yield
        finally:
            is_off = True

    handles = []
    for block, some in zip(blocks, neurons, strict=True):
        places = torch.from_numpy(some).to(next(block.output.parameters()).device)
        handles.append(block.output.register_forward_pre_hook(lambda _, args, places=places: zeroed(places, args)))
    try:
        yield on
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass(frozen=True)
class Twice:
    """`batch_loss` with all neurons and without the first set; their mean."""

    blocks: Sequence[MlpBlock]
    first: Neurons

    def __call__(self, trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        """A scalar."""
        whole = batch_loss(trunk, recipe, batch)
        with switched_off(self.blocks, self.first):
            return (whole + batch_loss(trunk, recipe, batch)) / 2


def _wider(run: Run, blocks: Sequence[MlpBlock], acts: Activations, harmful: Bools) -> list[Selection]:
    """The selection of the recipe, and of each of its layers as many more neurons, by the probe's next scores."""
    chosen = selected(run, blocks, acts, harmful)
    loose = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, threshold=0.0))
    every = selected(loose, blocks, acts, harmful)
    found = []
    for one, scored in zip(chosen, every, strict=True):
        rest = ~np.isin(scored.neurons, one.neurons)
        order = np.argsort(-np.abs(scored.z[rest]), kind="stable")[: len(one.neurons)]
        neurons = np.concatenate([one.neurons, scored.neurons[rest][order]])
        z, by_number = np.concatenate([one.z, scored.z[rest][order]]), np.argsort(neurons)
        reason = f"{one.reason}, and the next {len(order)}"
        found.append(dataclasses.replace(one, neurons=neurons[by_number], z=z[by_number], reason=reason))
    return found


def _joint(scene: Scene) -> Attempt:
    first = [selection.neurons for selection, _ in scene.layers()]
    return dataclasses.replace(attempt(scene, scene.layers(_wider)), first=first)


def _redundant(scene: Scene) -> Attempt:
    joint = _joint(scene)
    return dataclasses.replace(joint, loss=Twice(scene.blocks, joint.switchable))


METHODS = (
    Method("wider", "twice as many neurons, trained together", _joint),
    Method("redundant", "the same neurons as wider, trained also without the first half of them", _redundant),
)
