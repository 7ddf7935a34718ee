"""Temporary files of copies and exports. Locked while their process lives, so the next can remove what a killed one left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from nestpatch.files.atomic import new_place

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment,unused-ignore]

WHOLE, PATCHED, CONVERTED = ".whole", ".patched", ".converted"
"""Endings of second temporary files: the model before quantization, a patched copy of it, and what another converter wrote."""


@contextmanager
def new_output(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """`new_place` for what takes long to write: removes what killed processes left of it, and marks its own as in use.

    The mark is there until the sibling has its name: no other process removes it before. Raises OutputError.
    """
    sweep(target)
    with ExitStack() as mark, new_place(target) as sibling:
        yield mark.enter_context(claimed(sibling, directory=directory))


@contextmanager
def claimed(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Makes a file or a directory, or takes one that is there, and marks it as in use until the end of the block."""
    if fcntl is None:
        path.mkdir(exist_ok=True) if directory else path.touch()
        yield path
        return
    handle = _claim(path, directory)
    try:
        yield path
    finally:
        os.close(handle)


def _claim(path: Path, directory: bool) -> int:
    while True:
        if directory:
            path.mkdir(exist_ok=True)
        try:
            handle = os.open(path, os.O_RDONLY if directory or path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            if path.parent.is_dir():
                continue  # swept by another process before it was marked
            raise
        _lock(handle, wait=True)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)  # the same


@contextmanager
def scratch(path: Path, ending: str) -> Iterator[Path]:
    """A second temporary file or directory beside one, gone afterwards whatever happens."""
    second = path.with_name(path.name + ending)
    try:
        yield second
    finally:
        _remove(second)


def sweep(target: Path, remove: Callable[[Path], None] | None = None) -> None:
    """Removes the temporary files of earlier processes to this place that are gone. `remove`: how; as a whole."""
    for ending in ("", WHOLE, PATCHED, CONVERTED):
        for path in target.parent.glob(f".{escape(target.name)}.????????.tmp{ending}"):
            # What another program writes has no mark of its own, but that of the file that is made of it.
            marked = path.with_name(path.name.removesuffix(CONVERTED))
            if not path.is_symlink() and (not marked.exists() or is_free(marked)):
                _remove_free(path, remove or _remove)


def _remove_free(path: Path, remove: Callable[[Path], None]) -> None:
    with suppress(OSError), _opened(path) as handle:
        if _lock(handle):
            remove(path)


def is_free(path: Path) -> bool:
    """Whether no living process has marked a file or directory as in use."""
    with suppress(OSError), _opened(path) as handle:
        return _lock(handle)
    return False


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Whether the lock could be taken. Where the system has none, nothing is ever swept."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
