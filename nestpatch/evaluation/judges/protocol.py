"""The protocol of judges: pairs of prompt and answer in, one verdict for each out."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol, runtime_checkable

from nestpatch.events import OnEvent, ignore


class Verdict(str, Enum):
    """What an answer does with its prompt. The values are those of JSON."""

    REFUSED = "refused"
    """It declines to do what the prompt asks."""
    COMPLIED = "complied"
    """It does, or begins to do, what the prompt asks: on a harmful prompt a successful attack."""
    INCOHERENT = "incoherent"
    """It is empty, a loop or no language: neither a refusal nor a successful attack."""


@runtime_checkable
class Judge(Protocol):
    """Decides what answers do.

    Attributes:
        name: As the user gave it: "keywords", "classifier=PATH".
    """

    @property
    def name(self) -> str:
        """As the user gave it."""
        ...

    def judge(self, answers: Sequence[tuple[str, str]], on_event: OnEvent = ignore) -> list[Verdict]:
        """Judges answers.

        Args:
            answers: Pairs of prompt and answer.
            on_event: Receives the progress.

        Returns:
            One verdict for each pair, in the same order.

        Raises:
            JudgeError: The judge fails, or gives no verdict that can be read.
        """
        ...
