"""The demo's second half: the same patch in the formats that models are served in, each file run and judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train.assess import assess
from nestpatch.nest_train.evaluate import Evaluation, Suite
from nestpatch.patcher.adapters import export_gguf_lora
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


_File = tuple[str, Path, Path | None, float | None]


def _files(folder: Path, on_event: OnEvent) -> Iterator[_File]:
    """(what it is, file, adapter, share of the patch that arrived)."""
    base, patch, place = folder / "base", folder / "patch.nest", folder / "gguf"

    def export(name: str, kind: str, pack: Path | None = None) -> Path:
        return export_gguf(base, place / f"{name}.gguf", pack, type=kind, on_event=on_event).path

    plain = export(f"base-{PLAIN}", PLAIN)
    yield f"GGUF {PLAIN.upper()}, exported", export(f"patched-{PLAIN}", PLAIN, patch), None, None
    for kind in QUANTIZED:
        file = export(kind, kind)
        done = apply_in_place(file, patch, base=base, on_event=on_event)
        yield f"GGUF {kind.upper()}, patched in place", file, None, done.gain
    adapter = export_gguf_lora(patch, place / "adapter.gguf").output
    on_event(Event("export", note=adapter.name))
    yield f"GGUF {PLAIN.upper()} with the adapter", plain, adapter, None
