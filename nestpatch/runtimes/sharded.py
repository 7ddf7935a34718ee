"""A model whose weights are divided between processes: FSDP2 (`torch.distributed.fsdp.fully_shard`), as transformers loads it.

Each process holds a share of every matrix. A layer's matrices are gathered before it computes and freed after it, so that a
process has its share and one layer at a time. Every process must therefore make the same forward and backward passes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def sharding_options(shares: int) -> dict[str, Any]:
    """Arguments of `from_pretrained` that load one share of a model into each process.

    Args:
        shares: Processes of the group; 1 loads the whole model.

    Returns:
        The arguments; none for 1.
    """
    if shares == 1:
        return {}
    from transformers.distributed.configuration_utils import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=shares)}


def free_after_use(model: Any) -> None:
    """Frees every gathered matrix after it was used: FSDP2 keeps some for a backward pass, which a frozen model does not need.

    Args:
        model: Loaded with `sharding_options`.
    """
    model.set_reshard_after_forward(True)


def is_sharded(model: Any) -> bool:
    """Whether the weights of a model are divided between processes.

    Args:
        model: A loaded model.
    """
    return bool(getattr(model, "_is_fsdp_managed_module", False))


def whole(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight. Where it is divided, all processes must ask for it.

    Args:
        weight: Of a loaded model, outside of a forward pass.

    Returns:
        The same where the process has all of it; a gathered copy otherwise.
    """
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def no_gradients(model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Inside, no gradients are recorded.

    Args:
        model: Where it is divided, the weights that it gathers must be of use for gradients later, which tensors of PyTorch's
            inference mode are not.
    """
    import torch

    return torch.no_grad() if is_sharded(model) else torch.inference_mode()


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes of the parameters that this process holds between two forward passes.

    Args:
        model: A loaded model.

    Returns:
        Of the shares where it is divided.
    """
    from torch.distributed.tensor import DTensor

    parts = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    return sum(int(part.nbytes) for part in parts)
