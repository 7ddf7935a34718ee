"""The demo on the lab's model: safetensors, GGUF and ONNX files, in minutes and without any download.

Public: `run_lab_demo`; `train_lab_pack` for the benchmarks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.demo.stages import PACK, Clock, Measured, describe_training, work_folder
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.scores import Scores
from nestpatch.evaluation.suites import Suite, load_suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.adapters import export_gguf_lora, export_onnx_adapter
from nestpatch.export.gguf import export_gguf
from nestpatch.lab.build import Lab, cached_lab, copy_lab
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import make_recipe
from nestpatch.nest_train.result import Trained
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.apply import Applied, apply
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.prompts.readers import load_prompts

_SUITES = ("harmful.test", "jailbreak.test", "benign.test", "lookalike.test")
"""The prompt sets that are evaluated."""
_PLAIN, _QUANTIZED = "f16", ("q8_0", "q4_k_m")
"""GGUF types: the one that is exported with the pack merged in, and those whose files are patched in place."""


@dataclass(frozen=True)
class FormatResult:
    """The patched model in one format."""

    what: str
    """For people: "GGUF Q8_0, patched in place"."""
    evaluation: Scores
    retention: float | None = None
    """Smallest share of the patch that is left in a tensor after quantization; None where nothing was quantized."""

    def as_json(self) -> dict[str, Any]:
        """The format for `--json`."""
        return {"what": self.what, "after": self.evaluation.as_json(), "retention": self.retention}


@dataclass(frozen=True)
class LabDemo(Measured):
    """What the demo on the lab's model measured."""

    applied: Applied
    formats: tuple[FormatResult, ...] = ()
    """The patched model in other formats; empty where no runtime for them is installed."""

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {"lab": True, **self._numbers(), "formats": [one.as_json() for one in self.formats], **self._times()}


def run_lab_demo(seed: int = 0, keep: Path | None = None, on_event: OnEvent = ignore) -> LabDemo:
    """Builds the lab, trains a pack, applies it to the safetensors file, and evaluates the base and the patched file.

    Where llama-cpp-python or onnxruntime is installed, the patched model is evaluated as GGUF files or ONNX models too.

    Args:
        seed: Seed of the lab and of the training.
        keep: A new directory that is left with base/, patched/, pack.nest, prompts/, gguf/ and onnx/; None keeps nothing.
        on_event: Called with the progress.

    Returns:
        The numbers, and how long each stage took.

    Raises:
        OutputError: `keep` exists and is not empty, or cannot be written.
        MissingExtraError: The packages of the extra `train` are not installed.
    """
    clock = Clock()
    with work_folder(keep) as folder:
        lab = cached_lab(seed, on_event=on_event)
        copy_lab(lab, folder)
        origin = "from the cache" if lab.cached else "trained from scratch"
        clock.lap("lab", f"a chat model of {lab.parameters:,} parameters, {origin}")
        trained = train_lab_pack(lab, folder / PACK, on_event)
        clock.lap("train", describe_training(trained))
        applied = apply(folder / "base", folder / PACK, folder / "patched", trust="none", on_event=on_event)
        clock.lap("apply", f"{applied.rows} rows of {applied.tensors} tensors merged into the safetensors file")
        suites = [load_suite(str(folder / "prompts" / f"{name}.jsonl")) for name in _SUITES]
        before = evaluate(folder / "base", suites, on_event=on_event).model
        after = evaluate(folder / "patched", suites, base=folder / "base", on_event=on_event).model
        clock.lap("evaluate", f"{sum(len(s.prompts.prompts) for s in suites)} held-out prompts, base and patched file")
        formats: tuple[FormatResult, ...] = ()
        if importlib.util.find_spec("llama_cpp"):
            formats = _run_gguf(folder, suites, on_event)
            clock.lap("gguf", "exported, patched in place, and run in llama.cpp, also with an adapter")
        if all(importlib.util.find_spec(module) for module in ("onnxruntime", "onnxscript")):
            formats += _run_onnx(folder, suites, on_event)
            clock.lap("onnx", "exported, patched in place, and run in onnxruntime, also with an adapter")
    on_event(Event("done"))
    sizes = (trained.trained_parameters, trained.model_parameters, trained.nbytes)
    return LabDemo(seed, before, after, *sizes, clock.stages, applied, formats)


def train_lab_pack(lab: Lab, output: Path, on_event: OnEvent = ignore) -> Trained:
    """Trains a pack on a lab's base and prompts, with the recipe `lab`.

    Args:
        lab: The lab, whose seed is also that of the training.
        output: The pack's file, which must not exist.
        on_event: Called with the progress.

    Returns:
        The result of the training.

    Raises:
        TrainingError: No neuron separates harmful from harmless prompts.
        OutputError: The file exists or cannot be written.
    """
    data = TrainingData(*(load_prompts(lab.prompts(f"{kind}.train")) for kind in ("harmful", "benign", "lookalike")))
    label = Label("lab-no-harm", description="Refuses the harmful requests of the lab world.", license="Apache-2.0")
    recipe = make_recipe("lab", defaults={"seed": lab.seed})
    return train(lab.base, data, label, recipe=recipe, output=output, on_event=on_event)


def _run_gguf(folder: Path, suites: Sequence[Suite], on_event: OnEvent) -> tuple[FormatResult, ...]:
    """Exports the patched and the base model, patches quantized files in place, and runs all of them. Leaves gguf/."""
    base, pack, place = folder / "base", folder / PACK, folder / "gguf"
    place.mkdir()

    def export(name: str, kind: str, pack: Path | None = None) -> Path:
        return export_gguf(base, pack, place / f"{name}.gguf", trust="none", type=kind, on_event=on_event).output

    def run(what: str, model: Path, lora: Path | None = None, retention: float | None = None) -> FormatResult:
        found = evaluate(model, suites, lora=lora, on_event=on_event)
        return FormatResult(f"GGUF {what}", found.patched or found.model, retention)

    plain = export(f"base-{_PLAIN}", _PLAIN)
    results = [run(f"{_PLAIN.upper()}, exported", export(f"patched-{_PLAIN}", _PLAIN, pack))]
    for kind in _QUANTIZED:
        file = export(kind, kind)
        done = apply_in_place(file, pack, trust="none", base=base, listed=False, on_event=on_event)
        results.append(run(f"{kind.upper()}, patched in place", file, retention=done.retention))
    adapter = export_gguf_lora(pack, place / "adapter.gguf", trust="none").output
    return (*results, run(f"{_PLAIN.upper()} with the adapter", plain, adapter))


def _run_onnx(folder: Path, suites: Sequence[Suite], on_event: OnEvent) -> tuple[FormatResult, ...]:
    """The same in ONNX: a graph with the pack, an int4 graph patched in place, a graph that takes an adapter. Leaves onnx/."""
    from nestpatch.export.onnx.exporter import export_onnx

    base, pack, place = folder / "base", folder / PACK, folder / "onnx"
    place.mkdir()

    def run(what: str, model: Path, lora: Path | None = None, retention: float | None = None) -> FormatResult:
        found = evaluate(model, suites, lora=lora, on_event=on_event)
        return FormatResult(f"ONNX {what}", found.patched or found.model, retention)

    plain = export_onnx(base, pack, place / "patched-fp32", trust="none", on_event=on_event).output
    int4 = export_onnx(base, output=place / "int4", bits=4, on_event=on_event).output
    done = apply_in_place(int4, pack, trust="none", base=base, listed=False, on_event=on_event)
    ready = export_onnx(base, output=place / "adapter-ready", adapter_ready=True, on_event=on_event).output
    adapter = export_onnx_adapter(pack, place / "adapter.onnx_adapter", model=ready, trust="none").output
    return (
        run("fp32, exported", plain),
        run("int4, patched in place", int4, retention=done.retention),
        run("fp32 with the adapter", ready, adapter),
    )
