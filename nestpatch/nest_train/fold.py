"""A pack merged into a loaded model, by the merge rule, as `nestpatch apply` would have written it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.interface import Checkpoint
from nestpatch.nest_train.packing import disk_name
from nestpatch.pack import Pack
from nestpatch.patcher.merging import Means
from nestpatch.patcher.plan import make_plan, merged_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def fold(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0) -> None:
    """Changes the weights of `model`, which was loaded from `checkpoint`: merged in the dtype on disk, then converted as
    loading converts.

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
        for block in merged_blocks(pack, tensor.delta, strength, checkpoint, Means()):
            rows = torch.from_numpy(tensor.delta.rows[block.part].astype(np.int64)).to(parameters[name].device)
            values = torch.from_numpy(block.new.astype(np.float32))
            parameters[name][rows] = values.to(parameters[name].device, parameters[name].dtype)
