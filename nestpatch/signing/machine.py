"""Seals of this machine, by which nestpatch knows what it wrote beside a model itself from what came along with the model.

A seal is an HMAC-SHA256 under a key that this user's configuration folder holds, never a model's folder. It covers what kind of
record it is, the folder that the record is for, and the record's SHA-256: a record that was copied to another model, or that
another machine wrote, has no valid seal here.
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
from nestpatch.signing.store import require_home, trust_file

KEY_FILE = "machine.key"
KEY_BYTES = 32


def seal(kind: str, folder: Path, digest: bytes) -> str:
    """The seal (hex) of a record for the model whose state is in `folder`; makes the key at its first use.

    Empty where this user has no folder to keep a key in: such a record is later known by its content alone.
    """
    key = _key(create=True)
    return _seal(key, kind, folder, digest) if key else ""


def is_ours(kind: str, folder: Path, digest: bytes, found: str) -> bool:
    """Whether a seal was made here, for this kind of record and this folder. Writes nothing."""
    key = _key(create=False) if found else None
    return key is not None and hmac.compare_digest(_seal(key, kind, folder, digest), found)


def _seal(key: bytes, kind: str, folder: Path, digest: bytes) -> str:
    place = os.fsencode(os.path.join(os.path.realpath(folder.parent), folder.name))  # noqa: PTH118 - a path as bytes
    message = b"\0".join((b"nestpatch", kind.encode("ascii"), digest.hex().encode("ascii"), place))
    return hmac.digest(key, message, "sha256").hex()


def _key(*, create: bool) -> bytes | None:
    try:
        require_home()
        file = trust_file().with_name(KEY_FILE)
    except TrustError:  # this user has no home, or names one that is not there
        return None
    try:
        found = _read(file)
    except OSError:  # it cannot be looked into
        return None
    if found is None and create:
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with exclusive(file.with_suffix(".lock")):
                found = _read(file) or _make(file)
        except (NestpatchError, OSError):  # nowhere to keep one: a read-only home, say
            return None
    return found


def _read(file: Path) -> bytes | None:
    """The key; None where there is none. Raises TrustError for a file that is no key, or that others can read."""
    try:
        with open_regular(file, follow=False) as opened:
            state, text = os.fstat(opened.fileno()), opened.read(2 * KEY_BYTES + 2)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EISDIR, errno.ELOOP):
            raise  # another user's, or in no folder: there is none for this one
        raise TrustError(f"{file} is no key of nestpatch: {error.strerror or error}", advice=f"Remove {file}.") from error
    advice = (
        f"Remove {file}; a new one is made. Changes that were interrupted before then end with `nestpatch recover --foreign`."
    )
    if os.name != "nt" and (state.st_mode & 0o077 or state.st_uid != os.geteuid()):
        raise TrustError(f"{file} must belong to this user and be readable by nobody else", advice=advice)
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise TrustError(f"{file} is no key of nestpatch", advice=advice)
    return key


def _make(file: Path) -> bytes:
    """Called under the lock alone: nobody else makes one now."""
    key = secrets.token_bytes(KEY_BYTES)
    sweep_writes(file)
    write_bytes(file, (key.hex() + "\n").encode("ascii"), mode=0o600)
    return key
