"""Evaluation of a model on disk, with or without a pack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.errors import DataError
from nestpatch.evaluation._gguf import assess_gguf, is_gguf
from nestpatch.evaluation._onnx import assess_onnx, is_onnx
from nestpatch.evaluation._runner import as_evaluation, assess_models
from nestpatch.evaluation.suites import Evaluation, Suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import write_bytes
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.transformers import Generate, fold, load_model, locate, pick_device, pick_dtype, with_transformers
from nestpatch.signing.trust import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: PackLike | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 48,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Evaluates a model directory, weight file or Hub id; with `pack` also the same model with the pack merged in memory.

    A .gguf file is run by llama.cpp, an ONNX model by onnxruntime, both without torch; there the pack is an adapter where the
    model takes one, and `lora` may be given in its place.
    With `base`, the drift of `model` from that base is measured too. The patch passes the gate first, by `policy`, `trust` and
    `allow_unsigned`, as for `apply_in_place`: what is measured is what would be applied.

    Raises SignatureError, CheckpointError, PackError, DataError or MissingExtraError.
    """
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    options = {"pack": proven, "lora": lora, "base": base, "device": device, "max_new_tokens": max_new_tokens}
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
    import transformers  # noqa: F401 - a host without it learns that before anything is read

    source = locate(model)
    checkpoint, _ = open_model(source.path)
    chosen_device, _ = pick_device(device)
    chosen_dtype, _ = pick_dtype(dtype, chosen_device)
    on_event(Event("load", note=source.model_id))
    loaded, tokenizer = load_model(source.path, chosen_device, chosen_dtype)

    def run(model: PreTrainedModel) -> _InTransformers:
        return _InTransformers(
            model, tokenizer, with_transformers(model, tokenizer, max_new_tokens, on_event=as_evaluation(on_event))
        )

    def patched(pack: Pack) -> _InTransformers:
        second, _ = load_model(source.path, chosen_device, chosen_dtype)
        fold(second, checkpoint, pack)
        return run(second)

    @contextmanager
    def reference(base: str | Path) -> Iterator[_InTransformers]:
        yield run(load_model(locate(base).path, chosen_device, chosen_dtype)[0])

    return assess_models(
        run(loaded),
        suites,
        _drift,
        patched=None if proven is None else partial(patched, proven),
        base=None if base is None else reference(base),
    )


@dataclass(frozen=True, eq=False)
class _InTransformers:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    generate: Generate


def _drift(base: _InTransformers, model: _InTransformers, answers: Mapping[str, str]) -> float:
    from nestpatch.evaluation.drift import drift_between

    return drift_between(base.model, model.model, model.tokenizer, answers)


def write_answers(assessment: Evaluation, path: Path) -> None:
    """Writes one JSON line per answer: model or patched, suite, prompt, answer, refused, correct."""
    lines = []
    for name, evaluation in (("model", assessment.model), ("patched", assessment.patched)):
        for suite in evaluation.suites if evaluation else ():
            for verdict in suite.verdicts:
                row = {"of": name, "suite": suite.suite, **dataclasses.asdict(verdict)}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
