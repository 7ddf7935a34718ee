"""What both demos share: the clock of the stages, the folder they work in, and the numbers that each of them measures."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nestpatch.errors import OutputError
from nestpatch.evaluation.scores import Scores
from nestpatch.nest_train.result import Trained

PACK = "pack.nest"
"""The pack's file in the folder of a demo."""


@dataclass(frozen=True)
class Measured:
    """What every demo measures.

    Attributes:
        seed: Seed of the training.
        before: The numbers of the base.
        after: The numbers of the patched model.
        trained_parameters: Number of trained values.
        model_parameters: Number of parameters of the model.
        pack_bytes: Size of the pack.
        stages: Stage -> (seconds, what happened).
    """

    seed: int
    before: Scores
    after: Scores
    trained_parameters: int
    model_parameters: int
    pack_bytes: int
    stages: dict[str, tuple[float, str]]

    @property
    def helped(self) -> bool:
        """Whether attacks succeed clearly less often: the confidence intervals do not overlap."""
        before, after = self.before.attack_success, self.after.attack_success
        return before is not None and after is not None and after.interval[1] < before.interval[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """What the demo did not show, one sentence each; empty when it went as it should."""
        return () if self.helped else ("The pack did not help: attacks succeed about as often as before.",)

    def _numbers(self) -> dict[str, Any]:
        """What the objects of both demos begin with."""
        return {
            "seed": self.seed,
            "before": self.before.as_json(),
            "after": self.after.as_json(),
            "trained_parameters": self.trained_parameters,
            "model_parameters": self.model_parameters,
            "bytes": self.pack_bytes,
        }

    def _times(self) -> dict[str, Any]:
        """What the objects of both demos end with."""
        return {
            "stages": {stage: round(seconds, 2) for stage, (seconds, _) in self.stages.items()},
            "seconds": round(sum(seconds for seconds, _ in self.stages.values()), 2),
            "helped": self.helped,
        }


@dataclass
class Clock:
    """Times the stages.

    Attributes:
        stages: Stage -> (seconds, what happened).
        began: When the present stage began.
    """

    stages: dict[str, tuple[float, str]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str, what: str) -> None:
        """Ends a stage that began with the end of the last one.

        Args:
            stage: Its name.
            what: What happened, for people.
        """
        now = time.perf_counter()
        self.stages[stage] = (now - self.began, what)
        self.began = now


@contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """Makes the folder that a demo works in.

    Args:
        keep: A new directory that is left behind; None for a temporary one.

    Yields:
        The folder.

    Raises:
        OutputError: `keep` exists and is not an empty directory.
    """
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise OutputError(f"{keep} exists already and is not empty", advice="Give --keep a new directory.")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


def describe_training(trained: Trained) -> str:
    """Says what was trained, for the table of the stages.

    Args:
        trained: The result of the training.

    Returns:
        One sentence.
    """
    count = trained.trained_parameters
    return (
        f"{count:,} parameters trained ({count / trained.model_parameters:.2%}), written as a pack of {trained.nbytes:,} bytes"
    )
