"""How far a model has moved from its base: one number, from the logits of any two runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import BaseMismatchError
from nestpatch.rows import FloatArray
from nestpatch.runtimes.protocol import Runtime
from nestpatch.runtimes.sharded import no_gradients
from nestpatch.runtimes.text import TokenPair, collate
from nestpatch.runtimes.transformers import TransformersRuntime, answer_logits

_BATCH = 32
"""Answers that PyTorch computes at once."""
Logits: TypeAlias = Callable[[Sequence[int], int], FloatArray]
"""Token ids, start -> float32 [ids - start, vocabulary]: what a model predicts after each of them from `start` on."""


def drift(base: Runtime, model: Runtime, answers: Mapping[str, str]) -> float | None:
    """Mean KL(base || model), in nats per token.

    Args:
        base: The unpatched model.
        model: The one that may have moved.
        answers: Prompt -> answer, the base's own answers.

    Returns:
        The mean over the tokens of the answers; None without answers.

    Raises:
        BaseMismatchError: The two read the same texts as different tokens, or their vocabularies differ in size.
    """
    if not answers:
        return None
    pairs = base.token_pairs(answers)
    for position, (theirs, ours) in enumerate(zip(pairs, model.token_pairs(answers), strict=True), start=1):
        if theirs != ours:
            raise BaseMismatchError(
                f"base and model read prompt {position} as different tokens: the drift cannot be measured",
                advice="Give the base that the model was made from.",
            )
    if isinstance(base, TransformersRuntime) and isinstance(model, TransformersRuntime):
        return sum(_in_batches(base, model, pairs)) / max(1, sum(len(pair.answer) for pair in pairs))
    return divergence(base.logits, model.logits, pairs)


def divergence(base: Logits, model: Logits, pairs: Sequence[TokenPair]) -> float:
    """Mean KL(base || model), in nats per token, from logits alone.

    Args:
        base: The unpatched model.
        model: The one that may have moved.
        pairs: What both read.

    Returns:
        The mean over the tokens of the answers; 0 without any.

    Raises:
        BaseMismatchError: The vocabularies differ in size.
    """
    total, tokens = 0.0, 0
    for pair in pairs:
        # The answer's first token is predicted after the prompt's last one; after the answer's last one nothing is.
        ids, start = (pair.prompt + pair.answer)[:-1], len(pair.prompt) - 1
        theirs, ours = _log_softmax(base(ids, start)), _log_softmax(model(ids, start))
        _require_same_size(theirs.shape[1], ours.shape[1])
        total += float((np.exp(theirs) * (theirs - ours)).sum())
        tokens += len(pair.answer)
    return total / max(tokens, 1)


def _in_batches(base: TransformersRuntime, model: TransformersRuntime, pairs: Sequence[TokenPair]) -> Iterator[float]:
    """The summed divergence of each batch, computed on the device: an accelerator would wait for single texts."""
    import torch
    from torch.nn.functional import kl_div, log_softmax

    for start in range(0, len(pairs), _BATCH):
        batch = collate(pairs[start : start + _BATCH], int(base.tokenizer.pad_token_id), base.model.device)
        with base.active(), no_gradients(base.model):
            theirs, _ = answer_logits(base.model, batch)
        with model.active(), no_gradients(model.model):
            ours, _ = answer_logits(model.model, batch)
        _require_same_size(theirs.shape[1], ours.shape[1])
        with torch.inference_mode():
            found = kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), reduction="sum", log_target=True)
        yield found.item()


def _require_same_size(base: int, model: int) -> None:
    if base != model:
        raise BaseMismatchError(
            f"the base has a vocabulary of {base} tokens, the model one of {model}: the drift cannot be measured"
        )


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
