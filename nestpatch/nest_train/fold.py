"""A pack merged into a loaded model, by the merge rule, as `nestpatch apply` would have written it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.interface import Checkpoint, row_blocks
from nestpatch.nest_train.packing import disk_name
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.rows import merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fold(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0, *, rounded: bool = True) -> None:
    """Changes the weights of `model`, which was loaded from `checkpoint`: merged in the dtype on disk, then converted as
    loading converts. Without `rounded`, the change is added as an adapter adds it, to float32 values.

    Raises BaseMismatchError when the checkpoint is not the pack's base.
    """
    plan = make_plan(pack, checkpoint, strength)
    parameters = {}
    for name, parameter in model.named_parameters():
        try:
            parameters[disk_name(name, checkpoint)] = parameter
        except CheckpointFormatError:  # a parameter that is not on disk under its own name, and not patched
            continue
    for tensor in plan.tensors:
        name = tensor.delta.name
        if name not in parameters:
            raise CheckpointFormatError(f"the loaded model has no parameter for {name}")
        for part in row_blocks(tensor.delta.neurons, tensor.info.row_bytes):
            stored = checkpoint.read_rows(name, tensor.delta.rows[part].astype(np.int64))
            change = tensor.delta.dense(part.start, part.stop)
            merged = merge(stored if rounded else stored.astype(np.float32), change, strength)
            rows = torch.from_numpy(tensor.delta.rows[part].astype(np.int64)).to(parameters[name].device)
            values = torch.from_numpy(merged.astype(np.float32))
            parameters[name][rows] = values.to(parameters[name].device, parameters[name].dtype)
