"""Progress events. The library never draws: a caller that shows progress passes an `on_event`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import TypeAlias

from nestpatch.values import dataclass


@dataclass(frozen=True)
class Event:
    """A step of some work.

    Attributes:
        stage: A dotted name, such as "tune".
        done: Units that are finished.
        total: All units; 0 when unknown.
        note: For people.
        values: Measured numbers by name, such as "loss", for those who draw curves.
    """

    stage: str
    done: int = 0
    total: int = 0
    note: str = ""
    values: Mapping[str, float] = field(default_factory=dict, hash=False)


OnEvent: TypeAlias = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The default listener: does nothing.

    Args:
        event: Any event.
    """
