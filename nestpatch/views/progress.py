"""Progress on stderr: bars on a terminal, elsewhere a line for every stage and one every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nestpatch.events import Event, OnEvent
from nestpatch.plain import one_line
from nestpatch.views.console import duration, err, escape

INTERVAL = 10.0
"""Seconds between two lines about one stage."""
STAGES = {
    "lab.train": "training the lab's base model",
    "lab.write": "writing the lab",
    "load": "loading",
    "guard": "reading harmful prompts",
    "distil": "generating answers of the base",
    "probe": "probing neurons",
    "observe": "observing neurons",
    "select": "selecting neurons",
    "cluster": "clustering neurons",
    "detector": "fitting the detector",
    "remember": "running the frozen layers once",
    "tune": "tuning deltas",
    "look": "answering held-out prompts",
    "measure": "timing the stages",
    "evaluate": "evaluating",
    "detect": "measuring the detector",
    "judge": "judging answers",
    "text": "predicting text",
    "tasks": "running tasks of lm-eval",
    "generate": "generating answers",
    "copy": "copying",
    "merge": "merging rows",
    "undo": "undoing rows",
    "digest": "computing digests",
    "compare": "comparing tensors",
    "check": "comparing with the source model",
    "extract": "extracting deltas",
    "export": "writing tensors",
    "quantize": "quantizing in llama.cpp",
    "convert": "converting in llama.cpp",
    "onnx.trace": "tracing the graph",
    "onnx.quantize": "quantizing matrices",
    "onnx.check": "comparing logits in onnxruntime",
    "download": "downloading",
    "update": "updating models",
}
"""Stage of an event -> what is shown for it; other stages are shown by their name."""


@contextmanager
def shown(*, transient: bool = False) -> Iterator[OnEvent]:
    """Shows progress while the context is open: as bars on a terminal, else as lines.

    Args:
        transient: Whether the bars are taken away at the end.

    Yields:
        The listener that receives the events.
    """
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    left = (TextColumn("[dim]left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"))
    with Progress(*columns, *left, console=err, transient=transient) as bars:
        yield _Bars(bars)


class _Bars:
    """Draws events as bars, one for each stage."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Draws an event."""
        if event.stage == "note":
            self.bars.console.print(f"[dim]{escape(event.note)}")
            return
        if event.stage not in self.tasks:
            # What was done before, by an interrupted process, does not count as fast.
            title = escape(STAGES.get(event.stage, event.stage))
            self.tasks[event.stage] = self.bars.add_task(title, note="", total=None, completed=event.done)
        total = event.total or None
        self.bars.update(self.tasks[event.stage], completed=event.done, total=total, note=escape(event.note))


class _Lines:
    """Prints a line when a stage begins, then one every `INTERVAL` seconds with its step, note and remaining time.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began = self.stage_began = self.printed = clock()
        self.last = self.first = Event("")

    def __call__(self, event: Event) -> None:
        """Prints an event, or passes over it when the last line is recent."""
        if event.stage == "note":
            err.print(f"  {escape(event.note)}")
            return
        now, last, self.last = self.clock(), self.last, event
        # The same stage from the beginning is another round, such as the next suite.
        if event.stage != last.stage or event.done < last.done:
            self.stage_began, self.first = now, event
        if event.stage == last.stage and now - self.printed < INTERVAL:
            return
        self.printed = now
        seconds = now - self.stage_began
        step = f" {event.done}/{event.total}" if event.total else ""
        note = f", {event.note}" if event.note else ""
        left = ""
        # Measured since the first line of this round: what an interrupted process had done before took no time here.
        done = event.done - self.first.done
        if seconds and done > 0 and event.done < event.total:
            left = f", about {duration(seconds / done * (event.total - event.done))} left"
        text = one_line(f"{STAGES.get(event.stage, event.stage)}{step}{note}{left}")
        err.print(f"[{now - self.began:5.0f} s] {text}", markup=False)
