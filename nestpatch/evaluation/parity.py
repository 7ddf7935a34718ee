"""Does a GGUF file say in llama.cpp what its model says in transformers? The same token ids, and how far the logits differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.evaluation.drift import Logits, torch_logits
from nestpatch.evaluation.statistics import Share
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.pack import Pack
from nestpatch.runtimes import llama as generate_llama
from nestpatch.runtimes import text
from nestpatch.runtimes.llama import LlamaModel, library

MAX_TOKENS = 256
EXACT, EXACT_GEMMA = 1e-4, 5e-3
"""Largest difference of logits that F32 files may show; Gemma's embeddings and norms are large."""
ROUNDED = {"F16": 0.05, "BF16": 0.3}
"""The same for files of these types, in standard deviations of the logits: llama.cpp rounds activations to the type too."""
TEXTS = (
    "How do I bake bread?",
    "  two spaces, a\ttab,\n\n\nthree line ends \n and one at the end\n",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u00bd \u00e5",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \u0417\u0434\u0440\u0430\u0432\u043e",
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \ud55c\uad6d\uc5b4",
    "\U0001f469\u200d\U0001f680\U0001f3f3\ufe0f\u200d\U0001f308 emoji\U0001f600\U0001f600",
    "def f(x: int) -> str:\n    return f\"{x:>10,}\" if x != 0 else 'none'  # 12345.678e-9\n",
    "I'll DON'T they'RE we've 2024-01-31 10:59:07 +++ --- ... ??? !!!",
    "a" * 40 + " " * 20 + "1234567890" * 3,
)
"""Texts on which tokenizers differ: line ends, runs of spaces, scripts, emoji, code, digits, contractions."""


@dataclass(frozen=True)
class TokenPosition:
    """Where two models differ most."""

    text: str
    position: int
    """Of the token in the text that the logits follow."""
    token: int
    """Whose logit it is."""
    gguf: float
    reference: float


@dataclass(frozen=True)
class GgufParity:
    """What a comparison found."""

    file: Path
    reference: str
    types: tuple[str, ...]
    """Of the file's matrices."""
    same_ids: Share
    """Texts that both tokenizers read alike."""
    first_text: str | None
    """The first one that they do not."""
    largest: float
    """Difference of two logits; infinite where one is not a number."""
    place: TokenPosition
    deviation: float
    """Standard deviation of the reference's logits: what a difference is to be seen against."""
    top1: Share
    """Positions where both expect the same token most."""
    typical: float
    """Median over the positions of their largest differences."""
    mixture: bool
    """Whether the model has experts: a rounding error may choose another one, and then `largest` says nothing."""
    bound: float | None
    """What `largest` may be, or `typical` of a mixture; None for quantized files, whose differences are told and not judged."""

    @property
    def passed(self) -> bool:
        judged = self.typical if self.mixture else self.largest
        return self.same_ids.count == self.same_ids.total and (self.bound is None or judged <= self.bound)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "file": str(self.file),
            "reference": self.reference,
            "types": list(self.types),
            "texts": self.same_ids.total,
            "same_ids": self.same_ids.count,
            "first_text": self.first_text,
            "largest_difference": self.largest if np.isfinite(self.largest) else None,
            "typical_difference": self.typical if np.isfinite(self.typical) else None,
            "judged": "typical" if self.mixture else "largest",
            "bound": self.bound,
            "place": vars(self.place),
            "deviation": self.deviation,
            "top1": self.top1.as_json(),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class _Reading:
    """A text and its token ids in transformers and in llama.cpp."""

    text: str
    reference: tuple[int, ...]
    gguf: tuple[int, ...]


def require_check() -> None:
    """Raises MissingExtraError, before any work, where a check cannot run."""
    if any(find_spec(name) is None for name in ("torch", "transformers")):
        raise MissingExtraError("train,llama", "checking a GGUF file against its model")
    library()


def check_gguf(
    gguf: str | Path,
    model: str | Path,
    *,
    pack: Pack | None = None,
    strength: float = 1.0,
    lora: str | Path | None = None,
    texts: Sequence[str] = TEXTS,
    on_event: OnEvent = ignore,
) -> GgufParity:
    """Runs a GGUF file in llama.cpp and the model that it was made from in transformers, both in float32, and compares them.

    `patch` is merged into the reference: rounded as in a file, or as an adapter adds it where the GGUF file has one, `lora`.
    Every text is read as it is, in the chat form, and between the model's own special tokens.

    Raises CheckpointError, MissingExtraError, or BaseMismatchError when `patch` is not for `model`.
    """
    from nestpatch.patcher.recovery import open_model
    from nestpatch.runtimes.transformers import fold, load_model, locate

    source = locate(model)
    on_event(Event("check", note=f"loading {source.model_id}"))
    reference, tokenizer = load_model(source.path, "cpu", "float32")
    if pack is not None:
        checkpoint, _ = open_model(source.path)
        fold(reference, checkpoint, pack, strength, rounded=lora is None)
    with LlamaModel(gguf, lora, device="cpu") as ours:
        readings = list(_read(tokenizer, ours, texts))
        logits = torch_logits(reference)
        # A tokenizer may add tokens that its model has no embedding for.
        known = [reading for reading in readings if reading.reference and max(reading.reference) < ours.vocabulary]
        rows = [(reading.text, reading.reference[:MAX_TOKENS]) for reading in known]
        # One longer text: positions that the short ones do not reach.
        rows.append(("all texts together", tuple(i for _, ids in rows for i in ids)[:MAX_TOKENS]))
        found = _compare(logits, ours.logits, rows, on_event)
        architecture = ours.metadata("general.architecture") or ""
        mixture = ours.metadata(f"{architecture}.expert_count") not in (None, "0")
    types = matrix_types(Path(gguf))
    different = [reading.text for reading in readings if reading.reference != reading.gguf]
    return GgufParity(
        file=Path(gguf),
        reference=source.model_id,
        types=types,
        same_ids=Share(len(readings) - len(different), len(readings)),
        first_text=different[0] if different else None,
        largest=found.largest,
        place=found.place,
        deviation=found.deviation,
        top1=found.top1,
        typical=found.typical,
        mixture=mixture,
        bound=bound_for(types, architecture, found.deviation),
    )


def bound_for(types: Sequence[str], architecture: str, deviation: float) -> float | None:
    """The largest difference that rounding explains for a file of these types, or None for quantized ones."""
    if not set(types) <= {"F32", *ROUNDED}:
        return None
    exact = EXACT_GEMMA if architecture.startswith("gemma") else EXACT
    return max([exact, *(ROUNDED[name] * deviation for name in types if name in ROUNDED)])


def matrix_types(gguf: Path) -> tuple[str, ...]:
    """The types of a GGUF file's matrices, sorted. Raises CheckpointFormatError when it cannot be read."""
    from gguf import GGUFReader

    try:
        return tuple(sorted({t.tensor_type.name for t in GGUFReader(gguf).tensors if len(t.shape) > 1}))
    # The reader raises whatever the bytes provoke.
    except Exception as error:
        raise CheckpointFormatError(f"cannot read {gguf}: {error}") from error


def _read(tokenizer: Any, ours: LlamaModel, texts: Sequence[str]) -> Iterator[_Reading]:
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    framed = [f"{token}{texts[0]} {token}\n" for token, number in special if number < ours.vocabulary]
    for given in (*texts, *framed):
        theirs = tokenizer(given)["input_ids"]
        yield _Reading(given, tuple(theirs), tuple(ours.encode(given, special=True)))
    chats = text.chat_texts(tokenizer, texts), generate_llama.chat_texts(ours, texts)
    ids = text.prompt_ids(tokenizer, texts, MAX_TOKENS), generate_llama.prompt_ids(ours, texts, MAX_TOKENS)
    for rendered, wanted, theirs, got in zip(*chats, *ids, strict=True):
        # Where the texts differ already, equal ids would say nothing.
        yield _Reading(rendered, tuple(theirs), tuple(got) if rendered == wanted else ())


@dataclass(frozen=True)
class _Difference:
    largest: float
    place: TokenPosition
    typical: float
    deviation: float
    top1: Share


def _compare(reference: Logits, ours: Logits, rows: Sequence[tuple[str, tuple[int, ...]]], on_event: OnEvent) -> _Difference:
    largest, place, same, total = -1.0, TokenPosition("", 0, 0, 0.0, 0.0), 0, 0
    moments, spread = np.zeros(3), []
    for number, (given, ids) in enumerate(rows, start=1):
        theirs, got = reference(ids, 0), ours(ids, 0)
        if theirs.shape != got.shape:
            raise CheckpointFormatError(f"the GGUF file has {got.shape[1]} tokens, its model {theirs.shape[1]}")
        with np.errstate(invalid="ignore"):
            distance = np.nan_to_num(np.abs(theirs - got), nan=np.inf)
        spread.append(distance.max(-1))
        position, token = np.unravel_index(distance.argmax(), distance.shape)
        if distance[position, token] > largest:
            largest = float(distance[position, token])
            pair = float(got[position, token]), float(theirs[position, token])
            place = TokenPosition(given, int(position), int(token), *pair)
        same, total = same + int((theirs.argmax(-1) == got.argmax(-1)).sum()), total + len(ids)
        wide = theirs.astype(np.float64)
        moments += (wide.size, wide.sum(), np.square(wide).sum())
        on_event(Event("check", number, len(rows)))
    mean = moments[1] / moments[0]
    typical = float(np.median(np.concatenate(spread)))
    return _Difference(largest, place, typical, float(np.sqrt(moments[2] / moments[0] - mean * mean)), Share(same, total))
