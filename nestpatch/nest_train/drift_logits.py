"""How far a model has moved from its base, whatever runs them: the number that `drift_between` gives, from logits alone."""

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

Logits: TypeAlias = Callable[[Sequence[int]], FloatArray]
"""Token ids -> float32 [ids, vocabulary]: what a model expects after each of them."""


def torch_logits(model: PreTrainedModel) -> Logits:
    """Those of a model in transformers."""
    import torch

    def logits(ids: Sequence[int]) -> FloatArray:
        with torch.inference_mode():
            found: FloatArray = model(torch.tensor([list(ids)], device=model.device)).logits[0].float().cpu().numpy()
        return found

    return logits


def drift(base: Logits, model: Logits, pairs: Sequence[Pair]) -> float:
    """Mean KL(base || model), in nats per token, over the answers.

    Raises BaseMismatchError when the vocabularies differ in size.
    """
    total, tokens = 0.0, 0
    for pair in pairs:
        ids = pair.prompt + pair.answer
        # The answer's first token is expected after the prompt's last one.
        places = slice(len(pair.prompt) - 1, len(ids) - 1)
        theirs, ours = _log_softmax(base(ids)[places]), _log_softmax(model(ids)[places])
        if theirs.shape != ours.shape:
            raise BaseMismatchError(
                f"the base has a vocabulary of {theirs.shape[1]} tokens, the model one of {ours.shape[1]}: no drift to measure"
            )
        total += float((np.exp(theirs) * (theirs - ours)).sum())
        tokens += len(pair.answer)
    return total / max(tokens, 1)


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide
