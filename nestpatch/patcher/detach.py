"""Files of the model's own in the place of links, which other models share."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from nestpatch.errors import BusyError
from nestpatch.formats.atomic import new_place
from nestpatch.formats.copying import copy_file
from nestpatch.formats.interface import Checkpoint


def detach(checkpoint: Checkpoint) -> Checkpoint:
    """Copies each weight file that is a link or has other names; the copy takes the link's place at once.

    It keeps mode, owner, times and extended attributes, as far as this user may set them.

    Raises BusyError when a file was changed by its other name while it was copied; it is then as it was.
    """
    for file in checkpoint.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            with new_place(file, overwrite=True) as sibling:
                before = _state(file)
                copy_file(file, sibling)
                if _state(file) != before:
                    raise BusyError(f"{file.resolve()} was changed while it was copied")
                _copy_status(file, sibling)
                with open(sibling, "rb") as handle:
                    os.fsync(handle.fileno())
    return checkpoint.reopen(checkpoint.path)


def _state(file: Path) -> tuple[int, int, int]:
    """Changes when something is written to the file."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _copy_status(source: Path, target: Path) -> None:
    status = source.stat()
    if hasattr(os, "chown"):
        with suppress(PermissionError):
            os.chown(target, status.st_uid, status.st_gid)
    shutil.copystat(source, target)
    # The one thing that changes: the model's own file has to be writable for its owner.
    target.chmod(status.st_mode & 0o7777 | 0o200)
