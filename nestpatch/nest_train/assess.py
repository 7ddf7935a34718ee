"""Evaluation of a model on disk, with or without a pack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from nestpatch.errors import DataError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import write_bytes
from nestpatch.nest_train.assess_gguf import assess_gguf, is_gguf
from nestpatch.nest_train.assess_onnx import assess_onnx, is_onnx
from nestpatch.nest_train.evaluate import BENIGN, Assessment, Evaluation, Suite, answers_of, evaluate
from nestpatch.nest_train.generate import with_transformers
from nestpatch.nest_train.model import load_model, locate, pick_device, pick_dtype
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model


def assess(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    patch: str | Path | Pack | None = None,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 48,
    on_event: OnEvent = ignore,
) -> Assessment:
    """Evaluates a model directory, weight file or Hub id; with `patch` also the same model with the pack merged in memory.

    A .gguf file is run by llama.cpp, an ONNX model by onnxruntime, both without torch; there the pack is an adapter where the
    model takes one, and `lora` may be given in its place.
    With `base`, the drift of `model` from that base is measured too.

    Raises CheckpointError, PackError, DataError or MissingExtraError.
    """
    options = {"patch": patch, "lora": lora, "base": base, "device": device, "max_new_tokens": max_new_tokens}
    if is_gguf(model):
        return assess_gguf(model, suites, on_event=on_event, **options)  # type: ignore[arg-type]
    if is_onnx(model):
        return assess_onnx(model, suites, on_event=on_event, **options)  # type: ignore[arg-type]
    if lora is not None:
        raise DataError(
            "an adapter file goes with a .gguf or an ONNX model", advice="Give the pack itself: nestpatch eval MODEL PATCH"
        )
    if base is not None and is_gguf(base):
        raise DataError("the drift from a .gguf base can be measured for .gguf models", advice="Give the base's directory.")
    if base is not None and is_onnx(base):
        raise DataError("the drift from an ONNX base can be measured for ONNX models", advice="Give the base's directory.")
    from nestpatch.nest_train.drift import drift_between
    from nestpatch.nest_train.fold import fold

    pack = nest.read(patch) if isinstance(patch, (str, Path)) else patch
    source = locate(model)
    checkpoint, _ = open_model(source.path)
    chosen_device, _ = pick_device(device)
    chosen_dtype, _ = pick_dtype(dtype, chosen_device)
    on_event(Event("load", note=source.model_id))
    loaded, tokenizer = load_model(source.path, chosen_device, chosen_dtype)
    report = lambda event: on_event(Event("evaluate", event.done, event.total))  # noqa: E731
    generate = with_transformers(loaded, tokenizer, max_new_tokens, on_event=report)
    before = evaluate(generate, suites)
    if base is not None:
        reference, _ = load_model(locate(base).path, chosen_device, chosen_dtype)
        prompts = list(answers_of(before, BENIGN))
        own = with_transformers(reference, tokenizer, max_new_tokens, on_event=report)(prompts)
        answers = dict(zip(prompts, own, strict=True))
        before = Evaluation(before.suites, drift_between(reference, loaded, tokenizer, answers))
    if pack is None:
        return Assessment(before)
    answers = dict(answers_of(before, BENIGN))
    reference, _ = load_model(source.path, chosen_device, chosen_dtype)
    fold(loaded, checkpoint, pack)
    after = evaluate(generate, suites)
    return Assessment(before, Evaluation(after.suites, drift_between(reference, loaded, tokenizer, answers)))


def write_answers(assessment: Assessment, path: Path) -> None:
    """Writes one JSON line per answer: model or patched, suite, prompt, answer, refused, correct."""
    lines = []
    for name, evaluation in (("model", assessment.model), ("patched", assessment.patched)):
        for suite in evaluation.suites if evaluation else ():
            for verdict in suite.verdicts:
                row = {"of": name, "suite": suite.suite, **dataclasses.asdict(verdict)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
