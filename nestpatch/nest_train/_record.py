"""The record of a run, `run.json` in its directory: everything that a reader needs to repeat it, and how it went.

Public in the room: `RunRecord` and `Stopwatch`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nestpatch import __version__
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.pack import utc_now
from nestpatch.plain import finite

_FORMAT = "nestpatch-run/1"
_MAX_RECORD = 64 << 20
_MAX_SESSIONS = 1000
PACKAGES = ("torch", "transformers", "accelerate", "scikit-learn", "numpy")
"""The packages whose versions decide what a training computes, beside this one."""


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that train."""
    # This package may run from its source tree, which has no metadata.
    own = {"python": platform.python_version(), "nestpatch": __version__}
    return own | {name: version(name) for name in PACKAGES}


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str, times: float = 1) -> Iterator[None]:
        """Times the block and counts it `times` times."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + times * (time.perf_counter() - began)


class RunRecord:
    """The file and what will be written to it next. Without a path nothing is written.

    Every process that worked on the run is one of its "sessions".

    Args:
        path: The file; None for a training without a run directory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._watch = Stopwatch()
        self._facts: dict[str, Any] = {}
        self._earlier = _sessions_of(path) if path else []
        self._session: dict[str, Any] = {"state": "running", "started": utc_now(), "command": sys.argv, "process": os.getpid()}

    @contextmanager
    def session(self) -> Iterator[None]:
        """Records how the block ends: "done", "interrupted" or "failed"."""
        self.update(versions=versions(), machine=_machine())
        state = "failed"
        try:
            yield
            state = "done"
        except (KeyboardInterrupt, SystemExit):
            state = "interrupted"
            raise
        finally:
            self._session |= {"state": state, "ended": utc_now()}
            self.update()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the block to a stage.

        Args:
            stage: Its name.
        """
        with self._watch(stage):
            yield
        self.update()

    def update(self, session: dict[str, Any] | None = None, **facts: Any) -> None:
        """Writes the record with new facts.

        Args:
            session: Facts of this process.
            facts: JSON values of the run.

        Raises:
            OutputError: It cannot be written.
        """
        self._facts |= facts
        self._session |= session or {}
        if self._path is None:
            return
        seconds = {stage: round(value, 3) for stage, value in self._watch.seconds.items()}
        now = {**self._session, "seconds": seconds, "peak_memory_bytes": _peak_memory()}
        record = {"format": _FORMAT, **self._facts, "sessions": [*self._earlier, now]}
        write_bytes(self._path, json.dumps(finite(record), indent=1).encode() + b"\n", overwrite=True)


def _sessions_of(path: Path) -> list[Any]:
    """The sessions of an existing record; none where it cannot be read. Those that still ran were killed."""
    try:
        found = json.loads(read_bounded(path, _MAX_RECORD, follow=False))["sessions"]
        sessions = [dict(session) for session in found[-_MAX_SESSIONS:]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return []
    return [{**session, "state": "killed"} if session.get("state") == "running" else session for session in sessions]


def _machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def _peak_memory() -> dict[str, int]:
    """The most memory that this process had, where the system tells: of the machine, and of a GPU."""
    found = {}
    if sys.platform != "win32":
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["cpu"] = used * (1 if sys.platform == "darwin" else 1024)
    torch = sys.modules.get("torch")  # a record without a loaded model needs none
    if torch is not None and torch.cuda.is_initialized():
        found["gpu"] = int(torch.cuda.max_memory_allocated())
    return found
