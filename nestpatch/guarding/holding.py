"""Keeps a model in training to its guard, by projection after each step. Full fine-tuning and LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nestpatch.errors import CheckpointError, GuardMismatchError, UnsupportedModelError
from nestpatch.guarding.guard import Guard, PatchedRows
from nestpatch.runtimes.stored import ParameterHomes, unwrapped

if TYPE_CHECKING:
    import torch
    from torch import nn

_MISSING = 0.25
"""Share of a pack's change that may be missing: the base lacks all of it, rounding to four bits a tenth."""


@dataclass(frozen=True, eq=False)
class _HeldMatrix:
    """A trained matrix, which keeps W Q^T."""

    matrix: torch.Tensor
    """The parameter, [out_features, in_features]."""
    basis: torch.Tensor
    """Q, float32 [k, in_features]."""
    start: torch.Tensor
    """W Q^T at the start, float32 [out_features, k]."""

    def project(self) -> None:
        """Gives the matrix its product with the basis back, and leaves what is orthogonal to the basis."""
        wide = self.matrix.float()
        self.matrix.copy_(wide - (wide @ self.basis.T - self.start) @ self.basis)


@dataclass(frozen=True, eq=False)
class _HeldFactors:
    """The A factors of a LoRA layer, [rank, in_features]. B A has no component in the basis where A has none."""

    factors: Sequence[torch.Tensor]
    basis: torch.Tensor

    def project(self) -> None:
        """Takes the component in the basis out of the factors."""
        for factor in self.factors:
            wide = factor.float()
            factor.copy_(wide - (wide @ self.basis.T) @ self.basis)


_Held: TypeAlias = "_HeldMatrix | _HeldFactors"


@dataclass(frozen=True, eq=False)
class GuardedModel:
    """A model in training that is kept to its guard: call `project` after each step of the optimizer."""

    guard: Guard
    held: tuple[_Held, ...]
    """Empty where nothing of what the guard protects is trained."""

    def project(self) -> None:
        """Takes back what the last step changed of what the guard protects."""
        import torch

        with torch.no_grad():
            for one in self.held:
                one.project()


def guard_model(model: nn.Module, guard: Guard) -> GuardedModel:
    """Prepares a model for a fine-tune that keeps to a guard: a full one, or one with LoRA adapters of PEFT.

    In a full fine-tune every matrix W keeps W Q^T, Q being the directions that harmful prompts use in its inputs. With LoRA
    the change B A has no component in these directions, because the A factor has none. What LoRA starts with is projected at
    once.

    Args:
        model: The patched model, loaded by transformers, with or without adapters.
        guard: From `load_guard`.

    Returns:
        The model's parts that are kept. Its `project` belongs after each step of the optimizer.

    Raises:
        GuardMismatchError: The model is not the one that the guard was made from, or its weights are divided between devices.
        UnsupportedModelError: A guarded matrix has an adapter of another kind than LoRA.
    """
    outer: Any = model  # of PEFT, or the model itself
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    homes, layers = ParameterHomes(inner), _adapted_layers(inner)
    for tensor in guard.tensors:
        _require_patched(homes, tensor, guard)
    done = GuardedModel(guard, tuple(_held(inner, layers, guard)))
    done.project()
    return done


def _held(model: Any, layers: Mapping[str, Any], guard: Guard) -> Iterator[_Held]:
    """What is kept of each matrix that is trained."""
    import torch

    parameters = {unwrapped(name): value for name, value in model.named_parameters()}
    for one in guard.matrices:
        if one.name not in parameters or tuple(parameters[one.name].shape[1:]) != one.basis.shape[1:]:
            raise GuardMismatchError(f"the guard of {guard.pack} is for another model: it has no {one.name} of this width")
        matrix, basis = parameters[one.name], torch.from_numpy(one.basis)
        if one.name in layers:
            yield _HeldFactors(*_factors(one.name, layers[one.name], basis))
        elif matrix.requires_grad:
            basis = basis.to(matrix.device)
            yield _HeldMatrix(matrix, basis, matrix.detach().float() @ basis.T)


def _require_patched(homes: ParameterHomes, tensor: PatchedRows, guard: Guard) -> None:
    """Raises GuardMismatchError where the pack is not in the rows of a tensor."""
    import torch

    try:
        matrix = homes.matrix(tensor.name)
    except CheckpointError as error:
        raise GuardMismatchError(f"the guard of {guard.pack} is for another model: {error}") from error
    expected = (int(np.prod(tensor.shape[:-1])), tensor.shape[-1])
    if tuple(matrix.shape) != expected:
        found = f"{list(matrix.shape)} instead of {list(expected)}"
        raise GuardMismatchError(
            f"the guard of {guard.pack} is for another model: {tensor.name} is {found}",
            advice="A guard needs whole matrices: not those of DeepSpeed ZeRO-3 or FSDP. Otherwise: give the patched model.",
        )
    rows, basis, coordinates = (
        torch.from_numpy(part).to(matrix.device) for part in (tensor.rows, tensor.basis, tensor.coordinates)
    )
    with torch.no_grad():
        missing = float((matrix[rows].float() @ basis.T - coordinates).norm()) / tensor.change
    if not missing <= _MISSING:  # also for NaN
        raise GuardMismatchError(
            f"the model is not the one that the guard was made from: the rows of {tensor.name} are off by {missing:.0%} of the "
            f"change of {guard.pack}"
        )


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name of a weight -> the layer of PEFT that wraps its module."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without PEFT there are no adapters
        return {}
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    # The layers that wrap a bare parameter, such as stacked experts, name it.
    return {f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}": layer for name, layer in layers}


def _factors(name: str, layer: Any, basis: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(the A factors of the adapters of a layer, the basis beside them). Raises UnsupportedModelError for other adapters."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer) or len(layer.lora_magnitude_vector) or not len(layer.lora_A):
        raise UnsupportedModelError(
            f"{name} has an adapter of type {type(layer).__name__} that is not plain LoRA",
            advice="Use LoRA without use_dora on the matrices of the guard, or leave them out of target_modules.",
        )
    factors: list[Any] = [one.weight for one in layer.lora_A.values()]
    return factors, basis.to(factors[0].device)
