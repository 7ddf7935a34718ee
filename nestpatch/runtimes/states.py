"""Hidden states of a transformers model: the residual stream after a layer, with the tokens of each prompt pooled into one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from nestpatch.runtimes.weights import MlpBlock

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

Places: TypeAlias = Sequence[tuple[int, str]]
"""Layers, each with a pooling of `nestpatch.detector.POOLINGS`."""


def layers_of(model: PreTrainedModel, block: MlpBlock) -> tuple[nn.ModuleList, int]:
    """The layers of a model.

    Args:
        model: A loaded model.
        block: One of its feed-forward blocks.

    Returns:
        (the layers, the number of the one that contains the block); an empty list where there is none.
    """
    from torch import nn

    # The first number in the name: a mixture of experts has lists of its own further down. A layer can be its own block (OPT).
    name = re.match(r"(.*?)\.(\d+)(?:\.|$)", block.name)
    layers = model.get_submodule(name[1]) if name else None
    if name is None or not isinstance(layers, nn.ModuleList):
        return nn.ModuleList(), 0
    return layers, int(name[2])


def hidden_size(model: PreTrainedModel) -> int:
    """The numbers of a hidden state.

    Args:
        model: A loaded model.
    """
    return int(model.config.get_text_config().hidden_size)


@contextmanager
def pooled_states(
    layers: nn.ModuleList, places: Places, mask: Callable[[], torch.Tensor]
) -> Iterator[dict[tuple[int, str], torch.Tensor]]:
    """Observes the outputs of layers.

    Args:
        layers: From `layers_of`.
        places: What is observed.
        mask: Returns bool [prompts, tokens], False where ids are padding; called at every forward pass.

    Yields:
        Place -> float32 [prompts, hidden] of the last forward pass.
    """
    found: dict[tuple[int, str], torch.Tensor] = {}

    def see(layer: int, _: nn.Module, __: Any, output: Any) -> None:
        states = (output[0] if isinstance(output, tuple) else output).detach()
        for place in places:
            if place[0] == layer:
                found[place] = _pool(states, mask(), place[1])

    hooks = [layers[layer].register_forward_hook(partial(see, layer)) for layer in sorted({layer for layer, _ in places})]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[prompts, tokens, hidden], bool [prompts, tokens] -> float32 [prompts, hidden]."""
    import torch

    states = states.view(*mask.shape, states.shape[-1])  # OPT's layers flatten
    if pooling == "last":
        last = mask.long().cumsum(1).argmax(1)
        return states[torch.arange(len(states), device=states.device), last].float()
    if pooling == "max":
        return states.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1).float()
    weights = mask.float() / mask.sum(1, keepdim=True)
    return torch.einsum("pt,pth->ph", weights, states.float())
