"""Files and directories that appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from nestpatch.errors import OutputError

MAX_NAME = 200
"""Bytes of a file name: 255 less what temporary names and the ledger's name add."""


def check_output(path: Path) -> None:
    """Raises OutputError, before any work, when a place is taken or cannot be written."""
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"the name {path.name[:40]}... is too long for a file system", advice="Choose a shorter one with -o.")
    _refuse_taken(path, overwrite=False)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {path.absolute().parent}")


def _refuse_taken(path: Path, overwrite: bool) -> None:
    if not path.name or "\0" in path.name:
        raise OutputError(f"{path} is no name for a file")
    # lexists: a dangling link takes the place too.
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already")
    if overwrite and os.path.exists(path) and not path.is_file():  # noqa: PTH110 - answers no where Path.exists raises
        raise OutputError(f"{path} is no file, and is not replaced")


def sync_folder(folder: Path) -> None:
    """Makes a rename in this folder durable, where the system can (Windows cannot open folders)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes a new folder durable with all that is in it, before it gets its name."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            with open(entry, "rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def temporary(path: Path) -> Path:
    """A new name beside a place, for what is written there until it is complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def new_place(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling path to create (a file or a directory), then renames it to `path`.

    When the block raises, the sibling is removed and `path` is untouched.
    Raises OutputError when the place is taken or cannot be written.
    """
    _refuse_taken(path, overwrite)
    sibling = temporary(path)
    try:
        yield sibling
        if not overwrite:
            _refuse_taken(path, overwrite)
        os.replace(sibling, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(sibling)
        # A directory takes no place that another process has taken since: that is what the error was.
        _refuse_taken(path, overwrite)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        _remove(sibling)
        raise


def _remove(path: Path) -> None:
    # A name that was too long to be made is too long to be looked at.
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            import shutil  # which loads compressors: 6 ms that few writes need

            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sweep_writes(path: Path) -> None:
    """Removes what killed processes left of `write_bytes` to a place. Call it under the lock that all who write there hold."""
    with suppress(OSError):
        for file in path.parent.glob(f".{escape(path.name)}.????????.tmp"):
            if not file.is_dir() or file.is_symlink():
                file.unlink(missing_ok=True)


def write_bytes(
    path: Path, data: bytes, *, overwrite: bool = False, mode: int = 0o666, owner: tuple[int, int] | None = None
) -> None:
    """Writes a small file whole or not at all.

    `mode`: its permissions, less the umask, from the first byte on; `owner`: (user, group) to give it to, for root alone.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_EXCL, mode)

    with new_place(path, overwrite=overwrite) as sibling, open(sibling, "wb", opener=opener) as file:
        if owner is not None:
            os.fchown(file.fileno(), *owner)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
