"""Neurons that are switched off: those that a pack changes, given ones, or as many random ones of the same matrices.

Sources: SafeNeuron (arXiv 2602.12158) and GateBreaker (arXiv 2512.21008), which zero the activations of safety neurons. Here
the columns are zeroed by which the next matrix reads these neurons: the same outputs, and a file that anyone can write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from nestpatch.errors import DataError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.pack import Pack
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.transformers import TransformersRuntime
from nestpatch.runtimes.weights import MlpBlock, find_mlps

Neurons: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
"""Name of the weight that reads the neurons -> int64 [neurons, 2], sorted: the expert, 0 in a dense block, and its neuron."""


def patched_neurons(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack) -> Neurons:
    """Finds the neurons that a pack changes.

    Args:
        model: Loaded from `checkpoint`.
        checkpoint: A model on disk with the tensors of the pack, before or after the change.
        pack: The pack.

    Returns:
        The neurons. Rows of the pack that produce no neuron, such as those of attention, are left out.

    Raises:
        CheckpointError: The model has no parameter for a tensor of the pack.
        DataError: The pack changes no neuron.
    """
    stored, readers = StoredWeights(model, checkpoint), _readers(model)
    found: dict[str, npt.NDArray[np.int64]] = {}
    for delta in pack:
        home = stored.home(delta.name)
        if home.parameter in readers:
            reader, rows = readers[home.parameter], home.start + delta.rows.astype(np.int64)
            per_expert = model.get_parameter(home.parameter).shape[-2]
            width = _columns(model.get_parameter(reader)).shape[1]
            pairs = np.stack([rows // per_expert, rows % per_expert % width], 1)
            found[reader] = np.unique(np.concatenate([found.get(reader, pairs), pairs]), axis=0)
    if not found:
        raise DataError(
            f"{pack.label} changes no neuron of a feed-forward block", advice="There is nothing of it to switch off."
        )
    return found


def neurons_of(model: nn.Module, chosen: Sequence[tuple[MlpBlock, npt.NDArray[np.int64]]]) -> Neurons:
    """Names neurons by the weights that read them.

    Args:
        model: The model.
        chosen: Some of its blocks, each with sorted numbers of its neurons, int64 [neurons]; of a mixture as it counts them.

    Returns:
        The neurons of all blocks that have some.
    """
    readers, found = _readers(model), {}
    for block, numbers in chosen:
        if len(numbers):
            expert, neuron = np.divmod(numbers, block.projections[0].neurons)
            found[readers[block.projections[0].weight_name]] = np.stack([np.asarray(block.experts)[expert], neuron], 1)
    return found


def random_neurons(model: nn.Module, like: Neurons, seed: int) -> Neurons:
    """Draws as many neurons of the same matrices and experts, for comparison.

    Args:
        model: The model.
        like: How many of which matrices and experts.
        seed: Of the draw.

    Returns:
        Random neurons; some may be among `like`.
    """
    rng, drawn = np.random.default_rng(seed), {}
    for name, pairs in like.items():
        width = _columns(model.get_parameter(name)).shape[1]
        experts, counts = np.unique(pairs[:, 0], return_counts=True)
        chosen = [np.sort(rng.choice(width, count, replace=False)) for count in counts]
        drawn[name] = np.stack([np.repeat(experts, counts), np.concatenate(chosen)], 1)
    return drawn


@contextmanager
def pruned(model: nn.Module, neurons: Neurons) -> Iterator[None]:
    """Inside, nothing reads the neurons; afterwards the weights are what they were, bit for bit.

    Args:
        model: The model.
        neurons: What is switched off.
    """
    places = []
    with torch.no_grad():
        for name, pairs in neurons.items():
            columns = _columns(model.get_parameter(name))
            expert, neuron = torch.from_numpy(pairs).to(columns.device).unbind(1)
            places.append((columns, expert, neuron, columns[expert, neuron].clone()))
            columns[expert, neuron] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            for columns, expert, neuron, old in places:
                columns[expert, neuron] = old


def switched_off(runtime: TransformersRuntime, neurons: Neurons) -> TransformersRuntime:
    """The same loaded model without some neurons; the given runtime goes on with them.

    Args:
        runtime: A model, with or without a pack.
        neurons: What is switched off while it computes.

    Returns:
        The runtime.
    """

    @contextmanager
    def active() -> Iterator[None]:
        with runtime.active(), pruned(runtime.model, neurons):
            yield

    return replace(runtime, active=active)


def _readers(model: nn.Module) -> dict[str, str]:
    """Name of a weight whose rows produce neurons -> the name of the weight whose columns read them."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    for block in find_mlps(model):
        if isinstance(block.output, nn.Linear):
            found |= dict.fromkeys((one.weight_name for one in block.projections), f"{names[id(block.output)]}.weight")
    for name, module in model.named_modules():
        stack, output = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(stack, nn.Parameter) and isinstance(output, nn.Parameter):
            experts, width, neurons = output.shape
            if stack.shape == (experts, 2 * neurons, width):  # some families store both transposed
                found[f"{name}.gate_up_proj"] = f"{name}.down_proj"
    return found


def _columns(parameter: nn.Parameter) -> torch.Tensor:
    """A view [experts, neurons, width] of a weight that reads neurons."""
    weight = parameter.detach()
    return (weight if weight.ndim == 3 else weight[None]).transpose(1, 2)
