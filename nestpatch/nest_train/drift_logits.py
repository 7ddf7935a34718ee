"""How far a model has moved from its base, whatever runs them: the number that `drift` gives, from logits alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import BaseMismatchError
from nestpatch.nest_train.text import Pair
from nestpatch.rows import FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 512
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


def drift(base: Logits, model: Logits, pairs: Sequence[Pair]) -> float:
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


def require_same_ids(base: Sequence[Pair], model: Sequence[Pair]) -> None:
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
