"""Neurons observed while a model computes, and the experts of a layer one by one: to observe and change their neurons, and to
count which of them take part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from nestpatch.runtimes.sharded import no_gradients
from nestpatch.runtimes.text import pad_left
from nestpatch.runtimes.weights import MlpBlock

_FACTOR = 3
"""Experts of a layer that take part, as a multiple of those that a token is routed to: the ones that the router chooses most
often in harmful prompts. A change of others would hardly be seen by these prompts, and every expert costs a probe of its
neurons. Source: GateBreaker (arXiv 2512.21008), which finds safety neurons in these."""

Change = Callable[[torch.Tensor, int], torch.Tensor]
"""(inputs [tokens, in], expert) -> what is added to the gate and up products [tokens, 2 * neurons]."""
See = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(expert, tokens [n], activations [n, neurons])."""


def each_expert(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    change: Change | None = None,
    see: See | None = None,
) -> torch.Tensor:
    """What the experts of a layer compute, to rounding, on any device: a loop as in transformers' own reference.

    Args:
        experts: A module that stacks its experts.
        hidden_states: [tokens, width].
        top_k_index: int64 [tokens, k], the experts of each token.
        top_k_weights: [tokens, k].
        change: Added to the products of the stacked weight.
        see: Called with the activations of every expert that has tokens.

    Returns:
        [tokens, width].
    """
    out = torch.zeros_like(hidden_states)
    for expert in torch.unique(top_k_index).tolist():
        tokens, places = torch.where(top_k_index == expert)
        inputs = hidden_states[tokens]
        products = linear(inputs, experts.gate_up_proj[expert])
        if change is not None:
            products = products + change(inputs, expert)
        acts = experts._apply_gate(products)
        if see is not None:
            see(expert, tokens, acts)
        weighted = linear(acts, experts.down_proj[expert]) * top_k_weights[tokens, places, None]
        out.index_add_(0, tokens, weighted.to(out.dtype))  # no token twice: the order of the sums is fixed
    return out


class _Instead(nn.Module):
    """In the place of an experts module: gives its arguments to a function."""

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, width], int64 [tokens, k], [tokens, k] -> [tokens, width]."""
        return self.compute(hidden_states, top_k_index, top_k_weights)


@contextmanager
def computed_by(block: MlpBlock, compute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, a function computes the experts of a block.

    Args:
        block: A mixture.
        compute: Takes the hidden states, the experts of each token and their weights.
    """
    place = block.projections[0]
    setattr(place.parent, place.attribute, _Instead(compute))
    try:
        yield
    finally:
        setattr(place.parent, place.attribute, block.output)


class Batch:
    """The batch that the model computes now."""

    mask: torch.Tensor
    """bool [prompts, tokens], False where ids are padding."""


def run_batch(model: Any, rows: Sequence[Sequence[int]], pad: int, batch: Batch, *, counted: bool = True) -> None:
    """Runs prompts through a model, for what observes its blocks.

    Args:
        model: A loaded model.
        rows: Token ids of each prompt.
        pad: The id of the padding token.
        batch: Its mask is set.
        counted: False where the prompts are another process's, and run to stay in step with it: no token is observed.
    """
    ids, mask = (torch.from_numpy(part).to(model.device) for part in pad_left(rows, pad))
    batch.mask = mask.bool() & counted
    with no_gradients(model), _one_position(model):
        model(input_ids=ids, attention_mask=mask, use_cache=False)


@contextmanager
def _one_position(model: Any) -> Iterator[None]:
    """Inside, the head sees the last position alone: nobody needs predictions, and FSDP requires that the whole model runs."""
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def pooling(blocks: Sequence[MlpBlock], batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """Observes the neurons of feed-forward blocks.

    Args:
        blocks: The blocks.
        batch: Its mask is read at every forward pass.

    Yields:
        Name of a block -> float32 [prompts, neurons], the activations of the last forward pass, max-pooled over the tokens of
        each prompt; 0 for an expert that no token of the prompt is routed to.
    """
    pooled: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            if block.mixture:
                stack.enter_context(computed_by(block, partial(_pool_experts, block, batch, pooled)))
            else:
                hook = block.output.register_forward_pre_hook(partial(_pool, block, batch, pooled))
                stack.callback(hook.remove)
        yield pooled


def _pool(block: MlpBlock, batch: Batch, pooled: dict[str, torch.Tensor], _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    acts = args[0].detach().view(*batch.mask.shape, block.neurons)
    pooled[block.name] = acts.masked_fill(~batch.mask.unsqueeze(-1), -torch.inf).amax(1).float()


def _pool_experts(block: MlpBlock, batch: Batch, pooled: dict[str, torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    (prompts, length), neurons = batch.mask.shape, block.projections[0].neurons
    places = {expert: place for place, expert in enumerate(block.experts)}
    found = args[0].new_full((prompts, len(places), neurons), -torch.inf, dtype=torch.float32)

    def see(expert: int, tokens: torch.Tensor, acts: torch.Tensor) -> None:
        if expert in places:
            real = batch.mask.flatten()[tokens]
            rows = (tokens[real] // length).unsqueeze(-1).expand(-1, neurons)
            found[:, places[expert]].scatter_reduce_(0, rows, acts[real].detach().float(), "amax")

    out = each_expert(block.output, *args, see=see)
    pooled[block.name] = found.masked_fill(found.isneginf(), 0.0).flatten(1)
    return out


@contextmanager
def counting(blocks: Sequence[MlpBlock], batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
    """Counts how often the routers choose each expert.

    Args:
        blocks: The blocks; those that are no mixtures are left alone.
        batch: Its mask is read at every forward pass.

    Yields:
        Name of a block -> int64 [k, experts]: how many tokens have the expert as their first, second, .. choice.
    """
    counts: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            if block.mixture:
                stack.enter_context(computed_by(block, partial(_count, block, batch, counts)))
        yield counts


def _count(block: MlpBlock, batch: Batch, counts: dict[str, torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
    chosen = args[1][batch.mask.flatten()]
    found = torch.stack([torch.bincount(choice, minlength=len(block.experts)) for choice in chosen.unbind(-1)]).cpu()
    counts[block.name] = counts.get(block.name, 0) + found
    out: torch.Tensor = block.output(*args)
    return out


def busiest(counts: torch.Tensor) -> tuple[int, ...]:
    """The experts that take part.

    Args:
        counts: Of `counting`, int64 [k, experts].

    Returns:
        The `_FACTOR * k` experts that tokens are routed to most often, in the order of their numbers.
    """
    total = counts.sum(0)
    order = torch.argsort(total, descending=True, stable=True)[: _FACTOR * len(counts)].tolist()
    return tuple(sorted(expert for expert in order if total[expert]))
