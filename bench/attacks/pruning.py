"""Pruning: the neurons that a pack changes are switched off, or as many random ones of the same matrices.

Sources: SafeNeuron (arXiv 2602.12158) and GateBreaker (arXiv 2512.21008), which zero the activations of safety neurons. Here
the columns are zeroed by which the next matrix reads these neurons: the same outputs, and a file that anyone can write.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from nestpatch.errors import DataError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.pack import Pack
from nestpatch.runtimes.weights import PatchedRows, find_mlps, merged_parameters

Neurons: TypeAlias = Mapping[str, npt.NDArray[np.int64]]
"""Name of the weight that reads the neurons -> int64 [neurons, 2], sorted: the expert, 0 in a dense block, and its neuron."""


def patched_neurons(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack) -> Neurons:
    """Finds the neurons that a pack changes.

    Args:
        model: The base, loaded from `checkpoint`.
        checkpoint: The base on disk.
        pack: The pack.

    Returns:
        The neurons. Rows of the pack that produce no neuron, such as those of attention, are left out.

    Raises:
        BaseMismatchError: The checkpoint is not the pack's base.
        DataError: The pack changes no neuron.
    """
    readers = _readers(model)
    found: dict[str, npt.NDArray[np.int64]] = {}
    for part in merged_parameters(model, checkpoint, pack):
        name, rows = _place(model, part)
        if name in readers:
            per_expert = model.get_parameter(name).shape[-2]
            width = _columns(model.get_parameter(readers[name])).shape[1]
            pairs = np.stack([rows // per_expert, rows % per_expert % width], 1)
            found[readers[name]] = np.unique(np.concatenate([found.get(readers[name], pairs), pairs]), axis=0)
    if not found:
        raise DataError(f"{pack.label} changes no neuron of a feed-forward block", advice="Leave the attack pruning out.")
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


def _place(model: nn.Module, part: PatchedRows) -> tuple[str, npt.NDArray[np.int64]]:
    """The parameter that patched rows are in, and their numbers in it, experts flattened."""
    start = part.matrix.data_ptr()
    name, parameter = next(
        (name, one) for name, one in model.named_parameters() if 0 <= start - one.data_ptr() < one.numel() * one.element_size()
    )
    first = (start - parameter.data_ptr()) // (part.matrix.shape[1] * parameter.element_size())
    return name, part.rows.cpu().numpy() + first
