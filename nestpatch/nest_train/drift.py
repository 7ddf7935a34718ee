"""How far a patched model has moved on what it should still do as before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import kl_div, log_softmax

from nestpatch.nest_train.text import collate, encode_pairs
from nestpatch.nest_train.tune import answer_logits

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
