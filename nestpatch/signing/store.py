"""Reading the files that say whom to trust. A file that is there and cannot be relied on is an error, never "no policy"."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from nestpatch.errors import TrustError
from nestpatch.files.atomic import sweep_writes
from nestpatch.files.locks import exclusive
from nestpatch.files.reading import open_regular, read_open
from nestpatch.signing.dsse import MAX_BYTES

HOME = "NESTPATCH_HOME"
WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def _system_file() -> Path:
    if sys.platform != "win32":
        return Path("/etc/nestpatch/trust.json")
    import ctypes

    # From the system, not from %PROGRAMDATA%: a user can set that.
    buffer = ctypes.create_unicode_buffer(260)
    failed = ctypes.windll.shell32.SHGetFolderPathW(None, 0x23, None, 0, buffer)  # CSIDL_COMMON_APPDATA
    return Path(r"C:\ProgramData" if failed else buffer.value) / "nestpatch" / "trust.json"


SYSTEM_FILE = _system_file()
"""The administrator's policy. No variable and no option names another one."""
SYSTEM_OWNER = 0
"""The only user id that may own it."""


def trust_file() -> Path:
    """The user's own file: $NESTPATCH_HOME/trust.json, or where this system keeps configuration. Raises TrustError."""
    if home := os.environ.get(HOME):
        return _absolute(home) / "trust.json"
    variable, rest = ("APPDATA", ()) if sys.platform == "win32" else ("XDG_CONFIG_HOME", (".config",))
    if folder := os.environ.get(variable):
        return _absolute(folder) / "nestpatch" / "trust.json"
    try:
        return Path.home().joinpath(*rest, "nestpatch", "trust.json")
    except RuntimeError as error:
        advice = f"Set {HOME} to the folder with your trust.json."
        raise TrustError(f"this user has no home folder, so no list of trusted keys: {error}", advice=advice) from error


@cache
def _absolute(folder: str) -> Path:
    """A relative folder is where it was at the first look: changing the directory does not change whom this process trusts."""
    return Path(os.path.abspath(folder))


def has_home() -> bool:
    """Whether this user has a folder for files of their own, made or not."""
    try:
        trust_file()
    except TrustError:
        return False
    return True


def require_home() -> None:
    """Raises TrustError when NESTPATCH_HOME names no folder: a mistyped path is not a user who trusts nobody."""
    if os.environ.get(HOME) and not trust_file().parent.is_dir():
        raise TrustError(
            f"{HOME} names {trust_file().parent}, which is not a folder: whom you trust cannot be read",
            advice=f"Create the folder, or unset {HOME}. `nestpatch trust add` creates it too.",
        )


def read_user(*, create: bool = False) -> bytes | None:
    """The content of the user's own file; None where there is none. Raises TrustError.

    `create`: the folder is about to be created, so it may be missing.
    """
    if not create:
        require_home()
    return read_file(trust_file())


def read_system() -> bytes | None:
    """The content of the administrator's file; None where there is none.

    Raises TrustError when another user than the administrator owns or can write it, or its folder.
    """
    data = read_file(SYSTEM_FILE, owned=True)
    if data is None:
        return None
    for folder in {SYSTEM_FILE.parent, Path(os.path.realpath(SYSTEM_FILE)).parent}:
        _require_owned(os.stat(folder), folder)  # noqa: PTH116 - as for files
    return data


def read_file(file: Path, *, owned: bool = False) -> bytes | None:
    """The content of a regular file; None where nothing has that name. `owned`: it has to be the administrator's.

    Raises TrustError: a broken link, a directory, a pipe, a file that cannot be read.
    """
    try:
        with open_regular(file) as opened:
            if owned:
                _require_owned(os.fstat(opened.fileno()), file)
            return read_open(opened, MAX_BYTES, file)
    except FileNotFoundError:
        _require_absent(file)
        return None
    except OSError as error:
        advice = "Check what is at that path, and its permissions."
        raise TrustError(f"cannot read {file}: {error.strerror or error}", advice=advice) from error


def _require_absent(file: Path) -> None:
    """Raises TrustError when the file is missing only because a link on the way to it is broken."""
    there = next((place for place in (file, *file.parents) if os.path.lexists(place)), None)
    if there is not None and not os.path.exists(there):  # noqa: PTH110 - Path.exists raises for links in circles
        raise TrustError(
            f"cannot read {file}: {there} is a link to nowhere",
            advice="Repair the link. Remove it only if nobody is to be trusted and no signature is to be needed.",
        )


def _require_owned(state: os.stat_result, place: Path) -> None:
    """Windows keeps users out of this folder by itself, and has no such ids."""
    if os.name == "nt":
        return
    found = f"user id {state.st_uid}, mode {stat.S_IMODE(state.st_mode):04o}"
    if state.st_uid != SYSTEM_OWNER or state.st_mode & WRITABLE:
        raise TrustError(
            f"{place} is not the administrator's alone: expected user id {SYSTEM_OWNER} and no write permission for others, "
            f"found {found}",
            advice=f"As the administrator: chown root {place} && chmod go-w {place}",
        )


@contextmanager
def changing(file: Path, *, create: bool = False) -> Iterator[None]:
    """Keeps other processes from changing one of the user's files. What is changed has to be read inside the block.

    `create`: a missing NESTPATCH_HOME is made. Raises TrustError when the file's folder cannot be made, or cannot be locked.
    """
    if not create:
        require_home()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        advice = f"Set {HOME} to a folder of your own."
        raise TrustError(f"cannot make {file.parent}: {error.strerror or error}", advice=advice) from error
    with exclusive(file.with_suffix(".lock"), TrustError):
        sweep_writes(file)
        yield
