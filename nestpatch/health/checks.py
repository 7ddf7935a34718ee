"""What one check of a model's health found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


class Health(Enum):
    """The outcome of a check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    """What was checked, one of NAMES."""
    state: Health
    detail: str
    """What was found, in one sentence."""
    advice: str = ""
    """What to do about it; empty where there is nothing to do."""
    pack: str = ""
    """Label of the pack that it is about; empty for the model as a whole."""

    def as_json(self) -> dict[str, Any]:
        """The check for `--json`."""
        return {
            "check": self.name,
            "state": self.state.value,
            "pack": self.pack or None,
            "detail": self.detail,
            "advice": self.advice,
        }


NAMES = (
    "journal",
    "ledger",
    "pack",
    "rows",
    "subspace",
    "undo",
    "leftovers",
    "signature",
    "channel",
    "template",
    "generation",
    "measurement",
)
"""Every check, in the order in which they are shown."""
