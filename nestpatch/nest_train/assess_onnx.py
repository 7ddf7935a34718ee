"""Evaluation of an ONNX model in onnxruntime, with or without an adapter: the same suites and judge as for other models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.errors import BaseMismatchError, DataError, UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.lora_onnx import SUFFIX, onnx_file
from nestpatch.nest_train.drift_logits import MAX_TOKENS, Logits, drift, torch_logits
from nestpatch.nest_train.evaluate import BENIGN, Assessment, Evaluation, Suite, answers_of, evaluate
from nestpatch.nest_train.generate import Generate
from nestpatch.nest_train.generate_onnx import load_tokenizer, with_onnx
from nestpatch.nest_train.onnx_model import OnnxModel
from nestpatch.nest_train.text import encode_pairs
from nestpatch.pack import Pack
from nestpatch.patcher.adapters import export_onnx_adapter
from nestpatch.patcher.apply import apply
from nestpatch.rows import FloatArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def is_onnx(model: str | Path) -> bool:
    """Whether a model is to be run by onnxruntime: an .onnx file, or a directory with one and without safetensors weights."""
    path = Path(model)
    if path.suffix == ".onnx":
        return True
    return onnx_file(path) is not None and not any(path.glob("*.safetensors"))


def assess_onnx(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    patch: str | Path | Pack | None = None,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 48,
    on_event: OnEvent = ignore,
) -> Assessment:
    """Evaluates an ONNX model; with `lora`, an .onnx_adapter file, also with that.

    With `patch` also the patched model: by an adapter where the model was exported adapter-ready, else as a temporary copy.

    With `base`, an ONNX model or a model directory, the drift of `model` from it is measured too.

    Raises CheckpointError, PackError, DataError or MissingExtraError.
    """
    if patch is not None and lora is not None:
        raise DataError("a patch and an adapter were given: either of them makes the patched model")
    report = lambda event: on_event(Event("evaluate", event.done, event.total))  # noqa: E731
    with _patched(model, patch, lora, on_event) as (other, adapter):
        on_event(Event("load", note=str(model)))
        loaded = OnnxModel(model, adapter, device=device)
        tokenizer = load_tokenizer(loaded)
        loaded.adapted = False
        before = evaluate(with_onnx(loaded, tokenizer, max_new_tokens, on_event=report), suites)
        if base is not None:
            prompts = list(answers_of(before, BENIGN))
            own, logits = _reference(base, tokenizer, device, max_new_tokens, report)
            before = Evaluation(before.suites, _drift(logits, loaded.logits, tokenizer, prompts, own(prompts)))
        if other is None:
            return Assessment(before)
        second = loaded if adapter is not None else OnnxModel(other, device=device)
        second.adapted = True
        after = evaluate(with_onnx(second, tokenizer, max_new_tokens, on_event=report), suites)
        answers = answers_of(before, BENIGN)
        pair = _switched(loaded, on=False), _switched(second, on=True)
        return Assessment(before, Evaluation(after.suites, _drift(*pair, tokenizer, list(answers), list(answers.values()))))


@contextmanager
def _patched(
    model: str | Path, patch: str | Path | Pack | None, lora: str | Path | None, on_event: OnEvent
) -> Iterator[tuple[str | Path | None, str | Path | None]]:
    """(the patched model, the adapter that it has to be run with); what is made here is removed at the end."""
    if patch is None:
        yield (None if lora is None else model), lora
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter, other = Path(folder) / f"patch{SUFFIX}", Path(folder) / "patched"
        try:
            export_onnx_adapter(patch, model, adapter)
        except UnsupportedModelError:  # not adapter-ready, or not for these weights
            apply(model, patch, other, sync=False, on_event=on_event)
        yield (model, adapter) if adapter.is_file() else (other, None)


def _switched(model: OnnxModel, *, on: bool) -> Logits:
    """The model with its adapter, or without."""

    def logits(ids: Sequence[int], start: int) -> FloatArray:
        model.adapted = on
        return model.logits(ids, start)

    return logits


def _reference(
    base: str | Path, tokenizer: PreTrainedTokenizerBase, device: str, max_new_tokens: int, on_event: OnEvent
) -> tuple[Generate, Logits]:
    """A base's own answers and logits. It reads what the model's tokenizer makes of a prompt."""
    if is_onnx(base):
        reference = OnnxModel(base, device=device)
        return with_onnx(reference, tokenizer, max_new_tokens, on_event=on_event), reference.logits
    from nestpatch.nest_train.generate import with_transformers
    from nestpatch.nest_train.model import load_model, locate, pick_device, pick_dtype

    chosen, _ = pick_device(device)
    dtype, _ = pick_dtype("auto", chosen)
    loaded, own = load_model(locate(base).path, chosen, dtype)
    if own.get_vocab() != tokenizer.get_vocab():
        raise BaseMismatchError(
            f"{base} and the ONNX model have different tokenizers: no drift to measure",
            advice="Give the base that the ONNX model was made from.",
        )
    return with_transformers(loaded, own, max_new_tokens, on_event=on_event), torch_logits(loaded)


def _drift(
    base: Logits, model: Logits, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], answers: Sequence[str]
) -> float:
    texts = list(zip(prompts, answers, strict=True))
    return drift(base, model, encode_pairs(tokenizer, texts, MAX_TOKENS, MAX_TOKENS))
