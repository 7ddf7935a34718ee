"""Temporary files of copies and exports, which take minutes to write and may be killed.

Each is locked while its process lives, so that the next process can remove what a killed one left behind. On Windows, which
cannot lock directories, nothing is locked and nothing is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path

from nestpatch.files.atomic import new_place, remove
from nestpatch.files.locks import WINDOWS, lock

WHOLE, PATCHED, CONVERTED = ".whole", ".patched", ".converted"
"""Endings of second temporary files: the model before quantization, a patched copy of it, and another converter's output."""


@contextmanager
def new_output(target: Path, *, directory: bool = False) -> Iterator[Path]:
    """`new_place` for what takes long to write: sweeps the path first and claims the temporary file.

    Args:
        target: The final path.
        directory: Whether a directory is written.

    Yields:
        The temporary path; it exists and stays claimed until it has its final name.

    Raises:
        OutputError: The path exists already, or cannot be written.
    """
    sweep(target)
    with ExitStack() as claim, new_place(target) as sibling:
        yield claim.enter_context(claimed(sibling, directory=directory))


@contextmanager
def claimed(path: Path, *, directory: bool = False) -> Iterator[Path]:
    """Creates a file or directory, or takes an existing one, and marks it as in use for the duration of the block.

    Args:
        path: The file or directory.
        directory: Whether to create a directory.

    Yields:
        The path.

    Raises:
        OSError: It cannot be created or opened.
    """
    if WINDOWS:
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
                continue  # swept by another process before it was locked
            raise
        with suppress(OSError):  # a file system without locks: nothing is ever swept there
            lock(handle)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.lstat()):
                return handle
        os.close(handle)  # swept between opening and locking


@contextmanager
def scratch(path: Path, ending: str) -> Iterator[Path]:
    """Yields the path of a second temporary file or directory, which is removed after the block in any case.

    Args:
        path: The first temporary path, as `new_output` yields it.
        ending: WHOLE, PATCHED or CONVERTED.

    Yields:
        The second path; nothing is created there.
    """
    second = path.with_name(path.name + ending)
    try:
        yield second
    finally:
        remove(second)


def sweep(target: Path, remove: Callable[[Path], None] = remove) -> None:
    """Removes the temporary files that killed processes left of outputs to a path.

    Args:
        target: The final path of those outputs.
        remove: Removes one temporary file or directory.
    """
    for ending in ("", WHOLE, PATCHED, CONVERTED):
        for path in target.parent.glob(f".{escape(target.name)}.????????.tmp{ending}"):
            # Another program's output is not locked itself; the file that is made of it is.
            marked = path.with_name(path.name.removesuffix(CONVERTED))
            if not path.is_symlink() and (not marked.exists() or _when_free(marked, lambda _: None)):
                _when_free(path, remove)


def _when_free(path: Path, work: Callable[[Path], None]) -> bool:
    """Does something under the lock of a path; False where it was taken or cannot be locked, or the work failed."""
    if WINDOWS:
        return False
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        try:
            if lock(handle, wait=False):
                work(path)
                return True
        finally:
            os.close(handle)
    return False
