"""The files that say whom to trust: where they are, and how they are read and changed safely.

A file that exists and cannot be relied on is an error, never "no policy".
"""

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
from nestpatch.signing.envelopes import MAX_BYTES

_HOME = "NESTPATCH_HOME"


def _system_file() -> Path:
    if sys.platform != "win32":
        return Path("/etc/nestpatch/trust.json")
    import ctypes

    # From the system, not from %PROGRAMDATA%: a user can set that.
    buffer = ctypes.create_unicode_buffer(260)
    failed = ctypes.windll.shell32.SHGetFolderPathW(None, 0x23, None, 0, buffer)  # CSIDL_COMMON_APPDATA
    return Path(r"C:\ProgramData" if failed else buffer.value) / "nestpatch" / "trust.json"


SYSTEM_FILE = _system_file()
"""The administrator's policy. No variable and no option names another file."""
SYSTEM_OWNER = 0
"""The only user id that may own it."""


def trust_file() -> Path:
    """Path of the user's own policy: $NESTPATCH_HOME/trust.json, or in this system's folder for configuration.

    Returns:
        An absolute path; the file need not exist.

    Raises:
        TrustError: This user has no home folder.
    """
    if home := os.environ.get(_HOME):
        return _absolute(home) / "trust.json"
    variable, rest = ("APPDATA", ()) if sys.platform == "win32" else ("XDG_CONFIG_HOME", (".config",))
    if folder := os.environ.get(variable):
        return _absolute(folder) / "nestpatch" / "trust.json"
    try:
        return Path.home().joinpath(*rest, "nestpatch", "trust.json")
    except RuntimeError as error:
        advice = f"Set {_HOME} to the folder with your trust.json."
        raise TrustError(f"this user has no home folder, so no list of trusted keys: {error}", advice=advice) from error


@cache
def _absolute(folder: str) -> Path:
    """Resolves a relative folder once: changing the directory later does not change whom this process trusts."""
    return Path(os.path.abspath(folder))


def require_home() -> None:
    """Checks that NESTPATCH_HOME, if set, is a folder: a mistyped path must not look like a user who trusts no key.

    Raises:
        TrustError: The folder does not exist.
    """
    if os.environ.get(_HOME) and not trust_file().parent.is_dir():
        raise TrustError(
            f"{_HOME} names {trust_file().parent}, which is not a folder: whom you trust cannot be read",
            advice=f"Create the folder, or unset {_HOME}. `nestpatch trust add` creates it too.",
        )


def read_policy_file(file: Path, *, system: bool = False) -> bytes | None:
    """Reads a policy file.

    Args:
        file: Its path.
        system: The file and its folder must belong to the administrator and be writable by no one else.

    Returns:
        The content; None when no file has that name.

    Raises:
        TrustError: It is a broken link, a directory, a pipe, or unreadable; with `system`, another user could change it.
    """
    try:
        with open_regular(file) as opened:
            if system:
                _require_owned(os.fstat(opened.fileno()), file)
            data = read_open(opened, MAX_BYTES, file)
    except FileNotFoundError:
        # The file may be missing only because a link on the way to it is broken.
        there = next((path for path in (file, *file.parents) if os.path.lexists(path)), None)
        if there is None or os.path.exists(there):  # noqa: PTH110 - Path.exists raises for links in circles
            return None
        raise TrustError(
            f"cannot read {file}: {there} is a broken link",
            advice="Repair the link. Remove it only if no key is to be trusted and no signature is to be needed.",
        ) from None
    except OSError as error:
        advice = "Check what is at that path, and its permissions."
        raise TrustError(f"cannot read {file}: {error.strerror or error}", advice=advice) from error
    if system:
        for folder in {file.parent, Path(os.path.realpath(file)).parent}:
            _require_owned(os.stat(folder), folder)  # noqa: PTH116 - as for files
    return data


def _require_owned(state: os.stat_result, path: Path) -> None:
    """Windows protects this folder by itself, and has no such ids."""
    if os.name == "nt":
        return
    if state.st_uid != SYSTEM_OWNER or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TrustError(
            f"{path} is not the administrator's alone: expected user id {SYSTEM_OWNER} and no write permission for others, "
            f"found user id {state.st_uid}, mode {stat.S_IMODE(state.st_mode):04o}",
            advice=f"As the administrator: chown root {path} && chmod go-w {path}",
        )


@contextmanager
def changing(file: Path, *, create: bool = False) -> Iterator[None]:
    """Locks one of the user's files against other processes. Read what is to be changed inside the block.

    Args:
        file: The file to change.
        create: Creates a missing NESTPATCH_HOME.

    Yields:
        Nothing; the lock is held inside the block.

    Raises:
        TrustError: The file's folder cannot be created or locked.
    """
    if not create:
        require_home()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        advice = f"Set {_HOME} to a folder of your own."
        raise TrustError(f"cannot make {file.parent}: {error.strerror or error}", advice=advice) from error
    with exclusive(file.with_suffix(".lock"), TrustError):
        sweep_writes(file)
        yield
