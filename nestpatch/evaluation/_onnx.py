"""Evaluation of an ONNX model in onnxruntime, with or without an adapter: the same suites and judge as for other models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from nestpatch.errors import DataError, UnsupportedModelError
from nestpatch.evaluation._runner import Runner, as_evaluation, assess_models, in_transformers, pairs_with, switched
from nestpatch.evaluation.suites import Evaluation, Suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.adapters import export_onnx_adapter
from nestpatch.formats.lora.onnx import SUFFIX, onnx_file
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.runtimes.onnx import OnnxModel, load_tokenizer, with_onnx


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
    pack: Pack | None = None,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    max_new_tokens: int = 48,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Evaluates an ONNX model; with `lora`, an .onnx_adapter file, also with that.

    With `patch` also the patched model: by an adapter where the model was exported adapter-ready, else as a temporary copy.
    The caller answers for the pack: `assess` lets it pass the gate.

    With `base`, an ONNX model or a model directory, the drift of `model` from it is measured too.

    Raises CheckpointError, PackError, DataError or MissingExtraError.
    """
    if pack is not None and lora is not None:
        raise DataError("a patch and an adapter were given: either of them makes the patched model")
    report = as_evaluation(on_event)
    with _patched(model, pack, lora, on_event) as (other, adapter):
        on_event(Event("load", note=str(model)))
        loaded = OnnxModel(model, adapter, device=device)
        tokenizer = load_tokenizer(loaded)

        def run(loaded: OnnxModel, *, on: bool) -> Runner:
            generate = with_onnx(loaded, tokenizer, max_new_tokens, on_event=report)
            return switched(loaded, generate, pairs_with(tokenizer), on=on)

        return assess_models(
            run(loaded, on=False),
            suites,
            Runner.drift,
            patched=None
            if other is None
            else lambda: run(loaded if adapter is not None else OnnxModel(other, device=device), on=True),
            base=None if base is None else _reference(base, device, max_new_tokens, report),
        )


@contextmanager
def _patched(
    model: str | Path, pack: Pack | None, lora: str | Path | None, on_event: OnEvent
) -> Iterator[tuple[str | Path | None, str | Path | None]]:
    """(the patched model, the adapter that it has to be run with); what is made here is removed at the end."""
    if pack is None:
        yield (None if lora is None else model), lora
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter, other = Path(folder) / f"patch{SUFFIX}", Path(folder) / "patched"
        try:
            export_onnx_adapter(pack, adapter, model=model, trust="none")
        except UnsupportedModelError:  # not adapter-ready, or not for these weights
            apply(model, pack, other, trust="none", sync=False, on_event=on_event)
        yield (model, adapter) if adapter.is_file() else (other, None)


def _reference(base: str | Path, device: str, max_new_tokens: int, on_event: OnEvent) -> AbstractContextManager[Runner]:
    return (_in_onnxruntime if is_onnx(base) else in_transformers)(base, device, max_new_tokens, on_event)


@contextmanager
def _in_onnxruntime(model: str | Path, device: str, max_new_tokens: int, on_event: OnEvent) -> Iterator[Runner]:
    loaded = OnnxModel(model, device=device)
    tokenizer = load_tokenizer(loaded)
    generate = with_onnx(loaded, tokenizer, max_new_tokens, on_event=on_event)
    yield Runner(generate, loaded.logits, pairs_with(tokenizer))
