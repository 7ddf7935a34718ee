"""Which directions of a model's inputs harmful prompts use, matrix by matrix. Needs torch.

A matrix that maps these directions as before gives harmful prompts the outputs that it gave before, whatever a training
changes elsewhere. Source: the null space of GuardSpace (arXiv 2510.14301), here with a share of the energy instead of an
eigenvalue as its limit, and inputs of length 1, so that the few huge activations of the first token do not decide alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from nestpatch.errors import UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.guarding.guard import GuardedMatrix
from nestpatch.runtimes.states import layers_of
from nestpatch.runtimes.weights import find_mlps

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nestpatch.runtimes.transformers import TransformersRuntime

_MEMORY = 2 << 30
"""Bytes of covariances that are summed up in one pass over the prompts."""


def guarded_matrices(
    runtime: TransformersRuntime, prompts: Sequence[str], energy: float, on_event: OnEvent = ignore
) -> tuple[GuardedMatrix, ...]:
    """Finds for each linear layer the main directions of its inputs on some prompts.

    Args:
        runtime: The model.
        prompts: Harmful prompts.
        energy: The share of the inputs' energy that the directions hold, over 0 and under 1.
        on_event: Receives the progress.

    Returns:
        The matrices, in the order of their names. Experts that are stacked in one parameter have none.

    Raises:
        UnsupportedModelError: The model has no linear layers inside its layers.
    """
    import torch

    linear = dict(_linear_layers(runtime.model))
    if not linear:
        raise UnsupportedModelError(
            "the layers of this model hold no linear layers that a guard could keep", advice="Fine-tune it without a guard."
        )
    rows = runtime.token_ids(prompts)
    readers = _readers(runtime, linear, rows[0])
    groups, bases = list(_groups({name: linear[name] for name in dict.fromkeys(readers.values())})), dict[str, Any]()
    for number, names in enumerate(groups):
        sums: dict[str, torch.Tensor] = {}
        with runtime.active(), torch.inference_mode(), _hooks({name: linear[name] for name in names}, partial(_add, sums)):
            for place, row in enumerate(rows, start=1):
                _read(runtime, row)
                on_event(Event("guard", number * len(rows) + place, len(groups) * len(rows)))
        bases |= {name: _main_directions(total, energy) for name, total in sums.items()}
    # An expert that no prompt is routed to has no directions.
    names = [name for name in sorted(linear) if readers[name] in bases]
    return tuple(GuardedMatrix(f"{name}.weight", bases[readers[name]]) for name in names)


def _read(runtime: TransformersRuntime, row: Sequence[int]) -> None:
    """One forward pass of the layers."""
    import torch

    runtime.model.base_model(input_ids=torch.tensor([row], device=runtime.model.device), use_cache=False)


@contextmanager
def _hooks(linear: dict[str, nn.Linear], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside, a function sees the name and the inputs of each layer."""
    handles = [layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in linear.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readers(runtime: TransformersRuntime, linear: dict[str, nn.Linear], row: Sequence[int]) -> dict[str, str]:
    """Name of each layer -> the first one with the same inputs, such as the query's for the key's: they share directions."""
    import torch

    seen: dict[str, torch.Tensor] = {}  # keeps the inputs alive, so that no two of them have one id
    with runtime.active(), torch.inference_mode(), _hooks(linear, seen.__setitem__):
        _read(runtime, row)
    first = {id(seen[name]): name for name in reversed(linear) if name in seen}
    return {name: first[id(seen[name])] if name in seen else name for name in linear}


def _linear_layers(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside the model's layers, by name: neither embeddings nor the head."""
    from torch import nn

    inside, _ = layers_of(model, find_mlps(model)[0])
    ours = {id(module) for module in inside.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) in ours:
            yield name, module


def _groups(linear: dict[str, nn.Linear]) -> Iterator[list[str]]:
    """The layers in groups whose covariances fit into memory together."""
    group: list[str] = []
    held = 0
    for name, layer in linear.items():
        size = 4 * layer.in_features**2
        if group and held + size > _MEMORY:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _add(sums: dict[str, torch.Tensor], name: str, inputs: torch.Tensor) -> None:
    """Adds x x^T of the inputs x of a layer, each of length 1."""
    from torch.nn.functional import normalize

    inputs = normalize(inputs.detach().float().reshape(-1, inputs.shape[-1]), dim=1)
    product = inputs.T @ inputs
    sums[name] = sums[name].add_(product) if name in sums else product


def _main_directions(covariance: torch.Tensor, energy: float) -> Any:
    """Orthonormal float32 [k, in_features]: the fewest directions that hold a share of the energy."""
    import torch

    values, vectors = torch.linalg.eigh(covariance.cpu())
    kept = torch.cumsum(values.flip(0), 0) / values.sum()
    count = int((kept < energy).sum()) + 1
    return vectors.flip(1)[:, :count].T.contiguous().float().numpy()
