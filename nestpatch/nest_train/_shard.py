"""Whether the frozen base is divided between the processes of a training (FSDP2), or whole in each of them."""

from __future__ import annotations

import math

from nestpatch.errors import DataError, OutOfMemoryError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._free import free_on
from nestpatch.nest_train.recipe import Recipe

_SHARE = 0.7
"""Share of the free memory of a device that a whole base may take: the rest is for activations and logits."""


def require_processes(recipe: Recipe) -> None:
    """Checks that there are processes to divide the base between, where that is asked for.

    Args:
        recipe: `shard` is read.

    Raises:
        DataError: There is one process.
    """
    if recipe.shard == "on" and _ranks.HERE.count == 1:
        raise DataError(
            "shard=on divides the base between processes, and there is one",
            advice="Start some: torchrun --nproc-per-node N -m -- nestpatch.nest_train MODEL ...; or leave shard=auto.",
        )


def base_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of a base in memory.

    Args:
        checkpoint: The base.
        dtype: Name of the torch dtype that it is computed in.

    Returns:
        Of all its tensors.
    """
    import torch

    numbers = sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.tensors())
    return numbers * int(getattr(torch, dtype).itemsize)


def choose_shard(recipe: Recipe, device: str, nbytes: int) -> tuple[str, str]:
    """Decides whether the base is divided. The reasons go into the pack, whose bytes must not depend on measured numbers.

    Args:
        recipe: `shard` and `load_in` are read.
        device: Of this process.
        nbytes: From `base_bytes`.

    Returns:
        ("on" or "off", reason).

    Raises:
        OutOfMemoryError: There is one process, and its GPU has less memory than the base takes.
    """
    import torch

    if recipe.shard != "auto":
        return recipe.shard, "asked for"
    if recipe.load_in != "none":
        return "off", "a base in few bits cannot be divided"
    free = free_on(torch.device(device))
    if _ranks.HERE.count > 1:
        fits = nbytes <= _SHARE * free
        return ("off", "the base fits beside the rest") if fits else ("on", "the base does not fit whole beside the rest")
    if device != "cpu" and nbytes > free:
        raise OutOfMemoryError(
            f"the base takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on the device {device}",
            advice="A process for each GPU divides it: torchrun --nproc-per-node N -m -- nestpatch.nest_train MODEL ...; "
            "--set load_in=4bit makes it smaller.",
        )
    return "off", "one process"
