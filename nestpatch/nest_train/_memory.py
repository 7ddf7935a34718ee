"""How much of a step is computed at once: what fits into the memory of the device, found before the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import saved_tensors_hooks

from nestpatch.errors import OutOfMemoryError
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._free import free_on
from nestpatch.nest_train._run import Run
from nestpatch.nest_train._targets import Example, Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss, batch_sizes, part_of
from nestpatch.nest_train._tune_state import Trainable
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.sharded import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PEAK = 2.5
"""Memory of a step on a CPU over what autograd keeps for its backward pass: gradients and copies of logits (1.3 to 2.2 times as
much were measured)."""


def fit_memory(run: Run, trunk: Trunk, change: Trainable, examples: Examples, folder: Path) -> int:
    """Decides how many examples of a step are computed at once, and whether their activations are kept for the backward pass.

    An accelerator tries it: a step with the longest examples is done, in micro-batches that are halved as long as the memory
    does not suffice. An operating system ends a process that takes too much instead: on a CPU the need is estimated from what
    autograd keeps of a few examples, and so it is where the base is divided between processes.

    Args:
        run: The base. The choices are recorded in it.
        trunk: Its `checkpointing` is set. What it has remembered afterwards is of no use.
        change: What is trained; its values do not change.
        examples: The training examples.
        folder: For the hidden states of the longest examples.

    Returns:
        Examples in a micro-batch, at most.

    Raises:
        OutOfMemoryError: Not even one example fits.
    """
    recipe = run.recipe
    batch = part_of(longest_batch(examples, recipe), 0)  # of many ranks the first has the longest examples
    whole = len(batch.harmful + batch.harmless)
    sizes = [min(recipe.micro_batch, whole)] if recipe.micro_batch else _halvings(whole)
    modes = {"auto": (False, True), "on": (True,), "off": (False,)}[recipe.checkpointing] if trunk.layers else (False,)
    step = partial(_step, trunk, change, recipe, batch, folder)
    for mode in modes:
        trunk.checkpointing = mode
        if recipe.micro_batch and len(modes) == 1:
            size: int | None = sizes[0]
        elif not _survives(run.model):
            one = _bytes_of_one(run, trunk, change, batch, folder)
            size = _largest(sizes, partial(_suffices, run.model.device, one))
        else:
            size = _largest(sizes, lambda size: _runs(partial(step, size)))
        if size := min(_ranks.gathered(size or 0)):
            _record(run, trunk, size, whole)
            return size
    longest = max(one.length for one in batch.harmful + batch.harmless)
    raise OutOfMemoryError(
        f"one example of {longest} tokens does not fit into the memory of the device {run.model.device} beside the model",
        advice="A smaller base in memory (--set load_in=4bit) or shorter prompts (--set max_prompt_tokens=N) may fit.",
    )


def _record(run: Run, trunk: Trunk, size: int, whole: int) -> None:
    """The choices and their reasons; they go into the pack, whose bytes must not depend on measured numbers."""
    recipe = run.recipe
    why = "the whole batch fits into memory" if size == whole else "more do not fit into memory"
    run.decide("micro-batch", f"{size} of {whole} examples", "asked for" if recipe.micro_batch else why)
    if not trunk.layers:
        why = "this architecture has no list of layers"
    elif recipe.checkpointing != "auto":
        why = "asked for"
    else:
        why = "not one example fits into memory otherwise" if trunk.checkpointing else "activations fit into memory"
    run.decide("checkpointing", "on" if trunk.checkpointing else "off", why)


def longest_batch(examples: Examples, recipe: Recipe) -> Examples:
    """The largest batch that a training can draw.

    Args:
        examples: What is drawn from.
        recipe: How many of each kind are in a batch.

    Returns:
        The longest examples of each kind, longest first; some are repeated where there are too few.
    """
    found: list[tuple[Example, ...]] = []
    for kind, size in zip((examples.harmful, examples.benign, examples.lookalike), batch_sizes(examples, recipe), strict=True):
        order = sorted(kind, key=lambda example: example.length, reverse=True)
        found.append(tuple(order[i % len(order)] for i in range(size)))
    return Examples(*found)


def _halvings(whole: int) -> list[int]:
    """The whole, half of it, and so on to 1."""
    sizes = [whole]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if fits(size)), None)


def _step(trunk: Trunk, change: Trainable, recipe: Recipe, batch: Examples, folder: Path, size: int) -> None:
    """What a training does with a batch, but for the change of the trained values."""
    every = batch.harmful + batch.harmless
    trunk.remember([e.tokens for e in every], [e.tokens for e in batch.harmless], folder, batch=size)
    with change.attached():
        batch_loss(trunk, dataclasses.replace(recipe, micro_batch=size), batch, torch.Tensor.backward)


def _runs(step: Callable[[], None]) -> bool:
    """Whether the memory suffices for a step."""
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    try:
        step()
        done = True
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        done = False
    # After the except clause: the error holds the frames, and these the tensors.
    clear_device_cache(garbage_collection=True)
    return done


def _survives(model: PreTrainedModel) -> bool:
    """Whether running out of memory is an error that can be caught, after which the processes are still in step."""
    return model.device.type != "cpu" and not is_sharded(model)


def _suffices(device: torch.device, one: int, size: int) -> bool:
    return size * one * _PEAK <= free_on(device)


def _bytes_of_one(run: Run, trunk: Trunk, change: Trainable, batch: Examples, folder: Path) -> int:
    """Bytes that autograd keeps for the backward pass of one example: the mean of the longest ones of each kind."""
    few = Examples(batch.harmful[:1], batch.benign[:1], batch.lookalike[:1])
    every = few.harmful + few.harmless
    mode = trunk.checkpointing
    trunk.remember([e.tokens for e in every], [e.tokens for e in few.harmless], folder)
    with change.attached():
        trunk.checkpointing = False
        kept = _kept_bytes(run, trunk, few)
        trunk.checkpointing = mode
        if mode:  # one layer's activations at a time, and the inputs of all layers, which are about as large again
            outside = _kept_bytes(run, trunk, few)
            kept = outside + 2 * (kept - outside) // trunk.layers
    return kept // len(every)


def _kept_bytes(run: Run, trunk: Trunk, batch: Examples) -> int:
    """Bytes that autograd keeps for the backward pass of a batch, without the model's own weights."""
    held = [] if is_sharded(run.model) else run.model.parameters()
    weights = {parameter.untyped_storage().data_ptr() for parameter in held}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = batch_loss(trunk, dataclasses.replace(run.recipe, micro_batch=0), batch)
    # Weights that were gathered for a layer are freed by now, and have 0 bytes.
    found = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    del loss  # until here, so that no storage of an activation was freed and its address used again
    return found
