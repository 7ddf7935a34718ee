"""Where the user's own files are: the trusted keys, and what is remembered of channels."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestpatch.errors import TrustError
from nestpatch.files import alone

_SET_IT = "Set NESTPATCH_HOME to a folder of your own."


def config_folder() -> Path:
    """The user's folder: $NESTPATCH_HOME, or where this system keeps configuration.

    Raises TrustError where nothing says which folder that is: no HOME, and a user without an entry in the system's list.
    """
    if home := os.environ.get("NESTPATCH_HOME"):
        return Path(home)
    variable = "APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME"
    if folder := os.environ.get(variable):
        return Path(folder) / "nestpatch"
    try:
        home_folder = Path.home()
    except RuntimeError as error:
        raise TrustError(f"the folder of trusted keys is not known: {error}", advice=_SET_IT) from error
    return home_folder / "nestpatch" if sys.platform == "win32" else home_folder / ".config" / "nestpatch"


@contextmanager
def changing(file: Path) -> Iterator[None]:
    """Keeps other processes from changing one of these files. What is changed has to be read inside the block.

    Raises TrustError when its folder cannot be made, or cannot be locked.
    """
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TrustError(f"cannot make {file.parent}: {error.strerror or error}", advice=_SET_IT) from error
    with alone(file.with_suffix(".lock"), TrustError):
        yield
