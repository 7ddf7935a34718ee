"""Evaluation of a GGUF file in llama.cpp, with or without an adapter: the same suites and judge as for other models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from nestpatch.errors import DataError
from nestpatch.evaluation._runner import Runner, as_evaluation, assess_models, in_transformers, switched
from nestpatch.evaluation.drift import pairs_of
from nestpatch.evaluation.suites import Evaluation, Suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.adapters import export_gguf_lora
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.llama import LlamaModel, with_llama


def is_gguf(model: str | Path) -> bool:
    """Whether a model is to be run by llama.cpp."""
    return Path(model).suffix == ".gguf"


def assess_gguf(
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
    """Evaluates a GGUF file; with `lora` also the file with that adapter, with `patch` with the adapter that the pack is.

    The caller answers for the pack: `assess` lets it pass the gate.

    With `base`, a GGUF file or a model directory, the drift of `model` from it is measured too.

    Raises CheckpointError, PackError, DataError or MissingExtraError.
    """
    if pack is not None and lora is not None:
        raise DataError("a patch and an adapter were given: either of them makes the patched model")
    report = as_evaluation(on_event)
    with _adapter(model, pack, lora) as adapter:
        on_event(Event("load", note=str(model)))
        with LlamaModel(model, adapter, device=device) as loaded:
            own = with_llama(loaded, max_new_tokens, on_event=report), partial(pairs_of, loaded)
            return assess_models(
                switched(loaded, *own),
                suites,
                Runner.drift,
                patched=None if adapter is None else lambda: switched(loaded, *own, on=True),
                base=None if base is None else _reference(base, device, max_new_tokens, report),
            )


@contextmanager
def _adapter(model: str | Path, pack: Pack | None, lora: str | Path | None) -> Iterator[str | Path | None]:
    """The adapter file; one made of a pack is removed at the end."""
    if pack is None:
        yield lora
        return
    # As `apply` would: a pack for another model, or one that is in the file already, must not be measured.
    make_plan(pack, open_model(model)[0])
    with tempfile.TemporaryDirectory() as folder:
        yield export_gguf_lora(pack, Path(folder) / "patch.gguf", model=model, trust="none").output


def _reference(base: str | Path, device: str, max_new_tokens: int, on_event: OnEvent) -> AbstractContextManager[Runner]:
    return (_in_llama if is_gguf(base) else in_transformers)(base, device, max_new_tokens, on_event)


@contextmanager
def _in_llama(model: str | Path, device: str, max_new_tokens: int, on_event: OnEvent) -> Iterator[Runner]:
    with LlamaModel(model, device=device) as loaded:
        yield Runner(with_llama(loaded, max_new_tokens, on_event=on_event), loaded.logits, partial(pairs_of, loaded))
