"""Which directions of a model's inputs harmful prompts use, matrix by matrix. Needs torch.

A matrix that maps these directions as before gives harmful prompts the outputs that it gave before, whatever a training
changes elsewhere. Source: the null space of GuardSpace (arXiv 2510.14301), here with a share of the energy instead of an
eigenvalue as its limit, and inputs of length 1, so that the few huge activations of the first token do not decide alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    rows, found, groups = runtime.token_ids(prompts), [], list(_groups(linear))
    for number, names in enumerate(groups):
        sums = {name: _Covariance(linear[name].in_features) for name in names}
        handles = [linear[name].register_forward_pre_hook(sums[name].add) for name in names]
        try:
            with runtime.active(), torch.inference_mode():
                for place, row in enumerate(rows, start=1):
                    ids = torch.tensor([row], device=runtime.model.device)
                    runtime.model.base_model(input_ids=ids, use_cache=False)
                    on_event(Event("guard", number * len(rows) + place, len(groups) * len(rows)))
        finally:
            for handle in handles:
                handle.remove()
        found += [GuardedMatrix(f"{name}.weight", _main_directions(sums[name].total(), energy)) for name in names]
    return tuple(sorted(found, key=lambda one: one.name))


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


class _Covariance:
    """The sum of x x^T over the inputs x of a layer, each of length 1."""

    def __init__(self, width: int) -> None:
        self._width, self._waiting, self._inputs = width, 0, list[Any]()
        self._sum: Any = None

    def add(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Called by the layer with its inputs. As many as its width are multiplied at once: adding matrices takes longest."""
        from torch.nn.functional import normalize

        inputs = normalize(args[0].detach().float().reshape(-1, self._width), dim=1)
        self._inputs.append(inputs)
        self._waiting += len(inputs)
        if self._waiting >= self._width:
            self.total()

    def total(self) -> torch.Tensor:
        """The sum so far, [width, width]."""
        import torch

        if self._inputs:
            inputs = torch.cat(self._inputs)
            product = inputs.T @ inputs
            self._sum = product if self._sum is None else self._sum + product
            self._waiting, self._inputs = 0, []
        found: torch.Tensor = self._sum
        return found


def _main_directions(covariance: torch.Tensor, energy: float) -> Any:
    """Orthonormal float32 [k, in_features]: the fewest directions that hold a share of the energy."""
    import torch

    values, vectors = torch.linalg.eigh(covariance.cpu())
    kept = torch.cumsum(values.flip(0), 0) / values.sum()
    count = int((kept < energy).sum()) + 1
    return vectors.flip(1)[:, :count].T.contiguous().float().numpy()
