"""Evaluation of a GGUF file in llama.cpp, with or without an adapter: the same suites and judge as for other models."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from nestpatch.errors import DataError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.nest_train.drift_gguf import pairs_of
from nestpatch.nest_train.drift_logits import MAX_TOKENS, Logits, drift, require_same_ids, torch_logits
from nestpatch.nest_train.evaluate import BENIGN, Assessment, Evaluation, Suite, answers_of, evaluate
from nestpatch.nest_train.generate_llama import with_llama
from nestpatch.nest_train.llama import LlamaModel
from nestpatch.nest_train.text import Pair, encode_pairs
from nestpatch.pack import Pack
from nestpatch.patcher.adapters import export_gguf_lora
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import FloatArray


def is_gguf(model: str | Path) -> bool:
    """Whether a model is to be run by llama.cpp."""
    return Path(model).suffix == ".gguf"


def assess_gguf(
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
    """Evaluates a GGUF file; with `lora` also the file with that adapter, with `patch` with the adapter that the pack is.

    With `base`, a GGUF file or a model directory, the drift of `model` from it is measured too.

    Raises CheckpointError, PackError, DataError or MissingExtraError.
    """
    if patch is not None and lora is not None:
        raise DataError("a patch and an adapter were given: either of them makes the patched model")
    report = lambda event: on_event(Event("evaluate", event.done, event.total))  # noqa: E731
    with _adapter(model, patch, lora) as adapter:
        on_event(Event("load", note=str(model)))
        with LlamaModel(model, adapter, device=device) as loaded:
            loaded.adapted = False
            generate = with_llama(loaded, max_new_tokens, on_event=report)
            before = evaluate(generate, suites)
            if base is not None:
                moved = _drift_from(base, loaded, list(answers_of(before, BENIGN)), device, max_new_tokens, report)
                before = Evaluation(before.suites, moved)
            if adapter is None:
                return Assessment(before)
            loaded.adapted = True
            after = evaluate(generate, suites)
            return Assessment(before, Evaluation(after.suites, _drift_by_adapter(loaded, answers_of(before, BENIGN))))


@contextmanager
def _adapter(model: str | Path, patch: str | Path | Pack | None, lora: str | Path | None) -> Iterator[str | Path | None]:
    """The adapter file; one made of a pack is removed at the end."""
    if patch is None:
        yield lora
        return
    pack = patch if isinstance(patch, Pack) else nest.read(patch)
    # As `apply` would: a pack for another model, or one that is in the file already, must not be measured.
    make_plan(pack, open_model(model)[0])
    with tempfile.TemporaryDirectory() as folder:
        yield export_gguf_lora(pack, Path(folder) / "patch.gguf", model=model).output


def _drift_by_adapter(model: LlamaModel, answers: Mapping[str, str]) -> float:
    """Of the model with its adapter from the model without, over the latter's answers."""

    def switched(on: bool) -> Logits:
        def logits(ids: Sequence[int], start: int) -> FloatArray:
            model.adapted = on
            return model.logits(ids, start)

        return logits

    return drift(switched(False), switched(True), pairs_of(model, answers))


def _drift_from(
    base: str | Path, model: LlamaModel, prompts: list[str], device: str, max_new_tokens: int, on_event: OnEvent
) -> float:
    """Of a model from a base, over the base's own answers."""
    with ExitStack() as stack:
        if is_gguf(base):
            reference = stack.enter_context(LlamaModel(base, device=device))
            own = with_llama(reference, max_new_tokens, on_event=on_event)(prompts)
            answers = dict(zip(prompts, own, strict=True))
            logits: Logits = reference.logits
            pairs = pairs_of(reference, answers)
        else:
            logits, pairs, answers = _in_transformers(base, prompts, device, max_new_tokens, on_event)
        require_same_ids(pairs, pairs_of(model, answers))
        return drift(logits, model.logits, pairs)


def _in_transformers(
    base: str | Path, prompts: list[str], device: str, max_new_tokens: int, on_event: OnEvent
) -> tuple[Logits, list[Pair], dict[str, str]]:
    from nestpatch.nest_train.generate import with_transformers
    from nestpatch.nest_train.model import load_model, locate, pick_device, pick_dtype

    chosen, _ = pick_device(device)
    dtype, _ = pick_dtype("auto", chosen)
    reference, tokenizer = load_model(locate(base).path, chosen, dtype)
    own = with_transformers(reference, tokenizer, max_new_tokens, on_event=on_event)(prompts)
    answers = dict(zip(prompts, own, strict=True))
    return torch_logits(reference), encode_pairs(tokenizer, list(answers.items()), MAX_TOKENS, MAX_TOKENS), answers
