"""How far a model has moved from its base, whatever runs them: the number that `drift` gives, from logits alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import BaseMismatchError
from nestpatch.rows import FloatArray
from nestpatch.runtimes.llama import LlamaModel, prompt_ids
from nestpatch.runtimes.text import TokenPair, collate, encode_pairs
from nestpatch.runtimes.transformers import answer_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 512
BATCH = 32


def drift_between(
    base: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answers: Mapping[str, str],
    base_mode: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> float:
    """Mean KL(base || model), in nats per token, over the base's own answers (prompt -> answer).

    `base_mode` is entered while the base runs: the switch of a model that is both.
    """
    import torch
    from torch.nn.functional import kl_div, log_softmax

    pairs = encode_pairs(tokenizer, list(answers.items()), MAX_TOKENS, MAX_TOKENS)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(pairs), BATCH):
            tensors = collate(pairs[start : start + BATCH], int(tokenizer.pad_token_id), model.device)
            with base_mode():
                theirs, labels = answer_logits(base, tensors)
            ours, _ = answer_logits(model, tensors)
            total += kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), reduction="sum", log_target=True).item()
            tokens += len(labels)
    return total / max(tokens, 1)


def pairs_of(model: LlamaModel, answers: Mapping[str, str]) -> list[TokenPair]:
    """Token ids of prompts and answers; answers end with the end token unless they had to be cut."""
    end = [model.end] if model.end >= 0 else []
    prompts = prompt_ids(model, list(answers), MAX_TOKENS)
    texts = [(*model.encode(answer, special=False), *end)[:MAX_TOKENS] for answer in answers.values()]
    return [TokenPair(tuple(prompt), answer) for prompt, answer in zip(prompts, texts, strict=True)]


Logits: TypeAlias = Callable[[Sequence[int], int], FloatArray]
"""Token ids, start -> float32 [ids - start, vocabulary]: what a model expects after each of them from `start` on."""


def torch_logits(model: PreTrainedModel) -> Logits:
    """Those of a model in transformers."""
    import torch

    def logits(ids: Sequence[int], start: int) -> FloatArray:
        with torch.inference_mode():
            found = model(torch.tensor([list(ids)], device=model.device)).logits[0, start:]
        rows: FloatArray = found.float().cpu().numpy()
        return rows

    return logits


def drift(base: Logits, model: Logits, pairs: Sequence[TokenPair]) -> float:
    """Mean KL(base || model), in nats per token, over the answers.

    Raises BaseMismatchError when the vocabularies differ in size.
    """
    total, tokens = 0.0, 0
    for pair in pairs:
        # The answer's first token is expected after the prompt's last one; after the answer's last one nothing is.
        ids, start = (pair.prompt + pair.answer)[:-1], len(pair.prompt) - 1
        theirs, ours = _log_softmax(base(ids, start)), _log_softmax(model(ids, start))
        if theirs.shape != ours.shape:
            raise BaseMismatchError(
                f"the base has a vocabulary of {theirs.shape[1]} tokens, the model one of {ours.shape[1]}: no drift to measure"
            )
        total += float((np.exp(theirs) * (theirs - ours)).sum())
        tokens += len(pair.answer)
    return total / max(tokens, 1)


def require_same_ids(base: Sequence[TokenPair], model: Sequence[TokenPair]) -> None:
    """Raises BaseMismatchError when two models read the same texts as different tokens."""
    for number, (theirs, ours) in enumerate(zip(base, model, strict=True), start=1):
        if theirs != ours:
            raise BaseMismatchError(
                f"base and model read prompt {number} as different tokens: no drift to measure",
                advice="Give the base that the model was made from.",
            )


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
