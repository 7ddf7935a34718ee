"""Keeps a model in training to its guard, by projection after each step. Full fine-tuning and LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from nestpatch.errors import CheckpointError, DataError, GuardMismatchError, UnsupportedModelError
from nestpatch.guarding.guard import Guard, GuardedTensor
from nestpatch.rows import row_space
from nestpatch.runtimes.stored import ParameterHomes

if TYPE_CHECKING:
    import torch
    from torch import nn

Mode: TypeAlias = Literal["subspace", "rows"]
"""What is kept: the coordinates of the protected rows in the protected subspace, or these rows as they are."""
_MISSING = 0.25
"""Share of a pack's change that may be missing: the base lacks all of it, rounding to four bits a tenth."""


@dataclass(frozen=True, eq=False)
class _HeldRows:
    """Protected rows of a trained matrix."""

    matrix: torch.Tensor
    """A view [rows of the tensor, in_features] of the parameter."""
    rows: torch.Tensor
    basis: torch.Tensor
    """float32 [k, in_features]."""
    coordinates: torch.Tensor
    """float32 [protected, k]."""

    def distance(self) -> torch.Tensor:
        """How far the coordinates are from those of the patched model, float32 [protected, k]."""
        return self.matrix[self.rows].float() @ self.basis.T - self.coordinates

    def project(self) -> None:
        """Gives the rows their coordinates back, and leaves what is orthogonal to the basis."""
        rows = self.matrix[self.rows].float() - self.distance() @ self.basis
        self.matrix[self.rows] = rows.to(self.matrix.dtype)


@dataclass(frozen=True, eq=False)
class _FrozenRows:
    """Protected rows of a trained matrix, as they are at the start."""

    matrix: torch.Tensor
    rows: torch.Tensor
    start: torch.Tensor

    def project(self) -> None:
        """Gives the rows their start back."""
        self.matrix[self.rows] = self.start


@dataclass(frozen=True, eq=False)
class _HeldInputs:
    """The A factors of a LoRA layer, [rank, in_features]. B A has no component in the subspace where A has none."""

    factors: Sequence[torch.Tensor]
    basis: torch.Tensor

    def project(self) -> None:
        """Takes the component in the basis out of the factors."""
        for factor in self.factors:
            wide = factor.float()
            factor.copy_(wide - (wide @ self.basis.T) @ self.basis)


@dataclass(frozen=True, eq=False)
class _FrozenOutputs:
    """The protected rows of the B factors of a LoRA layer, [out_features, rank]."""

    factors: Sequence[torch.Tensor]
    rows: torch.Tensor

    def project(self) -> None:
        """Makes these rows zero, so that the adapter does not change the protected rows."""
        for factor in self.factors:
            factor[self.rows] = 0


_Held: TypeAlias = "_HeldRows | _FrozenRows | _HeldInputs | _FrozenOutputs"


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


def check_mode(mode: str) -> None:
    """Checks the name of a mode before any work.

    Args:
        mode: One of Mode.

    Raises:
        DataError: It is none.
    """
    if mode not in get_args(Mode):
        raise DataError(f"there is no mode {mode!r}; modes are {', '.join(get_args(Mode))}")


def guard_model(model: nn.Module, guard: Guard, mode: Mode = "subspace") -> GuardedModel:
    """Prepares a model for a fine-tune that keeps to a guard: a full one, or one with LoRA adapters of PEFT.

    In a full fine-tune the protected rows keep their coordinates in the protected subspace (`mode="subspace"`), or do not
    change at all (`mode="rows"`). With LoRA the adapter's change of these rows has no component in the subspace, which is
    reached by taking the component out of the A factor, and so out of the change of all rows of the matrix; or the rows are not
    changed at all. What LoRA starts with is projected at once.

    Args:
        model: The patched model, loaded by transformers, with or without adapters.
        guard: From `load_guard`.
        mode: What is kept.

    Returns:
        The model's parts that are kept. Its `project` belongs after each step of the optimizer.

    Raises:
        DataError: The mode is not known.
        GuardMismatchError: The model is not the one that the guard was made from, or its weights are divided between devices.
        UnsupportedModelError: A protected matrix has an adapter of another kind than LoRA.
    """
    check_mode(mode)
    outer: Any = model  # of PEFT, or the model itself
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    homes, layers = ParameterHomes(inner), _adapted_layers(inner)
    held: list[_Held] = []
    shared: dict[str, list[tuple[GuardedTensor, int]]] = {}
    for tensor in guard:
        rows = _checked(homes, tensor, guard)
        home = homes.home(tensor.name)
        if home.parameter in layers:
            shared.setdefault(home.parameter, []).append((tensor, home.start))
        elif rows.matrix.requires_grad:
            held.append(rows if mode == "subspace" else _FrozenRows(rows.matrix, rows.rows, _copy(rows)))
    for parameter, tensors in shared.items():
        held.append(_held_factors(parameter, layers[parameter], tensors, mode))
    done = GuardedModel(guard, tuple(held))
    done.project()
    return done


def _checked(homes: ParameterHomes, tensor: GuardedTensor, guard: Guard) -> _HeldRows:
    """The protected rows of one tensor in a loaded model. Raises GuardMismatchError where the pack is not in them."""
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
    device = matrix.device
    rows = _HeldRows(
        matrix,
        torch.from_numpy(tensor.rows).to(device),
        torch.from_numpy(tensor.basis).to(device),
        torch.from_numpy(tensor.coordinates).to(device),
    )
    with torch.no_grad():
        missing = float(rows.distance().norm()) / tensor.change
    if not missing <= _MISSING:  # also for NaN
        raise GuardMismatchError(
            f"the model is not the one that the guard was made from: the rows of {tensor.name} are off by {missing:.0%} of the "
            f"change of {guard.pack}"
        )
    return rows


def _copy(rows: _HeldRows) -> torch.Tensor:
    return rows.matrix[rows.rows].detach().clone()


def _adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Name of a weight -> the layer of PEFT that wraps its module."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # without PEFT there are no adapters
        return {}
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    # The layers that wrap a bare parameter, such as stacked experts, name it.
    return {f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}": layer for name, layer in layers}


def _held_factors(name: str, layer: Any, tensors: Sequence[tuple[GuardedTensor, int]], mode: Mode) -> _Held:
    """What is kept of the adapters of one layer, whose weight holds one or several tensors, from some row on each."""
    import torch
    from peft.tuners.lora import LoraLayer

    plain = isinstance(layer, LoraLayer) and len(layer.lora_A) and not hasattr(layer, "parameter_name")
    if not plain or len(layer.lora_magnitude_vector) or getattr(layer, "lora_variant", None):
        raise UnsupportedModelError(
            f"{name} has an adapter of type {type(layer).__name__} that is not plain LoRA",
            advice="Use LoRA without use_dora on the matrices of the guard, or leave them out of the adapter's targets.",
        )
    device = layer.lora_A[next(iter(layer.lora_A))].weight.device
    if mode == "rows":
        rows = np.concatenate([tensor.rows + start for tensor, start in tensors])
        return _FrozenOutputs([one.weight for one in layer.lora_B.values()], torch.from_numpy(rows).to(device))
    basis = row_space(np.concatenate([tensor.basis for tensor, _ in tensors]))
    return _HeldInputs([one.weight for one in layer.lora_A.values()], torch.from_numpy(basis).to(device))
