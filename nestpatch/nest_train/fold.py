"""A pack merged into a loaded model, by the merge rule, as `nestpatch apply` would have written it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.interface import Checkpoint, row_blocks
from nestpatch.formats.names import expert_of
from nestpatch.nest_train.packing import disk_name, same_weights
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.rows import merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers stacks the matrices of single experts while loading: part of the name on disk -> (stack, which half of it).
_STACKS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None), "w2": ("down_proj", None),
}  # fmt: skip


@torch.no_grad()
def fold(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0, *, rounded: bool = True) -> None:
    """Changes the weights of `model`, which was loaded from `checkpoint`: merged in the dtype on disk, then converted as
    loading converts. Without `rounded`, the change is added as an adapter adds it, to float32 values.

    Raises BaseMismatchError when the checkpoint is not the pack's base.
    """
    plan = make_plan(pack, checkpoint, strength)
    parameters = _by_name_on_disk(model, checkpoint)
    for tensor in plan.tensors:
        name = tensor.delta.name
        matrix = _matrix(name, parameters)
        for part in row_blocks(tensor.delta.neurons, tensor.info.row_bytes):
            rows = tensor.delta.rows[part].astype(np.int64)
            stored = checkpoint.read_rows(name, rows)
            places = torch.from_numpy(rows).to(matrix.device)
            if not same_weights(stored, matrix[places]):
                raise CheckpointFormatError(f"tensor {name} of {checkpoint.path} is not the weight that transformers loaded")
            change = tensor.delta.dense(part.start, part.stop)
            merged = merge(stored if rounded else stored.astype(np.float32), change, strength)
            matrix[places] = torch.from_numpy(merged.astype(np.float32)).to(matrix.device, matrix.dtype)


def _by_name_on_disk(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        try:
            parameters[disk_name(name, checkpoint)] = parameter
        except CheckpointFormatError:  # not on disk under its own name: experts that were stacked while loading
            parameters.setdefault(name, parameter)
    return parameters


def _matrix(name: str, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A view [rows, in_features] of what a tensor on disk became."""
    if name in parameters:
        parameter = parameters[name]
        return parameter.view(-1, parameter.shape[-1])
    expert = expert_of(name)
    if expert is not None and expert[2] in _STACKS:
        stack, half = _STACKS[expert[2]]
        layer = re.search(r"\.\d+\.", name)
        ending = f".experts.{stack}"
        fits = [p for other, p in parameters.items() if layer and layer[0] in other and other.endswith(ending)]
        if len(fits) == 1 and fits[0].ndim == 3 and expert[1] < len(fits[0]):
            matrix = fits[0][expert[1]]
            return matrix if half is None else matrix.chunk(2)[half]
    raise CheckpointFormatError(f"the loaded model has no parameter for {name}")
