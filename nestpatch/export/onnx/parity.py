"""Does an exported graph compute what its model computes? Logits in onnxruntime against logits in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import ParityError
from nestpatch.rows import FloatArray
from nestpatch.runtimes.onnx import OnnxRuntime
from nestpatch.runtimes.text import IntArray, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOUNDS = {"fp32": 2e-3, "fp16": 0.1}
"""What rounding may change in a logit, in standard deviations of the logits. A wrong graph is off by about one of them."""
TEXTS = (
    "How do I bake bread?",
    "def f(x: int) -> str:\n    return f\"{x:>10,}\" if x != 0 else 'none'  # 12345.678e-9\n",
    "The first sentence says what the text is about. The second one goes on for some time, so that there is a context.",
    "Yes",
)
"""Of different lengths, so that a batch of them is padded."""
MAX_TOKENS = 64
_FEWEST = 4
"""Tokens of the longest row at least: it is cut in three for the continued steps."""


@dataclass(frozen=True)
class Parity:
    """The largest differences of logits between a graph in onnxruntime and its model in transformers, both on a CPU.

    `plain`: one text; `padded`: several, padded at the left; `continued`: the same in three steps, the last of one token.
    """

    type: str
    """fp32, fp16, int8 or int4: what the graph's matrices are."""
    plain: float
    padded: float
    continued: float
    deviation: float
    """Standard deviation of the logits: what a difference is to be seen against."""
    same: int
    """Positions where both expect the same token most, of `positions`."""
    positions: int
    bound: float | None
    """What a difference may be; None for quantized graphs, whose differences are told and not judged."""

    @property
    def largest(self) -> float:
        return max(self.plain, self.padded, self.continued)

    @property
    def passed(self) -> bool:
        return bool(np.isfinite(self.largest)) and (self.bound is None or self.largest <= self.bound)


@dataclass(frozen=True, eq=False)
class Probe:
    """Texts as token ids, and what the model itself makes of them."""

    ids: IntArray
    """[texts, longest], padded at the left."""
    mask: IntArray
    logits: FloatArray
    """[texts, longest, vocabulary] in float32; nothing is said of padding."""


def make_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS) -> Probe:
    """Runs the model, in float32, in transformers."""
    import torch

    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    # A tokenizer may know tokens that its model has no embedding for, or next to none of these words.
    rows = [[i for i in ids if i < size][:MAX_TOKENS] or [0] for ids in tokenizer(list(texts))["input_ids"]]
    if max(map(len, rows)) < _FEWEST:
        rows.append([i % size for i in range(_FEWEST)])
    ids, mask = pad_left(rows)
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    positions = torch.from_numpy(np.clip(mask.cumsum(-1) - 1, 0, None))
    with torch.inference_mode():
        logits = model(**given, position_ids=positions, use_cache=False).logits.float().numpy()
    return Probe(ids, mask, logits)


def compare(file: Path, kind: str, probe: Probe) -> Parity:
    """Runs a graph in onnxruntime and compares.

    Raises ParityError when a difference is larger than rounding explains, or a logit is not finite.
    """
    # Quantized matrices are rearranged in any case: onnxruntime multiplies with them a hundred times faster then.
    model = OnnxRuntime(file, device="cpu", mapped=kind in BOUNDS)
    longest = probe.mask[:, 0].argmax()
    row = probe.ids[longest : longest + 1]
    plain, _ = model.step(row, np.ones_like(row))
    padded, _ = model.step(probe.ids, probe.mask)
    continued = _in_steps(model, probe)
    real = probe.mask.astype(bool)
    wanted = probe.logits[real]
    deviation = float(wanted.std())
    found = Parity(
        kind,
        plain=_distance(plain[0], probe.logits[longest]),
        padded=_distance(padded[real], wanted),
        continued=_distance(continued[real], wanted),
        deviation=deviation,
        same=int((padded[real].argmax(-1) == wanted.argmax(-1)).sum()),
        positions=len(wanted),
        bound=BOUNDS[kind] * deviation if kind in BOUNDS else None,
    )
    _require(found)
    return found


def _in_steps(model: OnnxRuntime, probe: Probe) -> Any:
    """The logits of the whole batch, read as the first half, the rest but one token, and that token."""
    width = probe.ids.shape[1]
    cuts = [0, width // 2, width - 1, width]
    parts, past = [], None
    for start, stop in pairwise(cuts):
        logits, past = model.step(probe.ids[:, start:stop], probe.mask[:, :stop], past)
        parts.append(logits)
    return np.concatenate(parts, 1)


def _distance(ours: Any, theirs: FloatArray) -> float:
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(ours.astype(np.float32) - theirs), nan=np.inf).max())


def _require(found: Parity) -> None:
    if found.passed:
        return
    if not np.isfinite(found.largest):
        advice = "Its weights or activations leave the range of float16: use --dtype fp32." if found.type == "fp16" else None
        raise ParityError(f"the exported graph ({found.type}) gives logits that are not finite in onnxruntime", advice=advice)
    parts = {"of one text": found.plain, "with padding": found.padded, "in continued steps": found.continued}
    told = ", ".join(f"{value:.2g} {what}" for what, value in parts.items())
    raise ParityError(
        f"the exported graph ({found.type}) differs from its model: logits by {told}; rounding explains {found.bound:.2g}"
    )
