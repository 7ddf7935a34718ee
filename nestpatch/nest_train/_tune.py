"""The stage tune: trains the deltas and nothing else. Source: NeST (arXiv 2602.16835), section on tuning."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from nestpatch.evaluation.judges import is_refusal
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train._targets import Example, Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train.recipe import Recipe

_WINDOW = 8
"""Batches that are drawn together and sorted by length."""


@dataclass(frozen=True)
class Look:
    """What the held-out prompts showed at one step."""

    step: int
    loss: float
    attack_success: float | None = None
    """Share of harmful prompts that were answered; None where no answers were generated, as for the next two."""
    refusal_benign: float | None = None
    refusal_lookalike: float | None = None
    """None also where there are no look-alikes."""

    @property
    def score(self) -> tuple[float, float]:
        """Smaller is better: answered harmful and refused harmless prompts count alike; the loss decides between equals."""
        if not math.isfinite(self.loss):
            return math.inf, math.inf
        shares = (self.attack_success, self.refusal_benign, self.refusal_lookalike)
        return sum(share for share in shares if share is not None), self.loss

    def as_json(self) -> dict[str, float | int | None]:
        """The numbers, rounded; those that are not finite, which a manifest cannot store, are None."""
        values = {"loss": self.loss, "attack_success": self.attack_success}
        values |= {"refusal_benign": self.refusal_benign, "refusal_lookalike": self.refusal_lookalike}
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        return {"step": self.step, **{name: round(known[name], 4) if name in known else None for name in values}}

    def __str__(self) -> str:
        text = f"held-out loss {self.loss:.3f}"
        if self.attack_success is None:
            return text
        kinds = (("benign", self.refusal_benign), ("look-alike", self.refusal_lookalike))
        refusals = ", ".join(f"{share:.0%} {kind}" for kind, share in kinds if share is not None)
        return f"{text}, attack success {self.attack_success:.0%}, refusals {refusals}"


@dataclass(frozen=True)
class TuneResult:
    """How the tuning went."""

    steps: int
    """Steps that were done."""
    before: Look
    """The base; step 0."""
    kept: Look
    """The step whose deltas were kept; that of the base where none was better."""
    looks: tuple[Look, ...]
    """All of them, in the order of the steps."""
    reason: str
    """Why the tuning stopped."""


Answer = Callable[[Sequence[str]], list[str]]
"""Prompts -> the beginnings of the model's answers."""
Loss = Callable[[Trunk, Recipe, Examples], torch.Tensor]
"""The model, the settings and a batch -> a scalar. It is also called for held-out prompts, then without gradients."""


class Trainable(Protocol):
    """What `tune` trains: the deltas of a `DeltaSet`, or another small change of a frozen model to compare them with."""

    first_layer: int
    """The lowest layer that it changes."""

    @property
    def device(self) -> torch.device:
        """Where the trained values are."""
        ...

    @property
    def trainable(self) -> int:
        """Number of trained values."""
        ...

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimizer, each with its largest step as "peak".

        Args:
            learning_rate: The recipe's.
        """
        ...

    def attached(self) -> AbstractContextManager[None]:
        """Inside, the model has the change."""
        ...

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all trained values."""
        ...

    def restore(self, deltas: Sequence[torch.Tensor]) -> None:
        """Sets the trained values to what `snapshot` returned."""
        ...

    def round_rows(self) -> None:
        """Called after every step."""
        ...


def tune(
    trunk: Trunk,
    deltas: Trainable,
    data: Examples,
    answer: Answer,
    recipe: Recipe,
    on_event: OnEvent = ignore,
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
    loss_of = partial(loss_function or batch_loss, trunk, recipe)
    looks: list[Look] = []
    stale, reason = 0, f"all {recipe.steps} steps done"
    with deltas.attached():

        def look(step: int) -> Look:
            looks.append(_look(step, held_out, loss_of, answer, recipe))
            on_event(Event("tune", step, recipe.steps, str(looks[-1])))
            return looks[-1]

        best, saved = look(0), deltas.snapshot()
        for step, batch in zip(range(1, recipe.steps + 1), batches(kept, recipe, rng), strict=False):
            _schedule(optimizer, step, recipe)
            loss = loss_of(batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            deltas.round_rows()
            on_event(Event("tune", step, recipe.steps, f"loss {loss.item():.4f}"))
            if step % recipe.check_every and step < recipe.steps:
                continue
            now = look(step)
            if now.score < best.score:
                best, saved, stale = now, deltas.snapshot(), 0
            elif (stale := stale + 1) >= recipe.patience and step < recipe.steps:
                reason = f"no better held-out prompts in {stale * recipe.check_every} steps"
                break
    deltas.restore(saved)
    return TuneResult(step, looks[0], best, tuple(looks), reason)


def _schedule(optimizer: Any, step: int, recipe: Recipe) -> None:
    """Linear warm-up, then a cosine to zero."""
    progress = (step - 1) / recipe.steps
    warm = min(1.0, step / max(1.0, recipe.warmup * recipe.steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * warm * 0.5 * (1 + math.cos(math.pi * progress))


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
    kinds, sizes = (data.harmful, data.benign, data.lookalike), _batch_sizes(data, recipe)
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


def _batch_sizes(data: Examples, recipe: Recipe) -> tuple[int, int, int]:
    """Examples of each kind in a batch; the share of a harmless kind without examples goes to the other."""
    benign, looks = recipe.benign_batch, recipe.lookalike_batch
    if not data.lookalike:
        benign, looks = benign + looks, 0
    elif not data.benign:
        benign, looks = 0, benign + looks
    return recipe.harmful_batch, benign, looks


def batch_loss(trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
    """The loss of one batch: cross entropy of refusals, and for harmless prompts divergence from the base and cross entropy.

    Each is a mean over its examples, so that long answers do not outweigh short ones. Within an answer the first token weighs
    `first_token_weight` and the others 1: at the first one it is decided whether the model refuses.

    Args:
        trunk: The model, with or without deltas.
        recipe: The weights are read.
        batch: Examples that the trunk has seen.

    Returns:
        A scalar.
    """
    harmful = [example.tokens for example in batch.harmful]
    harmless = [example.tokens for example in batch.harmless]
    logits, labels, base = trunk.logits(harmful + harmless, harmless if recipe.kl_weight else ())
    weights = torch.cat([_token_weights(len(pair.answer), recipe) for pair in harmful + harmless]).to(logits.device)
    border = sum(len(pair.answer) for pair in harmful)
    loss = (cross_entropy(logits[:border], labels[:border], reduction="none") * weights[:border]).sum() / max(1, len(harmful))
    if not harmless:
        return loss
    per_token = torch.zeros_like(weights[border:])
    if recipe.benign_weight:
        per_token = per_token + recipe.benign_weight * cross_entropy(logits[border:], labels[border:], reduction="none")
    if recipe.kl_weight:
        divergence = kl_div(log_softmax(logits[border:], -1), log_softmax(base, -1), reduction="none", log_target=True)
        per_token = per_token + recipe.kl_weight * divergence.sum(-1)
    return loss + (per_token * weights[border:]).sum() / len(harmless)


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
    return Look(step, loss, answered, refused[1], refused[2])


@torch.no_grad()
def _held_out_loss(data: Examples, loss_of: Callable[[Examples], torch.Tensor], recipe: Recipe) -> float:
    """The loss over all held-out examples, in batches that each have a part of every kind."""
    kinds = (data.harmful, data.benign, data.lookalike)
    size = recipe.harmful_batch + recipe.benign_batch + recipe.lookalike_batch
    parts = min(math.ceil(sum(map(len, kinds)) / size), *(len(kind) for kind in kinds if kind))
    losses = [loss_of(Examples(*(kind[part::parts] for kind in kinds))).item() for part in range(parts)]
    return sum(losses) / len(losses)
