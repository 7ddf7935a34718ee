"""Where the weights of a loaded model are stored: transformers renames tensors and stacks experts while loading."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointError, CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.runtimes.quantized import float_weight, quantized_layers, resembles
from nestpatch.runtimes.sharded import whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_STACKED = ["MergeModulelist(dim=0)"]
_STACKED_AND_FUSED = ["MergeModulelist(dim=0)", "Concatenate(dim=1)"]
_FUSED = ["Concatenate(dim=0)"]
"""What transformers does with several tensors to make a parameter of them, where rows stay rows."""


@dataclass(frozen=True)
class Home:
    """The rows of a parameter that a tensor on disk became. The experts of a stacked parameter are flattened into rows."""

    parameter: str
    start: int
    rows: int


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Some rows of a parameter that are stored in one tensor.

    Attributes:
        tensor: Its name on disk.
        part: Which of the rows that were asked for.
        rows: Their numbers in the tensor, int64.
    """

    tensor: str
    part: slice
    rows: IntArray


class ParameterHomes:
    """The parameters of a loaded model, by the names of the tensors on disk that they were loaded from.

    The names are those that transformers itself computes while loading. A layer that PEFT wrapped keeps the name that it had.

    Args:
        model: Loaded by transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._prefix = model.base_model_prefix
        self._quantized = {unwrapped(name): layer for name, layer in quantized_layers(model).items()}
        named = model.named_parameters(remove_duplicate=False)
        self._parameters: dict[str, torch.Tensor] = {unwrapped(name): parameter for name, parameter in named}
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def home(self, tensor: str) -> Home:
        """Finds what a tensor became.

        Args:
            tensor: Its name on disk.

        Returns:
            The parameter, and which of its rows.

        Raises:
            CheckpointFormatError: The model has no parameter for it.
            UnsupportedModelError: transformers rearranges its rows while loading.
        """
        from transformers.core_model_loading import rename_source_key

        name, pattern = rename_source_key(tensor, self._renamings, self._converters, self._prefix, self._parameters)
        if name not in self._parameters:
            raise CheckpointFormatError(f"the loaded model has no parameter for {tensor}")
        shape = self._shape(name)
        if pattern is None:
            return Home(name, 0, _rows(shape))
        converter = next(one for one in self._converters if pattern in one.source_patterns)
        parts, steps = len(converter.source_patterns), [repr(step) for step in converter.operations]
        number = (
            re.search(r"\.(\d+)\.".join(re.escape(end) for end in pattern.split(".*.")), tensor) if ".*." in pattern else None
        )
        if steps == _FUSED and len(shape) == 2:
            expert = 0
        elif steps == (_STACKED_AND_FUSED if parts > 1 else _STACKED) and len(shape) == 3 and number:
            expert = int(number[1])
        else:
            raise UnsupportedModelError(
                f"transformers rearranges the rows of {tensor} while loading ({', '.join(steps)})",
                advice="A pack changes rows of the file, and these are no rows of the model. Train another model.",
            )
        each = shape[-2] // parts
        return Home(name, expert * shape[-2] + converter.source_patterns.index(pattern) * each, each)

    def matrix(self, tensor: str) -> torch.Tensor:
        """The rows of the loaded model that a tensor became.

        Args:
            tensor: Its name on disk.

        Returns:
            A view [rows, in_features] of the parameter; of a layer in few bits a copy of the weight that it computes with.

        Raises:
            CheckpointError: As `home`.
        """
        home = self.home(tensor)
        layer = self._quantized.get(home.parameter)
        weight = self._parameters[home.parameter] if layer is None else float_weight(layer)
        return weight.view(-1, weight.shape[-1])[home.start : home.start + home.rows]

    def _shape(self, parameter: str) -> tuple[int, ...]:
        """Of the matrix that the parameter stands for: in few bits it is stored in another shape."""
        layer = self._quantized.get(parameter)
        return tuple(self._parameters[parameter].shape) if layer is None else (layer.out_features, layer.in_features)


class StoredWeights(ParameterHomes):
    """The parameters of a loaded model, and the tensors on disk that they were loaded from.

    Args:
        model: Loaded from `checkpoint`.
        checkpoint: The model on disk.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        super().__init__(model)
        self.checkpoint = checkpoint

    @cached_property
    def _tensors(self) -> dict[str, list[tuple[Home, str]]]:
        """Parameter -> the tensors that it was loaded from, in the order of its rows."""
        # A GGUF file is loaded as the model of transformers that it was made of, and packs use the names of that one.
        on_disk = FloatModel(self.checkpoint) if isinstance(self.checkpoint, GgufCheckpoint) else self.checkpoint
        found: dict[str, list[tuple[Home, str]]] = {}
        for tensor in on_disk.tensors():
            try:
                home = self.home(tensor)
            except CheckpointError:  # such as an attention matrix that is permuted; what is asked for is checked below
                continue
            found.setdefault(home.parameter, []).append((home, tensor))
        return {name: sorted(tensors, key=lambda one: one[0].start) for name, tensors in found.items()}

    def tensors(self, parameter: str) -> tuple[tuple[Home, str], ...]:
        """Finds the tensors that a matrix was loaded from.

        Args:
            parameter: The parameter's name in the loaded model.

        Returns:
            (rows of the parameter, name on disk) of each tensor, in the order of the rows.

        Raises:
            CheckpointFormatError: The tensors on disk do not make up the parameter.
        """
        end, found = 0, self._tensors.get(parameter, [])
        for home, tensor in found:
            if home.start != end or self.checkpoint.info(tensor).rows != home.rows:
                break
            end += home.rows
        if not found or end != _rows(self._shape(parameter)):
            names = ", ".join(tensor for _, tensor in found[:3]) or "none"
            raise CheckpointFormatError(
                f"{self.checkpoint.path} has no tensor for the parameter {parameter} (candidates: {names})",
                advice="transformers changes this model's weights while loading; nestpatch cannot map them to the file.",
            )
        return tuple(found)

    def split(self, parameter: str, rows: IntArray) -> Iterator[StoredRows]:
        """Cuts rows of a parameter by the tensors that store them.

        Args:
            parameter: The parameter's name in the loaded model.
            rows: Sorted row numbers, int64 [rows].

        Yields:
            The rows of each tensor that has some.

        Raises:
            CheckpointFormatError: As `tensors`.
        """
        for home, tensor in self.tensors(parameter):
            begin, end = np.searchsorted(rows, (home.start, home.start + home.rows))
            if begin < end:
                yield StoredRows(tensor, slice(int(begin), int(end)), rows[begin:end] - home.start)

    def require_same(self, parameter: str, rows: IntArray) -> None:
        """Checks that rows on disk are those of the loaded model.

        Args:
            parameter: The parameter's name in the loaded model.
            rows: Sorted row numbers, int64 [rows].

        Raises:
            CheckpointFormatError: They differ.
        """
        layer = self._quantized.get(parameter)
        weight = float_weight(layer) if layer is not None else whole(self._parameters[parameter].detach())
        matrix, same = weight.reshape(-1, weight.shape[-1]), same_weights if layer is None else resembles
        for stored in self.split(parameter, rows):
            if not same(float_rows(self.checkpoint, stored.tensor, stored.rows), matrix[rows[stored.part]]):
                raise CheckpointFormatError(
                    f"tensor {stored.tensor} of {self.checkpoint.path} is not the weight that transformers loaded"
                )


def unwrapped(parameter: str) -> str:
    """The name that a parameter had before PEFT wrapped its layer.

    Args:
        parameter: Its name now.
    """
    return parameter.replace(".base_layer.", ".")


def _rows(shape: tuple[int, ...]) -> int:
    """Rows of a matrix, experts flattened; a vector has one."""
    return int(np.prod(shape[:-1]))


def same_weights(stored: Any, parameter: torch.Tensor) -> bool:
    """Compares rows on disk with rows of the loaded model, after the conversion that loading made.

    Args:
        stored: Rows as they are on disk, decoded where they are quantized.
        parameter: The same rows of the loaded model.

    Returns:
        True when every element is equal.
    """
    import torch

    # Through float32: every stored dtype widens to it exactly, and it narrows as loading does.
    loaded = torch.from_numpy(stored.astype(np.float32)).to(parameter.dtype)
    return torch.equal(loaded, parameter.cpu())
