"""The demo: the whole way of a safety patch on the lab model, with every number measured on the files that it wrote."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestpatch.errors import OutputError
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.suites import HEADLINES, Scores, Share, Suite, load_suite
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.adapters import export_gguf_lora, export_onnx_adapter
from nestpatch.export.models import export_gguf
from nestpatch.formats import nest
from nestpatch.lab.build import Lab, cached_lab, copy_lab
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import Trained, TrainingData, train
from nestpatch.pack import Label
from nestpatch.patcher.apply import Applied, apply
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.prompts.readers import load_prompts

SUITES = ("harmful.test", "jailbreak.test", "benign.test", "lookalike.test")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured."""

    seed: int
    before: Scores
    after: Scores
    trained_parameters: int
    model_parameters: int
    pack_bytes: int
    applied: Applied
    stages: dict[str, tuple[float, str]]
    """Stage -> (seconds, what happened)."""
    formats: tuple[FormatResult, ...] = ()
    """The patched model in other formats; none where nothing is installed to run them."""

    @property
    def helped(self) -> bool:
        """Whether attacks succeed clearly less often: the intervals do not overlap."""
        before, after = self.before.attack_success, self.after.attack_success
        return before is not None and after is not None and after.interval[1] < before.interval[0]

    def as_json(self) -> dict[str, Any]:
        """One object for machines."""
        shares = {name: _change(getattr(self.before, name), getattr(self.after, name)) for name in HEADLINES}
        return {
            "seed": self.seed,
            **shares,
            "trained_parameters": self.trained_parameters,
            "model_parameters": self.model_parameters,
            "pack_bytes": self.pack_bytes,
            "formats": {
                one.what: {name: round(share.value, 4) for name, share in one.evaluation.totals().items()}
                for one in self.formats
            },
            "seconds": {stage: round(seconds, 2) for stage, (seconds, _) in self.stages.items()},
        }


def _change(before: Share, after: Share) -> dict[str, float]:
    return {"before": round(before.value, 4), "after": round(after.value, 4)}


@dataclass
class _Clock:
    """Times the stages."""

    stages: dict[str, tuple[float, str]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str, what: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = (now - self.began, what)
        self.began = now


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} exists already and is not empty", advice="Give --keep a new directory.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def run_demo(seed: int = 0, keep: Path | None = None, on_event: OnEvent = ignore) -> DemoResult:
    """Builds the lab, trains a patch, applies it to the safetensors file, and evaluates base and patched file.

    Where llama-cpp-python and onnxruntime are installed, GGUF files and ONNX models of the patched model too. `keep` is left
    with base/, patched/, patch.nest, prompts/, gguf/ and onnx/.
    """
    clock = _Clock()
    with _folder(keep) as folder:
        lab = cached_lab(seed, on_event=on_event)
        copy_lab(lab, folder)
        origin = "from the cache" if lab.cached else "trained from scratch"
        clock.lap("lab", f"a chat model of {lab.parameters:,} parameters, {origin}")
        trained = _train(lab, folder, seed, on_event)
        count, share = trained.trained_parameters, trained.trained_parameters / trained.model_parameters
        pack_bytes = (folder / "patch.nest").stat().st_size
        clock.lap("train", f"{count:,} parameters trained ({share:.2%}), written as a pack of {pack_bytes:,} bytes")
        applied = apply(folder / "base", folder / "patch.nest", folder / "patched", trust="none", on_event=on_event)
        clock.lap("apply", f"{applied.rows} rows of {applied.tensors} tensors merged into the safetensors file")
        suites = [load_suite(str(folder / "prompts" / f"{name}.jsonl")) for name in SUITES]
        before = evaluate(folder / "base", suites, on_event=on_event).model
        after = evaluate(folder / "patched", suites, base=folder / "base", on_event=on_event).model
        clock.lap("evaluate", f"{sum(len(s.prompts.prompts) for s in suites)} held-out prompts, base and patched file")
        formats: tuple[FormatResult, ...] = ()
        if has_llama():
            formats = run_gguf(folder, suites, on_event)
            clock.lap("gguf", "exported, patched in place, and run in llama.cpp, also with an adapter")
        if has_onnx():
            formats += run_onnx(folder, suites, on_event)
            clock.lap("onnx", "exported, patched in place, and run in onnxruntime, also with an adapter")
    on_event(Event("done"))
    sizes = (trained.trained_parameters, trained.model_parameters, pack_bytes)
    return DemoResult(seed, before, after, *sizes, applied, clock.stages, formats)


def _train(lab: Lab, folder: Path, seed: int, on_event: OnEvent) -> Trained:
    data = TrainingData(*(load_prompts(lab.prompts(f"{kind}.train")) for kind in ("harmful", "benign", "lookalike")))
    label = Label("lab-no-harm", description="Refuses the lab world's harmful requests.", license="Apache-2.0")
    trained = train(folder / "base", data, label, recipe=Recipe(seed=seed), on_event=on_event)
    nest.write(trained.pack, folder / "patch.nest")
    return trained


PLAIN, QUANTIZED = "f16", ("q8_0", "q4_k_m")
"""GGUF types: the one exported with the patch in it, and those whose files are patched where they are."""


@dataclass(frozen=True)
class FormatResult:
    """The patched model in one format."""

    what: str
    """For people: "GGUF Q8_0, patched in place"."""
    evaluation: Scores
    delivered: float | None = None
    """Smallest share of the patch that arrived in a tensor of quantized rows; None where that says nothing."""


def has_llama() -> bool:
    """Whether llama.cpp is here to run GGUF files."""
    return importlib.util.find_spec("llama_cpp") is not None


def has_onnx() -> bool:
    """Whether ONNX models can be exported and run here."""
    return all(importlib.util.find_spec(module) for module in ("onnxruntime", "onnxscript"))


def run_gguf(folder: Path, suites: Sequence[Suite], on_event: OnEvent = ignore) -> tuple[FormatResult, ...]:
    """Exports the base and the patched model of a demo folder, patches the quantized files in place, and runs all of them.

    `folder` holds base/ and patch.nest; the files are left in its gguf/.
    """
    (folder / "gguf").mkdir()
    results = []
    for what, model, lora, delivered in _files(folder, on_event):
        found = evaluate(model, suites, lora=lora, on_event=on_event)
        results.append(FormatResult(what, found.patched or found.model, delivered))
    return tuple(results)


def run_onnx(folder: Path, suites: Sequence[Suite], on_event: OnEvent = ignore) -> tuple[FormatResult, ...]:
    """The same in ONNX: exported with the patch, the int4 graph patched in place, and a graph that takes the patch at run time.

    The directories are left in the folder's onnx/.
    """
    from nestpatch.export.onnx.exporter import export_onnx

    base, patch, place = folder / "base", folder / "patch.nest", folder / "onnx"
    place.mkdir()

    def run(what: str, model: Path, lora: Path | None = None, delivered: float | None = None) -> FormatResult:
        found = evaluate(model, suites, lora=lora, on_event=on_event)
        return FormatResult(what, found.patched or found.model, delivered)

    plain = export_onnx(base, place / "patched-fp32", patch, trust="none", on_event=on_event).path
    int4 = export_onnx(base, place / "int4", bits=4, on_event=on_event).path
    done = apply_in_place(int4, patch, trust="none", base=base, on_event=on_event)
    ready = export_onnx(base, place / "adapter-ready", adapter_ready=True, on_event=on_event).path
    adapter = export_onnx_adapter(patch, ready, place / "patch.onnx_adapter", trust="none").output
    return (
        run("ONNX fp32, exported", plain),
        run("ONNX int4, patched in place", int4, delivered=done.retention),
        run("ONNX fp32 with the adapter", ready, adapter),
    )


_File = tuple[str, Path, Path | None, float | None]


def _files(folder: Path, on_event: OnEvent) -> Iterator[_File]:
    """(what it is, file, adapter, share of the patch that arrived)."""
    base, patch, place = folder / "base", folder / "patch.nest", folder / "gguf"

    def export(name: str, kind: str, pack: Path | None = None) -> Path:
        return export_gguf(base, place / f"{name}.gguf", pack, trust="none", type=kind, on_event=on_event).path

    plain = export(f"base-{PLAIN}", PLAIN)
    yield f"GGUF {PLAIN.upper()}, exported", export(f"patched-{PLAIN}", PLAIN, patch), None, None
    for kind in QUANTIZED:
        file = export(kind, kind)
        done = apply_in_place(file, patch, trust="none", base=base, on_event=on_event)
        yield f"GGUF {kind.upper()}, patched in place", file, None, done.retention
    adapter = export_gguf_lora(patch, place / "adapter.gguf", trust="none").output
    on_event(Event("export", note=adapter.name))
    yield f"GGUF {PLAIN.upper()} with the adapter", plain, adapter, None
