"""Opening a run directory: it is created or recognised, locked, and what a killed process left in it is removed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestpatch.errors import BusyError, OutputError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.atomic import remove
from nestpatch.files.locks import lock
from nestpatch.nest_train._run_dir import RECORD, RunDir

_LOCK = "lock"
_TEMPORARY = re.compile(r"\.[a-z][a-z.-]*\.[0-9a-f]{8}\.tmp", re.ASCII)


@contextmanager
def open_run(folder: str | Path | None, on_event: OnEvent = ignore) -> Iterator[RunDir]:
    """Opens or creates a run directory, and keeps other trainings out of it.

    Args:
        folder: The directory; None keeps nothing.
        on_event: Called with notes on what was reused.

    Yields:
        The run directory.

    Raises:
        OutputError: It cannot be created or locked, or it is a folder of something else.
        BusyError: Another training uses it.
    """
    if folder is None:
        yield RunDir(None, on_event)
        return
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names - {_LOCK} and RECORD not in names:
            raise OutputError(
                f"{path} is not empty, and is not a run directory: it has no {RECORD}",
                advice="Give a new folder, or the one of an earlier training.",
            )
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = os.open(path / _LOCK, flags | getattr(os, "O_CLOEXEC", 0), 0o666)
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write the run directory {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        if not _locked(handle, path):
            raise BusyError(
                f"another training uses the run directory {path}", advice="Wait until it has ended, or give another folder."
            )
        for name in names:
            if _TEMPORARY.fullmatch(name):  # left by a killed process
                remove(path / name)
        run_dir = RunDir(path, on_event)
        with run_dir.record.session():
            yield run_dir
    finally:
        os.close(handle)


def _locked(handle: int, path: Path) -> bool:
    try:
        return lock(handle, wait=False)
    except OSError as error:
        raise OutputError(
            f"cannot lock the run directory {path}: {error.strerror or error}",
            advice="Give a folder on a file system with locks, such as a local disk.",
        ) from error
