"""The files that say whom to trust: where they are, and how they are read and changed safely.

A policy file is one JSON object, `trust.json`: the user's own, by default in the user's configuration folder, and the
administrator's, which stays in force. None is stored beside a model: whoever hands over a model could then hand over the trust
as well. A policy file given to a command has the same format and replaces the user's own.

A file that exists and cannot be relied on is an error, never "no policy".
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from nestpatch.errors import TrustError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.files.reading import open_regular, read_open
from nestpatch.signing.envelopes import MAX_BYTES
from nestpatch.signing.trust import Policy, TrustedKey

_HOME = "NESTPATCH_HOME"


if sys.platform == "win32":
    import ctypes

    # From the system, not from %PROGRAMDATA%: a user can set that.
    _buffer = ctypes.create_unicode_buffer(260)
    _failed = ctypes.windll.shell32.SHGetFolderPathW(None, 0x23, None, 0, _buffer)  # CSIDL_COMMON_APPDATA
    SYSTEM_FILE = Path(r"C:\ProgramData" if _failed else _buffer.value) / "nestpatch" / "trust.json"
else:
    SYSTEM_FILE = Path("/etc/nestpatch/trust.json")
"""The administrator's policy. No variable and no option names another file."""
SYSTEM_OWNER = 0
"""The only user id that may own it."""


def user_folder(*, existing: bool = False) -> Path:
    """The folder for files of this user that belong to no model: keys, trust, and what was seen of channels.

    It is $NESTPATCH_HOME, or `nestpatch` in this system's folder for configuration.

    Args:
        existing: Requires NESTPATCH_HOME, if set, to be a folder: a mistyped path must not look like a user who trusts no key.

    Returns:
        An absolute path; the folder need not exist.

    Raises:
        TrustError: This user has no home folder, or with `existing` NESTPATCH_HOME is not a folder.
    """
    if home := os.environ.get(_HOME):
        named = _absolute(home)
        if existing and not named.is_dir():
            raise TrustError(
                f"{_HOME} names {named}, which is not a folder: whom you trust cannot be read",
                advice=f"Create the folder, or unset {_HOME}. `nestpatch trust add` creates it too.",
            )
        return named
    variable, rest = ("APPDATA", ()) if sys.platform == "win32" else ("XDG_CONFIG_HOME", (".config",))
    if folder := os.environ.get(variable):
        return _absolute(folder) / "nestpatch"
    try:
        return Path.home().joinpath(*rest, "nestpatch")
    except RuntimeError as error:
        advice = f"Set {_HOME} to the folder with your trust.json."
        raise TrustError(f"this user has no home folder, so no list of trusted keys: {error}", advice=advice) from error


@cache
def _absolute(folder: str) -> Path:
    """Resolves a relative folder once: changing the directory later does not change whom this process trusts."""
    return Path(os.path.abspath(folder))


def trust_file(*, existing: bool = False) -> Path:
    """Path of the user's own policy.

    Args:
        existing: As for `user_folder`.

    Returns:
        An absolute path; the file need not exist.

    Raises:
        TrustError: As for `user_folder`.
    """
    return user_folder(existing=existing) / "trust.json"


def _read_file(file: Path, *, system: bool = False) -> bytes | None:
    """The content of a policy file, None when there is none. `system`: rejects what others can change."""
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
def _changing(file: Path, *, create: bool = False) -> Iterator[None]:
    """Locks a file of the user's against other processes. Read what is to be changed inside the block."""
    user_folder(existing=not create)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        advice = f"Set {_HOME} to a folder of your own."
        raise TrustError(f"cannot make {file.parent}: {error.strerror or error}", advice=advice) from error
    with exclusive(file.with_suffix(".lock"), TrustError):
        sweep_writes(file)
        yield


def load_policy(path: Path | None = None, *, needs_home: bool = True) -> Policy:
    """Loads the policy that is in force: the administrator's, together with a file or the user's own.

    Args:
        path: A policy file that replaces the user's own; it must exist. None: the user's own, which may be missing.
        needs_home: Without a home folder a user can have no policy. True rejects such a user; False, for commands that only
            read packs, returns the administrator's policy.

    Returns:
        The combined policy; empty when nothing is configured.

    Raises:
        TrustError: A file is broken, unreadable, or writable by the wrong user, or there is no home folder.
    """
    if path is None:
        own = load_own(needs_home=needs_home)
    else:
        data = _read_file(path)
        if data is None:
            raise TrustError(f"there is no policy file {path}", advice="Check the path.")
        own = Policy.parse(data, str(path))
    return own.under(load_system(), str(SYSTEM_FILE))


def load_own(*, create: bool = False, needs_home: bool = True) -> Policy:
    """The user's own policy without the administrator's: what `trust add` changes.

    Args:
        create: The user's folder may be missing, because it is about to be created.
        needs_home: False returns an empty policy for a user without a home folder.

    Returns:
        The policy; empty when there is no file.

    Raises:
        TrustError: The file is broken or unreadable, or there is no home folder.
    """
    try:
        trust_file()
    except TrustError:
        if needs_home:
            raise
        return Policy()
    file = trust_file(existing=not create)
    data = _read_file(file)
    return Policy() if data is None else Policy.parse(data, str(file))


def load_system() -> Policy:
    """The administrator's policy alone.

    Returns:
        The policy; empty when there is no file.

    Raises:
        TrustError: The file is broken, names "~", or can be changed by another user.
    """
    data, source = _read_file(SYSTEM_FILE, system=True), str(SYSTEM_FILE)
    if data is None:
        return Policy()
    policy = Policy.parse(data, source)
    patterns = [*(rule.model for rule in policy.rules), *(model for key in policy.keys for model in key.models)]
    for pattern in patterns:
        if pattern.startswith("~"):
            raise TrustError(f"{source} names {pattern!r}: each user decides where a home folder is")
    return policy


def trust_key(trusted: TrustedKey) -> Path:
    """Adds a key to the user's own file, or changes its name or models there.

    Args:
        trusted: The key.

    Returns:
        The file.

    Raises:
        TrustError: The name is taken, or the file cannot be read or locked.
        OutputError: The file cannot be written.
    """
    with _changing(trust_file(), create=True):
        return save_policy(load_own(create=True).with_key(trusted))


def distrust_key(text: str) -> tuple[TrustedKey, Path]:
    """Removes a key from the user's own file.

    Args:
        text: The key's name, or at least 8 digits of its id.

    Returns:
        The removed key, and the file.

    Raises:
        TrustError: Not exactly one key matches, a rule needs it, or it is the administrator's.
        OutputError: The file cannot be written.
    """
    with _changing(trust_file()):
        before = load_own()
        if not before.matching(text) and load_system().matching(text):
            raise TrustError(
                f"{text!r} is a key of this machine's administrator, in {SYSTEM_FILE}",
                advice=f"Ask the administrator to remove it from {SYSTEM_FILE}. Your own policy file cannot remove it.",
            )
        after = before.without_key(text)
        file = save_policy(after)
    return next(trusted for trusted in before.keys if trusted not in after.keys), file


def save_policy(policy: Policy) -> Path:
    """Writes the user's own file.

    Args:
        policy: The new content.

    Returns:
        The file.

    Raises:
        OutputError: The file cannot be written.
    """
    file = trust_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps(policy.checked().content(), indent=1, ensure_ascii=False) + "\n"
    write_bytes(file, text.encode("utf-8"), overwrite=True, mode=0o600)
    return file
