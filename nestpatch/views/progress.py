"""Progress on stderr: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from nestpatch.events import Event, OnEvent
from nestpatch.plain import one_line
from nestpatch.views.console import err, escape

STAGES = {
    "lab.train": "training the lab's base model",
    "lab.write": "writing the lab",
    "load": "loading",
    "distil": "asking the base",
    "probe": "probing neurons",
    "select": "selecting neurons",
    "cluster": "clustering neurons",
    "tune": "tuning deltas",
    "evaluate": "evaluating",
    "copy": "copying",
    "merge": "merging rows",
    "undo": "undoing rows",
    "digest": "taking digests",
    "compare": "comparing tensors",
    "extract": "extracting deltas",
    "export": "writing tensors",
    "quantize": "quantizing in llama.cpp",
    "convert": "converting in llama.cpp",
    "onnx.trace": "tracing the graph",
    "onnx.quantize": "quantizing matrices",
    "onnx.check": "comparing logits in onnxruntime",
    "download": "downloading",
}


@contextmanager
def shown() -> Iterator[OnEvent]:
    """A listener that draws bars on a terminal and prints one line per stage elsewhere."""
    if err.is_terminal:
        with _bars() as bars:
            yield _Drawer(bars).hear
    else:
        yield _Printer().hear


def _bars() -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("[dim]{task.fields[note]}"), console=err)


class _Drawer:
    """Draws events as bars, one per stage."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def hear(self, event: Event) -> None:
        if event.stage == "note":
            self.bars.console.print(f"[dim]{escape(event.note)}")
            return
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bars.add_task(escape(STAGES.get(event.stage, event.stage)), note="", total=None)
        total = event.total or None
        self.bars.update(self.tasks[event.stage], completed=event.done, total=total, note=escape(event.note))


class _Printer:
    """Prints each stage once, and every note."""

    def __init__(self) -> None:
        self.stage = ""
        self.began = time.monotonic()

    def hear(self, event: Event) -> None:
        if event.stage == "note":
            err.print(f"  {escape(event.note)}")
        elif event.stage != self.stage:
            self.stage = event.stage
            name = one_line(STAGES.get(event.stage, event.stage))
            err.print(f"[{time.monotonic() - self.began:5.0f} s] {name}", markup=False)
