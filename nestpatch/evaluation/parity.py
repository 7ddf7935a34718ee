"""A GGUF file in llama.cpp compared with its model in transformers: are token ids the same, and how far do logits differ?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.evaluation.drift import Logits
from nestpatch.evaluation.shares import Share
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.gguf.header import read_header
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.llama import LlamaRuntime
from nestpatch.runtimes.llama_file import library
from nestpatch.runtimes.loading import load_model, locate
from nestpatch.runtimes.text import chat_texts
from nestpatch.runtimes.transformers import TransformersRuntime
from nestpatch.runtimes.weights import fold

MAX_TOKENS = 256
"""Of a text that is compared."""
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
    """Where two models differ most.

    Attributes:
        text: What both read.
        position: Of the token in the text that the logits follow.
        token: Whose logit it is.
        gguf: The logit in llama.cpp.
        reference: The logit in transformers.
    """

    text: str
    position: int
    token: int
    gguf: float
    reference: float


@dataclass(frozen=True)
class GgufParity:
    """What a comparison found.

    Attributes:
        file: The GGUF file.
        reference: The model that it was made from.
        types: Of the file's matrices.
        same_ids: Texts that both tokenizers read alike.
        first_text: The first text that they read differently; None where there is none.
        largest: Largest difference of two logits; infinite where one is not a number.
        place: Where that difference is.
        deviation: Standard deviation of the reference's logits, which differences are to be compared with.
        top1: Positions where both predict the same token.
        typical: Median over the positions of their largest differences.
        mixture: Whether the model has experts: a rounding error may choose another one, and then `largest` says nothing.
        bound: Limit of `largest`, or of `typical` for a mixture; None for quantized files, whose differences are reported only.
    """

    file: Path
    reference: str
    types: tuple[str, ...]
    same_ids: Share
    first_text: str | None
    largest: float
    place: TokenPosition
    deviation: float
    top1: Share
    typical: float
    mixture: bool
    bound: float | None

    @property
    def passed(self) -> bool:
        """Whether all token ids are the same and the logits differ by no more than rounding explains."""
        judged = self.typical if self.mixture else self.largest
        return self.same_ids.count == self.same_ids.total and (self.bound is None or judged <= self.bound)

    def as_json(self) -> dict[str, Any]:
        """The comparison for `--json`; a difference that is not finite is None."""
        return {
            "output": str(self.file),
            "reference": self.reference,
            "types": list(self.types),
            "texts": self.same_ids.total,
            "same_ids": self.same_ids.count,
            "first_text": self.first_text,
            "largest_difference": self.largest if np.isfinite(self.largest) else None,
            "typical_difference": self.typical if np.isfinite(self.typical) else None,
            "judged": "typical" if self.mixture else "largest",
            "bound": self.bound,
            "place": {
                "text": self.place.text,
                "position": self.place.position,
                "token": self.place.token,
                "gguf": self.place.gguf,
                "reference": self.place.reference,
            },
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
    """Checks, before any work, that `check_gguf` can run.

    Raises:
        MissingExtraError: PyTorch, transformers or llama-cpp-python is not installed.
    """
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

    Every text is read as it is, in the chat form, and between the model's own special tokens.

    Args:
        gguf: The file.
        model: A model directory or Hub id.
        pack: Merged into the reference: rounded as in a file, or with `lora` as an adapter adds it.
        strength: Factor of the pack's change.
        lora: An adapter that the file is run with.
        texts: What both read.
        on_event: Receives the progress.

    Returns:
        The comparison.

    Raises:
        CheckpointError: One of the two cannot be read or run.
        BaseMismatchError: The pack is not for `model`.
        MissingExtraError: The packages of a runtime are not installed.
    """
    source = locate(model)
    on_event(Event("check", note=f"loading {source.model_id}"))
    theirs = TransformersRuntime(*load_model(source.path, "cpu", "float32"))
    if pack is not None:
        fold(theirs.model, open_model(source.path)[0], pack, strength, rounded=lora is None)
    with LlamaRuntime(gguf, lora, device="cpu") as ours:
        readings = list(_read(theirs, ours, texts))
        # A tokenizer may add tokens that its model has no embedding for.
        known = [reading for reading in readings if reading.reference and max(reading.reference) < ours.vocabulary]
        rows = [(reading.text, reading.reference[:MAX_TOKENS]) for reading in known]
        # One longer text: positions that the short ones do not reach.
        rows.append(("all texts together", tuple(i for _, ids in rows for i in ids)[:MAX_TOKENS]))
        found = _compare(theirs.logits, ours.logits, rows, on_event)
        architecture, mixture = ours.metadata("general.architecture") or "", ours.experts is not None
    types = tuple(sorted({info.dtype for info in read_header(Path(gguf)).tensors.values() if len(info.shape) > 1}))
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
        bound=_bound(types, architecture, found.deviation),
    )


def _bound(types: Sequence[str], architecture: str, deviation: float) -> float | None:
    """The largest difference that rounding explains; None for quantized files. `deviation` is that of the logits."""
    if not set(types) <= {"F32", *ROUNDED}:
        return None
    exact = EXACT_GEMMA if architecture.startswith("gemma") else EXACT
    return max([exact, *(ROUNDED[name] * deviation for name in types if name in ROUNDED)])


def _read(theirs: TransformersRuntime, ours: LlamaRuntime, texts: Sequence[str]) -> Iterator[_Reading]:
    tokenizer: Any = theirs.tokenizer
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    framed = [f"{token}{texts[0]} {token}\n" for token, number in special if number < ours.vocabulary]
    for given in (*texts, *framed):
        yield _Reading(given, tuple(tokenizer(given)["input_ids"]), tuple(ours.encode(given, special=True)))
    chats = chat_texts(tokenizer, texts), ours.chat_texts(texts)
    for rendered, wanted, known, got in zip(*chats, theirs.token_ids(texts), ours.token_ids(texts), strict=True):
        # Where the texts differ already, equal ids would prove nothing.
        yield _Reading(rendered, tuple(known), tuple(got) if rendered == wanted else ())


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
