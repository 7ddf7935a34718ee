"""Progress events. The library never draws; a caller that wants progress passes an `on_event`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Event:
    """One step of some work.

    `stage` is a dotted name such as "tune"; `done` of `total` units are finished (`total` 0: unknown); `note` is for people.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""


OnEvent: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default listener: hears nothing."""
