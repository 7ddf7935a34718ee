"""Files and directories that appear whole or not at all: written under a temporary name beside their place, synced, renamed.

`check_output` is the one check of an output path, to be made before any work; `new_place` and `write_bytes` write.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from nestpatch.errors import OutputError

MAX_NAME = 200
"""Bytes of a file name: 255 less what temporary names and the ledger's name add."""


def check_output(path: Path) -> None:
    """Checks, before any work, that a new file or directory can be created at a path.

    Args:
        path: The file or directory that will be written.

    Raises:
        OutputError: The path exists already, its name is too long or impossible, or its parent directory does not exist.
    """
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise OutputError(f"the name {path.name[:40]}... is too long for a file system", advice="Choose a shorter one with -o.")
    _refuse_taken(path, overwrite=False)
    if not path.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {path.absolute().parent}")


def _refuse_taken(path: Path, overwrite: bool) -> None:
    if not path.name or "\0" in path.name:
        raise OutputError(f"{path} is not a file name")
    # lexists: a dangling link occupies the path too.
    if os.path.lexists(path) and not overwrite:
        raise OutputError(f"{path} exists already")
    if overwrite and os.path.exists(path) and not path.is_file():  # noqa: PTH110 - False where Path.exists raises
        raise OutputError(f"{path} is not a file, and is not replaced")


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be opened or synced.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames in a directory durable, where the system can (Windows cannot open directories).

    Args:
        folder: The directory.

    Raises:
        OSError: It cannot be opened or synced.
    """
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Makes a new directory and everything in it durable, before it gets its final name.

    Args:
        folder: The directory.

    Raises:
        OSError: A file or directory cannot be opened or synced.
    """
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            sync_tree(entry)
        elif entry.is_file():
            sync_file(entry)
    sync_folder(folder)


def temporary(path: Path) -> Path:
    """A new temporary name in the directory of a path.

    Args:
        path: The final path.

    Returns:
        The path to write to until the content is complete.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def new_place(path: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yields a temporary path to create a file or directory at, and renames it to `path` afterwards.

    When the block raises, what was written is removed and `path` is untouched.

    Args:
        path: The final path.
        overwrite: Whether a file there is replaced.
        sync: Whether the rename is on the disk in the end; after a power cut, the earlier file may else be there.

    Yields:
        The temporary path, in the same directory.

    Raises:
        OutputError: The path exists already, or cannot be written.
    """
    _refuse_taken(path, overwrite)
    sibling = temporary(path)
    try:
        yield sibling
        if not overwrite:
            _refuse_taken(path, overwrite)
        os.replace(sibling, path)
        if sync:
            sync_folder(path.parent)
    except OSError as error:
        remove(sibling)
        # A directory cannot replace what another process has put there since: then that is the reason.
        _refuse_taken(path, overwrite)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:  # Ctrl-C included: nothing half-written stays
        remove(sibling)
        raise


def remove(path: Path) -> None:
    """Removes a file, a link, or a directory with its content; ignores what cannot be removed.

    Args:
        path: What to remove; it need not exist.
    """
    # OSError: a name too long to be created is too long to be looked up.
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            import shutil  # which loads compressors: 6 ms that few writes need

            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def sweep_writes(path: Path) -> None:
    """Removes what killed processes left of `write_bytes` to a path. The caller holds the lock that all its writers hold.

    Args:
        path: The final path of those writes.
    """
    with suppress(OSError):
        for file in path.parent.glob(f".{escape(path.name)}.????????.tmp"):
            if not file.is_dir() or file.is_symlink():
                file.unlink(missing_ok=True)


def write_bytes(
    path: Path,
    data: bytes | Iterable[bytes | memoryview],
    *,
    overwrite: bool = False,
    mode: int = 0o666,
    owner: tuple[int, int] | None = None,
    sync: bool = True,
) -> None:
    """Writes a small file whole or not at all.

    Args:
        path: The file.
        data: Its content, or the parts of it in order.
        overwrite: Whether a file there is replaced.
        mode: Its permissions, less the umask, from the first byte on.
        owner: (user, group) to give it to; only root can.
        sync: As in `new_place`; the content is always on the disk before it gets its name.

    Raises:
        OutputError: The path exists already, or cannot be written.
    """
    with (
        new_place(path, overwrite=overwrite, sync=sync) as sibling,
        open(sibling, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, mode)) as file,
    ):
        if owner is not None:
            os.fchown(file.fileno(), *owner)
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())
