"""The stage tune: trains the deltas and nothing else. Source: NeST (arXiv 2602.16835), section on tuning."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from nestpatch.evaluation.judges import is_refusal
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train import _ranks
from nestpatch.nest_train._targets import Example, Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune_state import Look, Trainable, TuneResult, TuneState
from nestpatch.nest_train.recipe import Recipe

_WINDOW = 8
"""Batches that are drawn together and sorted by length."""

Answer = Callable[[Sequence[str]], list[str]]
"""Prompts -> the beginnings of the model's answers."""
Loss = Callable[[Trunk, Recipe, Examples], torch.Tensor]
"""The model, the settings and a batch -> a scalar. It is also called for held-out prompts, then without gradients."""


def tune(
    trunk: Trunk,
    deltas: Trainable,
    data: Examples,
    answer: Answer,
    recipe: Recipe,
    on_event: OnEvent = ignore,
    state: TuneState | None = None,
    loss_function: Loss | None = None,
) -> TuneResult:
    """Trains the deltas, stops early by held-out prompts, and leaves the best deltas in place.

    Args:
        trunk: The frozen base, which has seen the examples.
        deltas: The deltas, changed in place.
        data: The training examples; a share of them is held out.
        answer: Answers prompts by the model as it is now; used where `check_prompts` is over 0.
        recipe: The settings of the stage, and the seed.
        on_event: Called with the loss after every step, and with what the held-out prompts showed.
        state: Where an interrupted tuning goes on, and where this one is stored; None begins one that is not stored.
        loss_function: What is minimised; None for `batch_loss`.

    Returns:
        How many steps were done, and what the held-out prompts showed.

    Raises:
        PromptDataError: A kind has fewer than two examples.
    """
    from accelerate import Accelerator

    rng = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    kept, held_out = data.split_off(recipe.tune_holdout, rng)
    accelerator = Accelerator(cpu=deltas.device.type == "cpu")
    groups = deltas.groups(recipe.learning_rate)
    optimizer = accelerator.prepare(torch.optim.AdamW(groups, lr=0.0, weight_decay=recipe.weight_decay))
    parameters = [parameter for group in groups for parameter in group["params"]]
    loss_of = partial(_whole, loss_function, trunk, recipe) if loss_function else partial(_dealt, trunk, recipe, parameters)
    state = state or TuneState()
    with deltas.attached():

        def look(step: int) -> None:
            found = _look(step, held_out, loss_of, answer, recipe)
            now = _ranks.from_first(lambda: found)  # it decides on every rank when the tuning stops
            state.looked(now, deltas)
            on_event(Event("tune", step, recipe.steps, str(now), now.scalars))

        if not state.enter(deltas, optimizer):
            look(0)
            state.save(deltas, optimizer, now=True)
        # Batches that were done before an interruption are drawn again: the generator is then where it was.
        for batch in islice(batches(kept, recipe, rng), state.step, recipe.steps):
            if state.stale >= recipe.patience:
                break
            began, step = time.perf_counter(), state.step + 1
            rate = _schedule(optimizer, step, recipe)
            optimizer.zero_grad()  # first: an attempt that ran out of memory may have left some
            loss = loss_of(batch, accelerator.backward)
            accelerator.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            deltas.round_rows()
            state.stepped(loss.item(), batch.token_count, time.perf_counter() - began)
            note = f"loss {state.losses[-1]:.4f}, {state.tokens_per_second:.0f} tokens/s"
            values = {"loss": state.losses[-1], "learning_rate": rate, "tokens_per_second": state.tokens_per_second}
            on_event(Event("tune", step, recipe.steps, note, values))
            if at_look := step % recipe.check_every == 0 or step == recipe.steps:
                look(step)
            state.save(deltas, optimizer, now=at_look)
        stale = state.stale * recipe.check_every
        every = state.step == recipe.steps
        state.reason = f"all {recipe.steps} steps done" if every else f"no better held-out prompts in {stale} steps"
        state.save(deltas, optimizer, now=True)
    state.keep_best(deltas)
    return state.result


def _dealt(
    trunk: Trunk,
    recipe: Recipe,
    parameters: Sequence[torch.nn.Parameter],
    batch: Examples,
    backward: Callable[[torch.Tensor], Any] | None = None,
) -> torch.Tensor:
    """`batch_loss` by all ranks: each computes its part, and has the loss and the gradients of the whole afterwards."""
    loss = batch_loss(trunk, recipe, batch, backward, part_of(batch, _ranks.HERE.rank))
    if _ranks.HERE.count == 1:
        return loss
    if backward is not None:
        _ranks.sum_gradients(parameters)
    return torch.tensor(sum(_ranks.gathered(loss.item())))


def _whole(
    loss_function: Loss, trunk: Trunk, recipe: Recipe, batch: Examples, backward: Callable[[torch.Tensor], Any] | None = None
) -> torch.Tensor:
    """Another loss, called as `batch_loss` is; it is computed without micro-batches."""
    loss = loss_function(trunk, recipe, batch)
    if backward is not None:
        backward(loss)
    return loss.detach() if backward is not None else loss


def _schedule(optimizer: Any, step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero. Returns the recipe's learning rate at this step."""
    progress = (step - 1) / recipe.steps
    warm = min(1.0, step / max(1.0, recipe.warmup * recipe.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warm * cosine
    return recipe.learning_rate * warm * cosine


def batches(data: Examples, recipe: Recipe, rng: random.Random) -> Iterator[Examples]:
    """Batches without end, each of examples of similar length, so that little is padded.

    Every example of a kind is drawn once before any is drawn again; the `_WINDOW` batches drawn last come in random order. A
    batch has an example twice only where the kind has fewer than the batch takes.

    Args:
        data: What to draw from.
        recipe: How many of each kind are in a batch.
        rng: Decides the order.

    Yields:
        The next batch.
    """
    kinds, sizes = (data.harmful, data.benign, data.lookalike), batch_sizes(data, recipe)
    queues: list[list[Example]] = [[], [], []]
    while True:
        window = [_window(*one, rng) for one in zip(queues, kinds, sizes, strict=True)]
        for place in rng.sample(range(_WINDOW), _WINDOW):
            yield Examples(*(kind[place] for kind in window))


def _window(queue: list[Example], kind: Sequence[Example], size: int, rng: random.Random) -> list[tuple[Example, ...]]:
    """`_WINDOW` batches of one kind, taken from its queue: the shortest examples first."""
    found: list[tuple[Example, ...]] = []
    while len(found) < _WINDOW:
        # Sorting more than a small kind has would put the repetitions of an example, which are equally long, together.
        count = max(1, min(_WINDOW - len(found), len(kind) // max(1, size)))
        while len(queue) < count * size:
            waiting = set(queue)
            queue.extend(sorted(rng.sample(kind, len(kind)), key=waiting.__contains__))  # those that wait come last
        part = sorted(queue[: count * size], key=lambda example: len(example.tokens.prompt))
        del queue[: count * size]
        found += [tuple(part[i * size : (i + 1) * size]) for i in range(count)]
    return found


def batch_sizes(data: Examples, recipe: Recipe) -> tuple[int, int, int]:
    """Examples of each kind in a batch; the share of a harmless kind without examples goes to the other.

    Args:
        data: What is drawn from.
        recipe: The numbers where there are examples of every kind.

    Returns:
        Harmful, benign and look-alike examples.
    """
    benign, looks = recipe.benign_batch, recipe.lookalike_batch
    if not data.lookalike:
        benign, looks = benign + looks, 0
    elif not data.benign:
        benign, looks = 0, benign + looks
    return recipe.harmful_batch, benign, looks


def batch_loss(
    trunk: Trunk,
    recipe: Recipe,
    batch: Examples,
    backward: Callable[[torch.Tensor], None] | None = None,
    part: Examples | None = None,
) -> torch.Tensor:
    """The loss of one batch: cross entropy of refusals, and for harmless prompts divergence from the base and cross entropy.

    Each is a mean over its examples, so that long answers do not outweigh short ones. Within an answer the first token weighs
    `first_token_weight` and the others 1: at the first one it is decided whether the model refuses.

    Args:
        trunk: The model, with or without deltas.
        recipe: The weights and `micro_batch` are read.
        batch: Examples that the trunk has seen.
        backward: Called with the share of each micro-batch, so that the gradients add up to those of the whole batch, and the
            activations of one micro-batch alone are in memory.
        part: The examples of the batch that are computed; None for all of them. The losses and the gradients of all parts add
            up to those of the batch.

    Returns:
        A scalar; without a gradient where `backward` was called.
    """
    shares = []
    parts = micro_batches(batch if part is None else part, recipe.micro_batch)
    for place in range(max(len(parts), _passes(trunk, recipe, batch))):
        idle = place >= len(parts)
        share = _share(trunk, recipe, _shortest(batch) if idle else parts[place], batch)
        if idle:
            share = 0 * share
        if backward is not None:
            backward(share)
            share = share.detach()
        shares.append(share)
    return torch.stack(shares).sum() if shares else torch.zeros(())


def _passes(trunk: Trunk, recipe: Recipe, batch: Examples) -> int:
    """Passes that every rank must make where the base is divided: those of the first one, which has the largest part."""
    return len(micro_batches(part_of(batch, 0), recipe.micro_batch)) if trunk.sharded else 0


def _shortest(batch: Examples) -> Examples:
    """The example that a rank computes in step with the others when its own part is done."""
    return _of_kinds(_longest_first(batch)[-1:])


def micro_batches(batch: Examples, size: int) -> list[Examples]:
    """Divides a batch into parts of similar length, the longest first: where memory does not suffice, it shows at once.

    Args:
        batch: The batch.
        size: Examples of all kinds in a part, at most; 0 leaves the batch whole.

    Returns:
        The parts; a part may have no example of a kind.
    """
    every = _longest_first(batch)
    if not 0 < size < len(every):
        return [batch] if every else []
    return [_of_kinds(every[start : start + size]) for start in range(0, len(every), size)]


def part_of(batch: Examples, rank: int) -> Examples:
    """What a rank computes of a batch: every n-th of its examples by length, so that all ranks have about as much to do.

    Args:
        batch: The batch.
        rank: The number of the rank.

    Returns:
        The whole batch where there is one rank. A part may have no example of a kind, or none at all.
    """
    return batch if _ranks.HERE.count == 1 else _of_kinds(_longest_first(batch)[rank :: _ranks.HERE.count])


def _longest_first(batch: Examples) -> list[tuple[int, Example]]:
    """(kind, example) of a batch."""
    kinds = (batch.harmful, batch.benign, batch.lookalike)
    every = [(kind, example) for kind, examples in enumerate(kinds) for example in examples]
    return sorted(every, key=lambda one: one[1].length, reverse=True)


def _of_kinds(examples: Sequence[tuple[int, Example]]) -> Examples:
    """The opposite of `_longest_first`."""
    return Examples(*(tuple(one for place, one in examples if place == kind) for kind in range(3)))


def _share(trunk: Trunk, recipe: Recipe, part: Examples, whole: Examples) -> torch.Tensor:
    """What a part of a batch adds to the batch's loss, whose means are over the examples of the whole."""
    harmful = [example.tokens for example in part.harmful]
    harmless = [example.tokens for example in part.harmless]
    logits, labels, base = trunk.logits(harmful + harmless, harmless if recipe.kl_weight else ())
    weights = torch.cat([_token_weights(len(pair.answer), recipe) for pair in harmful + harmless]).to(logits.device)
    border = sum(len(pair.answer) for pair in harmful)
    refusals = cross_entropy(logits[:border], labels[:border], reduction="none")
    loss = (refusals * weights[:border]).sum() / max(1, len(whole.harmful))
    if not harmless:
        return loss
    per_token = torch.zeros_like(weights[border:])
    if recipe.benign_weight:
        per_token = per_token + recipe.benign_weight * cross_entropy(logits[border:], labels[border:], reduction="none")
    if recipe.kl_weight:
        ours, theirs = log_softmax(logits[border:], -1), log_softmax(base, -1)
        wanted, given = (ours, theirs) if recipe.kl_direction == "reverse" else (theirs, ours)
        divergence = kl_div(given, wanted, reduction="none", log_target=True)
        per_token = per_token + recipe.kl_weight * divergence.sum(-1)
    return loss + (per_token * weights[border:]).sum() / len(whole.harmless)


def _token_weights(tokens: int, recipe: Recipe) -> torch.Tensor:
    """float32 [tokens], of sum 1."""
    weights = torch.ones(tokens)
    weights[0] = recipe.first_token_weight
    return weights / weights.sum()


def _look(step: int, held_out: Examples, loss_of: Callable[[Examples], torch.Tensor], answer: Answer, recipe: Recipe) -> Look:
    """The held-out loss, and what the model answers to some of the held-out prompts."""
    loss = _held_out_loss(held_out, loss_of, recipe)
    count = recipe.check_prompts
    if not count:
        return Look(step, loss)
    kinds = [kind[:count] for kind in (held_out.harmful, held_out.benign, held_out.lookalike)]
    verdicts = iter([is_refusal(text) for text in answer([example.text for kind in kinds for example in kind])])
    refused = [sum(next(verdicts) for _ in kind) / len(kind) if kind else None for kind in kinds]
    answered = None if refused[0] is None else 1 - refused[0]
    return Look(step, loss, answered, refused[1], refused[2], count)


@torch.no_grad()
def _held_out_loss(data: Examples, loss_of: Callable[[Examples], torch.Tensor], recipe: Recipe) -> float:
    """The loss over all held-out examples, in batches that each have a part of every kind."""
    kinds = (data.harmful, data.benign, data.lookalike)
    size = recipe.harmful_batch + recipe.benign_batch + recipe.lookalike_batch
    parts = min(math.ceil(sum(map(len, kinds)) / size), *(len(kind) for kind in kinds if kind))
    losses = [loss_of(Examples(*(kind[part::parts] for kind in kinds))).item() for part in range(parts)]
    return sum(losses) / len(losses)
