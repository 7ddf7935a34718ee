"""Curves of a training in TensorBoard or Weights & Biases, through the trackers of accelerate."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestpatch.errors import DataError, MissingExtraError
from nestpatch.events import Event, OnEvent

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
"""Tracker -> the modules of which it needs one."""


def require_tracker(name: str | None) -> None:
    """Checks that a tracker can be used, without importing it.

    Args:
        name: "tensorboard", "wandb", or None for no tracker.

    Raises:
        DataError: There is no such tracker.
        MissingExtraError: Its package is not installed.
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise DataError(f"there is no tracker {name!r}", advice=f"The trackers are {', '.join(TRACKERS)}.")
    if not any(importlib.util.find_spec(module) for module in TRACKERS[name]):
        raise MissingExtraError(name, f"tracking with {name}")


@contextmanager
def tracked(
    name: str | None, folder: Path | None, settings: Mapping[str, Any], identity: str, on_event: OnEvent, *, cpu: bool
) -> Iterator[OnEvent]:
    """Sends the measured values of events to a tracker while the context is open.

    Args:
        name: As for `require_tracker`.
        folder: Where the tracker writes its files; None for the current folder.
        settings: Shown beside the curves.
        identity: Text that is the same for an interrupted training and its continuation, which then share their curves.
        on_event: Receives all events.
        cpu: Whether the training computes on the CPU.

    Yields:
        The listener to report events to.
    """
    if name is None:
        yield on_event
        return
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=cpu)  # trackers ask it which process they run in
    place = os.fspath(folder or Path.cwd())
    own = {"logging_dir": place} if name == "tensorboard" else {"dir": place, "id": identity[:16], "resume": "allow"}
    tracker = LOGGER_TYPE_TO_CLASS[name]("nestpatch", **own)
    tracker.start()
    try:
        tracker.store_init_configuration(dict(settings))

        def listen(event: Event) -> None:
            if event.values:
                tracker.log(dict(event.values), step=event.done)
            on_event(event)

        yield listen
    finally:
        tracker.finish()
