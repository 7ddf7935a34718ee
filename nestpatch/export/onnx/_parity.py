"""Compares an exported graph with its model: logits in onnxruntime against logits in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import ParityError
from nestpatch.export.results import Parity
from nestpatch.rows import FloatArray
from nestpatch.runtimes.onnx import OnnxRuntime
from nestpatch.runtimes.text import IntArray, pad_left

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOUNDS = {"fp32": 2e-3, "fp16": 0.1}
"""The largest difference of a logit that rounding explains, in standard deviations; a wrong graph differs by about one."""
TEXTS = (
    "How do I bake bread?",
    "def f(x: int) -> str:\n    return f\"{x:>10,}\" if x != 0 else 'none'  # 12345.678e-9\n",
    "The first sentence says what the text is about. The second one goes on for some time, so that there is a context.",
    "Yes",
)
"""Of different lengths, so that a batch of them is padded."""
MAX_TOKENS = 64
_FEWEST = 4
"""Tokens of the longest row: it is cut in three for the continued steps."""


@dataclass(frozen=True, eq=False)
class Probe:
    """Texts as token ids, and the logits of the model in transformers."""

    ids: IntArray
    """[texts, longest], padded at the left."""
    mask: IntArray
    logits: FloatArray
    """float32 [texts, longest, vocabulary]; undefined at padding."""


def make_probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str] = TEXTS) -> Probe:
    """Runs the model, in float32, in transformers.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: What to run it on.

    Returns:
        The tokens and the logits.
    """
    import torch

    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    # A tokenizer may have tokens without an embedding, or almost none of these words.
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
    """Runs a graph in onnxruntime and compares its logits with those of the probe.

    Args:
        file: The .onnx file.
        kind: How its numbers are stored, which decides what rounding explains.
        probe: What `make_probe` returned for the model.

    Returns:
        The differences.

    Raises:
        ParityError: A difference is larger than rounding explains, or a logit is not finite.
    """
    # onnxruntime rearranges quantized matrices in memory, which makes products a hundred times faster.
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
    """The logits of the batch in three steps: the first half, the rest but one token, and that token."""
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
        advice = "Its weights or activations exceed the range of float16: use --dtype fp32." if found.type == "fp16" else None
        raise ParityError(f"the exported graph ({found.type}) has logits that are not finite in onnxruntime", advice=advice)
    parts = {"of one text": found.plain, "with padding": found.padded, "in continued steps": found.continued}
    parts_text = ", ".join(f"{value:.2g} {what}" for what, value in parts.items())
    raise ParityError(
        f"the exported graph ({found.type}) differs from its model: logits by {parts_text}; rounding explains {found.bound:.2g}"
    )
