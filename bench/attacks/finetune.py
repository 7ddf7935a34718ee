"""Fine-tuning: how many steps of training undo a patch, on harmless answers or on answers that comply."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nestpatch.evaluation.shares import Share
from nestpatch.runtimes.text import TokenPair, collate, encode_pairs
from nestpatch.runtimes.transformers import TransformersRuntime, answer_logits

ALL, LORA = "all weights", "LoRA"
RATES = {ALL: 5e-5, LORA: 2e-4}
"""Step of AdamW: the defaults of transformers' Trainer and of QLoRA (arXiv 2305.14314)."""
LOOKS = (0, 10, 25, 50, 100)
"""Steps after which the model is measured."""
_RANK = 16
_BATCH = 32
"""Answers whose likelihood is computed together."""
_ANSWER_TOKENS = 64
"""Tokens of an answer that are trained."""


@dataclass(frozen=True)
class Tuning:
    """Settings of a fine-tuning.

    Attributes:
        weights: What is trained: ALL or LORA.
        rate: Step of AdamW, without a schedule.
        batch: Examples of a step.
        looks: Steps after which the model is measured, in order.
        rank: Of LORA.
    """

    weights: str = ALL
    rate: float = RATES[ALL]
    batch: int = 8
    looks: tuple[int, ...] = LOOKS
    rank: int = _RANK


@dataclass(frozen=True)
class Look:
    """The model after some steps.

    Attributes:
        step: How many.
        success: Attack success.
        damage: Mean loss of the base's answers to harmless prompts, in nats a token.
    """

    step: int
    success: Share
    damage: float


def examples(runtime: TransformersRuntime, pairs: Mapping[str, str], *, whole: bool) -> list[TokenPair]:
    """Prompts and answers as token ids.

    Args:
        runtime: The model.
        pairs: Prompt -> answer.
        whole: Whether an answer ends where its text ends; else its end token is not trained.

    Returns:
        One pair for each prompt.
    """
    found = encode_pairs(runtime.tokenizer, list(pairs.items()), runtime.max_prompt_tokens, _ANSWER_TOKENS)
    end = runtime.tokenizer.eos_token_id
    return found if whole else [TokenPair(p.prompt, p.answer[:-1] if p.answer[-1] == end else p.answer) for p in found]


def fine_tune(
    runtime: TransformersRuntime,
    pairs: Sequence[TokenPair],
    tuning: Tuning,
    measure: Callable[[int], Look],
    seed: int = 0,
    watch: Callable[[nn.Module], Callable[[], None]] = lambda _: lambda: None,
) -> list[Look]:
    """Trains the model, measures it on the way, and gives it its weights back, bit for bit.

    Args:
        runtime: The model.
        pairs: What is trained.
        tuning: The settings.
        measure: Steps done -> the model as it is then.
        seed: Of the order of the examples and of LoRA's start.
        watch: Gets the model when its weights are open for training; what it returns is called after each step.

    Returns:
        What was measured at each of the looks.
    """
    found = []
    with trainable(runtime.model, tuning.weights, seed, tuning.rank) as parameters:
        stepped = watch(runtime.model)
        optimizer = torch.optim.AdamW(parameters, lr=tuning.rate, weight_decay=0.0)
        draw = _batches(pairs, tuning.batch, seed)
        for step in range(tuning.looks[-1] + 1):
            if step:
                _loss(runtime, next(draw)).backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                stepped()
            if step in tuning.looks:
                found.append(measure(step))
    return found


def half_lost(looks: Sequence[Look], base: Share) -> int | None:
    """When half of what a patch gained is lost.

    Args:
        looks: In the order of the steps; the first is the patched model.
        base: Attack success of the base.

    Returns:
        Steps until attack success is halfway back to the base's; None where it never was, or where nothing was gained.
    """
    gained = base.value - looks[0].success.value
    lost = (look.step for look in looks if look.success.value >= base.value - gained / 2)
    return next(lost, None) if gained > 0 else None


@contextmanager
def trainable(model: nn.Module, weights: str, seed: int, rank: int = _RANK) -> Iterator[list[nn.Parameter]]:
    """Opens weights of a frozen model for training; afterwards the model is what it was, bit for bit.

    Args:
        model: The model.
        weights: ALL or LORA.
        seed: Of LoRA's start.
        rank: Of LORA.

    Yields:
        What to train.
    """
    if weights == LORA:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
        try:
            yield [parameter for parameter in model.parameters() if parameter.requires_grad]
        finally:
            adapted.unload()
        return
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    model.requires_grad_(requires_grad=True)
    try:
        yield parameters
    finally:
        model.requires_grad_(requires_grad=False)
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.grad = None
                parameter.copy_(old)


def answer_loss(runtime: TransformersRuntime, pairs: Sequence[TokenPair]) -> float:
    """How unlikely a model finds answers.

    Args:
        runtime: The model.
        pairs: Prompts and answers.

    Returns:
        Nats per answer token.
    """
    with torch.inference_mode():
        parts = [
            (_loss(runtime, pairs[start : start + _BATCH]), pairs[start : start + _BATCH])
            for start in range(0, len(pairs), _BATCH)
        ]
    counts = [sum(len(pair.answer) for pair in part) for _, part in parts]
    return sum(loss.item() * count for (loss, _), count in zip(parts, counts, strict=True)) / sum(counts)


def _loss(runtime: TransformersRuntime, pairs: Sequence[TokenPair]) -> torch.Tensor:
    """Mean cross entropy of all answer tokens."""
    batch = collate(pairs, int(runtime.tokenizer.pad_token_id), runtime.model.device)
    return cross_entropy(*answer_logits(runtime.model, batch))


def _batches(pairs: Sequence[TokenPair], size: int, seed: int) -> Iterator[list[TokenPair]]:
    """Batches without end; every example is drawn once before any is drawn again."""
    rng = random.Random(f"fine-tuning {seed}")
    while True:
        order = rng.sample(list(pairs), len(pairs))
        yield from (order[start : start + size] for start in range(0, len(order), size))
