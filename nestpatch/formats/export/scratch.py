"""Temporary files of exports. Locked while their process lives, so the next export can clear away what a killed one left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

WHOLE, PATCHED, CONVERTED = ".whole", ".patched", ".converted"
"""Endings of second temporary files: the model before quantization, a patched copy of it, and what another converter wrote."""


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """Makes a file, or takes a directory that is there, and marks it as in use until the end of the block."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(handle)
        yield path
    finally:
        os.close(handle)


@contextmanager
def scratch(path: Path, ending: str) -> Iterator[Path]:
    """A second temporary file or directory beside one, gone afterwards whatever happens."""
    second = path.with_name(path.name + ending)
    try:
        yield second
    finally:
        _remove(second)


def sweep(target: Path) -> None:
    """Removes the temporary files of earlier exports to this place whose process is gone."""
    for ending in ("", WHOLE, PATCHED, CONVERTED):
        for path in target.parent.glob(f".{escape(target.name)}.????????.tmp{ending}"):
            if not path.is_symlink() and is_free(path):
                _remove(path)


def is_free(path: Path) -> bool:
    """Whether no living process has marked a file or directory as in use."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            return _lock(handle)
        finally:
            os.close(handle)
    return False


def _lock(handle: int) -> bool:
    """Whether the lock was free. Where the system has none, nothing is ever swept."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
