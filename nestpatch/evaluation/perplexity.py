"""How well a model predicts plain text: the perplexity, from the logits of any runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import DataError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import read_text
from nestpatch.rows import FloatArray
from nestpatch.runtimes.protocol import Runtime

WINDOW = 512
"""Tokens that the model reads at once at most. Windows do not overlap; the first token of each is not predicted."""
MAX_TEXT = 64 << 20
"""Bytes of a text file at most."""


@dataclass(frozen=True)
class TextLoss:
    """How well a model predicted texts.

    Attributes:
        total: Negative log-likelihood of all predicted tokens, in nats.
        tokens: How many were predicted.
        rise: Perplexity divided by that of the base, minus 1; None where no base was measured.
    """

    total: float
    tokens: int
    rise: float | None = None

    @property
    def nats(self) -> float:
        """The mean negative log-likelihood per token."""
        return self.total / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def beside(self, base: TextLoss) -> TextLoss:
        """Compares the loss with that of the base on the same texts.

        Args:
            base: Of the unpatched model.

        Returns:
            The same loss with its `rise`.
        """
        return replace(self, rise=math.expm1(self.nats - base.nats) if self.nats - base.nats < 700 else math.inf)

    def as_json(self) -> dict[str, Any]:
        """Nats per token, perplexity, tokens and rise; six digits."""
        rise = None if self.rise is None else round(self.rise, 6)
        numbers = {"nats_per_token": round(self.nats, 6), "perplexity": round(self.perplexity, 6), "tokens": self.tokens}
        return numbers | {"perplexity_rise": rise}


def load_texts(files: Sequence[Path]) -> tuple[str, ...]:
    """Reads text files.

    Args:
        files: UTF-8 each.

    Returns:
        Their texts.

    Raises:
        DataError: A file is missing, empty or not UTF-8.
    """
    found = []
    for file in files:
        try:
            text = read_text(file, MAX_TEXT)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read the text {file}: {reason}", advice="Give a file of plain UTF-8 text.") from error
        if not text.strip():
            raise DataError(f"the text {file} is empty", advice="Give a file of plain UTF-8 text, such as a chapter of prose.")
        found.append(text)
    return tuple(found)


def text_loss(model: Runtime, texts: Sequence[str], on_event: OnEvent = ignore) -> TextLoss:
    """Measures how well a model predicts texts, outside the chat template.

    Args:
        model: Any runtime.
        texts: Each is divided into windows of WINDOW tokens, or of the model's context where that is shorter.
        on_event: Receives the progress: windows.

    Returns:
        The loss over the tokens of all windows.

    Raises:
        DataError: The texts have no token to predict.
    """
    size = min(WINDOW, model.context or WINDOW)
    parts = [ids[start : start + size] for ids in map(model.text_ids, texts) for start in range(0, len(ids), size)]
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise DataError("the text has no token to predict", advice="Give a longer text: some thousand words say more.")
    total = 0.0
    for done, part in enumerate(parts, start=1):
        total += _loss(model.logits(part)[:-1], part[1:])
        on_event(Event("text", done, len(parts)))
    return TextLoss(total, sum(len(part) - 1 for part in parts))


def _loss(logits: FloatArray, targets: Sequence[int]) -> float:
    """Summed negative log-likelihood of the targets, in nats."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return float((np.log(np.exp(wide).sum(-1)) - wide[np.arange(len(targets)), list(targets)]).sum())
