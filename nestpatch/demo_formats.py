"""The demo's second half: the same patch in the formats that models are served in, each file run and judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train.assess import assess
from nestpatch.nest_train.evaluate import Evaluation, Suite
from nestpatch.patcher.adapters import export_gguf_lora, export_onnx_adapter
from nestpatch.patcher.export import export_gguf
from nestpatch.patcher.inplace import apply_in_place

PLAIN, QUANTIZED = "f16", ("q8_0", "q4_k_m")
"""GGUF types: the one exported with the patch in it, and those whose files are patched where they are."""


@dataclass(frozen=True)
class FormatResult:
    """The patched model in one format."""

    what: str
    """For people: "GGUF Q8_0, patched in place"."""
    evaluation: Evaluation
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
        found = assess(model, suites, lora=lora, on_event=on_event)
        results.append(FormatResult(what, found.patched or found.model, delivered))
    return tuple(results)


def run_onnx(folder: Path, suites: Sequence[Suite], on_event: OnEvent = ignore) -> tuple[FormatResult, ...]:
    """The same in ONNX: exported with the patch, the int4 graph patched in place, and a graph that takes the patch at run time.

    The directories are left in the folder's onnx/.
    """
    from nestpatch.onnx_export.to_onnx import export_onnx

    base, patch, place = folder / "base", folder / "patch.nest", folder / "onnx"
    place.mkdir()

    def run(what: str, model: Path, lora: Path | None = None, delivered: float | None = None) -> FormatResult:
        found = assess(model, suites, lora=lora, on_event=on_event)
        return FormatResult(what, found.patched or found.model, delivered)

    plain = export_onnx(base, place / "patched-fp32", patch, trust="none", on_event=on_event).path
    int4 = export_onnx(base, place / "int4", bits=4, on_event=on_event).path
    done = apply_in_place(int4, patch, trust="none", base=base, on_event=on_event)
    ready = export_onnx(base, place / "adapter-ready", adapter_ready=True, on_event=on_event).path
    adapter = export_onnx_adapter(patch, ready, place / "patch.onnx_adapter", trust="none").output
    return (
        run("ONNX fp32, exported", plain),
        run("ONNX int4, patched in place", int4, delivered=done.gain),
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
        yield f"GGUF {kind.upper()}, patched in place", file, None, done.gain
    adapter = export_gguf_lora(patch, place / "adapter.gguf", trust="none").output
    on_event(Event("export", note=adapter.name))
    yield f"GGUF {PLAIN.upper()} with the adapter", plain, adapter, None
