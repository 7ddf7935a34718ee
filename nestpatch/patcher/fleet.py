"""The verb `update_all`: bringing several models of one host to what their channels offer, in parallel.

Every model keeps its own lock, journal and transaction, and a failure of one leaves the others alone. Channels are asked once
for all models (channels/shared.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.channels.shared import SharedReaders, Stop
from nestpatch.errors import NestpatchError, named
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import policy_of
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.update import Task, Updated
from nestpatch.signing.trust import Policy

AT_ONCE = 4
"""Models that are changed at the same time, by threads: they wait for the disk together. Eight were no faster on two cores, and
two processes of two threads hardly (bench/LOG.md, 2026-11-26)."""


@dataclass(frozen=True)
class UpdatedModel:
    """The result of `update_all` for one model."""

    model: Path
    channels: tuple[Updated, ...]
    """One value per channel; empty when the model itself could not be updated: see `error`."""
    seconds: float
    reason: str = ""
    """Why the model could not be updated."""
    error: str = ""
    """Name of the error class in errors.py; empty when its channels were tried."""
    advice: str = ""
    """What to do about the failure."""

    @property
    def state(self) -> str:
        """The worst of its channels: "failed", "available", "updated" or "current"."""
        states = {result.state for result in self.channels}
        return "failed" if self.error else next((s for s in ("failed", "available", "updated") if s in states), "current")

    def as_json(self) -> dict[str, Any]:
        """The model for `--json`."""
        return {
            "model": str(self.model),
            "state": self.state,
            "channels": [result.as_json() for result in self.channels],
            "reason": self.reason,
            "error": self.error,
            "advice": self.advice,
            "seconds": self.seconds,
        }


def update_all(
    models: Iterable[str | Path],
    channels: Sequence[str] = (),
    *,
    policy: Policy | None = None,
    check: bool = False,
    allow_unsigned: bool = False,
    allow_overlap: bool = False,
    base: Checkpoint | None = None,
    dither: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[UpdatedModel, ...]:
    """Brings several models to what their channels offer. Each channel is asked once, each of its files is read once.

    A model that cannot be updated is returned as "failed". When this thread is interrupted, models whose change is under way
    are put back or finished before KeyboardInterrupt goes on, and no further one is begun.

    Args:
        models: The models to patch in place. One that is named twice, also through a link, is updated once.
        channels: Channels without versions, for all of the models; empty means those that each model follows.
        policy: Whose signatures count; None means the policy of this user and this machine.
        check: Only reports what there is to do, and changes nothing.
        allow_unsigned: Accepts channels and packs that too few trusted keys have signed.
        allow_overlap: Adds a pack to others that change the same rows.
        base: The float model, to make quantized rows from exactly.
        dither: Adds noise before quantized rows are rounded.
        on_event: Receives an event after each model.

    Returns:
        One value per model, in the order of `models`.

    Raises:
        DataError: A text does not name a channel. Nothing was tried.
        TrustError: The policy cannot be read. Nothing was tried.
    """
    stop = Stop()
    readers = SharedReaders(stop)
    given = [readers.open(channel) for channel in channels]
    task = Task(policy_of(policy), check, allow_unsigned, allow_overlap, base, dither, lambda _: stop.check())

    def one(model: Path) -> UpdatedModel:
        began = time.perf_counter()
        try:
            stop.check()
            return UpdatedModel(model, task.update(model, given, readers), time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one model leaves the others alone
            why = named(error)
            return UpdatedModel(model, (), time.perf_counter() - began, str(why), type(why).__name__, why.advice)

    several = distinct(models)
    with ThreadPoolExecutor(min(AT_ONCE, len(several)) or 1) as pool:
        found = [pool.submit(copy_context().run, one, model) for model in several]  # with the caller's limit of threads
        try:
            for done, future in enumerate(as_completed(found), 1):
                on_event(Event("update", done, len(several), str(future.result().model)))
        except BaseException:
            stop.call()
            raise
    return tuple(future.result() for future in found)


def distinct(models: Iterable[str | Path]) -> list[Path]:
    """The models without those that are named twice.

    Args:
        models: Paths of models.

    Returns:
        One path for each model, in order. Of several names of one model a link is not taken where there is another name: a
        weight file is not changed through a link.
    """
    places: dict[object, Path] = {}
    for path in map(Path, models):
        place = _place(path)
        if place not in places or (places[place].is_symlink() and not path.is_symlink()):
            places[place] = path
    return list(places.values())


def _place(model: Path) -> object:
    """Equal for different names of one model."""
    try:
        return state_dir_of(model).place
    except (NestpatchError, OSError, ValueError):
        return os.path.realpath(model)  # its update reports what is wrong
