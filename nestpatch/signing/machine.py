"""Seals of this machine: they distinguish what nestpatch itself wrote beside a model from what came along with the model.

A seal is an HMAC-SHA256 under a key in this user's configuration folder, never in a model's folder. It covers the kind of
record, the folder that the record is for, and the record's SHA-256. A record that was copied to another model, or written by
another machine, has no valid seal here.
"""

from __future__ import annotations

import errno
import hmac
import os
import secrets
from pathlib import Path

from nestpatch.errors import NestpatchError, TrustError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.files.reading import open_regular
from nestpatch.signing._store import require_home, trust_file

KEY_FILE = "machine.key"
KEY_BYTES = 32


def user_folder(*, create: bool = False) -> Path:
    """The folder for files of this user that belong to no model: keys, trust, and what was seen of channels.

    Args:
        create: Creates the folder where it does not exist, unless the user has named it: the path may be mistyped.

    Returns:
        An absolute path; without `create` the folder need not exist.

    Raises:
        TrustError: This user has no home folder; or `create` is set and NESTPATCH_HOME names a folder that does not exist.
    """
    folder = trust_file().parent
    if create:
        require_home()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def seal(kind: str, folder: Path, digest: bytes) -> str:
    """Seals a record. Creates the machine's key on first use.

    Args:
        kind: Kind of record, ASCII.
        folder: Folder that holds the model's state.
        digest: SHA-256 of the record.

    Returns:
        The seal in hex; empty when this user has no folder for a key, so the record can be recognized by its content only.

    Raises:
        TrustError: The key file is broken, or readable by others.
    """
    key = _key(create=True)
    return _seal(key, kind, folder, digest) if key else ""


def is_ours(kind: str, folder: Path, digest: bytes, found: str) -> bool:
    """Checks a seal. Writes nothing.

    Args:
        kind: Kind of record, as given to `seal`.
        folder: Folder that holds the model's state.
        digest: SHA-256 of the record.
        found: The seal that was stored with the record; may be empty.

    Returns:
        Whether this machine made the seal, for this kind of record and this folder.

    Raises:
        TrustError: The key file is broken, or readable by others.
    """
    key = _key(create=False) if found else None
    return key is not None and hmac.compare_digest(_seal(key, kind, folder, digest), found)


def _seal(key: bytes, kind: str, folder: Path, digest: bytes) -> str:
    path = os.fsencode(os.path.join(os.path.realpath(folder.parent), folder.name))  # noqa: PTH118 - a path as bytes
    message = b"\0".join((b"nestpatch", kind.encode("ascii"), digest.hex().encode("ascii"), path))
    return hmac.digest(key, message, "sha256").hex()


def _key(*, create: bool) -> bytes | None:
    """The machine's key; None where there is none and none can be made."""
    try:
        require_home()
        file = user_folder() / KEY_FILE
    except TrustError:  # this user has no home folder, or names one that does not exist
        return None
    try:
        found = _read(file)
        if found is None and create:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with exclusive(file.with_suffix(".lock")):
                found = _read(file)
                if found is None:
                    found = secrets.token_bytes(KEY_BYTES)
                    sweep_writes(file)
                    write_bytes(file, (found.hex() + "\n").encode("ascii"), mode=0o600)
    except TrustError:
        raise
    except (NestpatchError, OSError):  # the folder cannot be read, or not be written: a read-only home, for example
        return None
    return found


def _read(file: Path) -> bytes | None:
    """The key; None where there is none. Raises TrustError for a broken key, or one that others can read."""
    try:
        with open_regular(file, follow=False) as opened:
            state, text = os.fstat(opened.fileno()), opened.read(2 * KEY_BYTES + 2)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EISDIR, errno.ELOOP):
            raise  # another user's file, or an unreadable folder: no key for this user
        raise TrustError(f"{file} is not a key of nestpatch: {error.strerror or error}", advice=f"Remove {file}.") from error
    advice = (
        f"Remove {file}; a new one is made. Changes that were interrupted before then end with `nestpatch recover --foreign`."
    )
    if os.name != "nt" and (state.st_mode & 0o077 or state.st_uid != os.geteuid()):
        raise TrustError(f"{file} must belong to this user and be readable by no one else", advice=advice)
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise TrustError(f"{file} is not a key of nestpatch", advice=advice)
    return key
