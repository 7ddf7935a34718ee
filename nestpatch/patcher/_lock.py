"""The lock of a model: one process changes it at a time, and no process changes it while another copies it.

Public: `locked` for writers, `kept_from_writers` for readers, `tidy`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nestpatch.errors import BusyError, InPlaceError, StateError
from nestpatch.files.locks import lock, unlock
from nestpatch.patcher.state_dir import StateDir

_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags by which opening a lock follows no link, waits for no pipe, and is not inherited."""


@contextmanager
def locked(state_dir: StateDir) -> Iterator[None]:
    """Holds the writer lock of a model. The system frees it when the process dies.

    Args:
        state_dir: The state of the model.

    Raises:
        BusyError: Another process holds the lock.
        StateError: Something else is in the place of the lock.
        InPlaceError: The lock file cannot be written.
    """
    handle = _take_lock(state_dir)
    try:
        yield
    finally:
        unlock(handle)
        os.close(handle)


@contextmanager
def kept_from_writers(state_dir: StateDir) -> Iterator[None]:
    """Keeps writers out while a model is read. Writes nothing.

    A model that was never patched has no lock to hold, and other users cannot open its lock: then nothing is held.

    Args:
        state_dir: The state of the model.

    Raises:
        BusyError: Another process is writing the model.
        StateError: Something else is in the place of the lock.
    """
    state_dir.check_folder()
    handle = None
    try:
        handle = _require_file(os.open(state_dir.lock, os.O_RDONLY | _SAFELY), state_dir)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise _odd_lock(state_dir, error) from error
    if handle is None:
        yield
        return
    try:
        try:
            free = lock(handle, shared=True, wait=False)
        except OSError:
            free = True  # a file system without locks: no writer can hold one there
        if not free:
            raise _busy(state_dir)
        yield
    finally:
        unlock(handle)
        os.close(handle)


def _take_lock(state_dir: StateDir) -> int:
    while True:
        state_dir.check_folder()
        try:
            with suppress(FileExistsError):
                state_dir.folder.mkdir()
                if state_dir.owner is not None:
                    os.chown(state_dir.folder, *state_dir.owner, follow_symlinks=False)
            handle = os.open(state_dir.lock, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
        except FileNotFoundError:
            if state_dir.folder.parent.is_dir():
                continue  # another process has just removed the folder
            raise InPlaceError(f"the folder of the model does not exist any more: {state_dir.folder.parent}") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _odd_lock(state_dir, error) from error
            raise InPlaceError(f"cannot write beside the model, in {state_dir.folder}: {error.strerror}") from error
        _own_lock(_require_file(handle, state_dir), state_dir)
        try:
            free = lock(handle, wait=False)
        except OSError as error:
            os.close(handle)
            raise InPlaceError(
                f"the file system of {state_dir.folder} offers no locks: {error.strerror}",
                advice="Copy the model to a local disk, patch it there, and copy it back.",
            ) from error
        if not free:
            os.close(handle)
            raise _busy(state_dir)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(state_dir.lock)):
                return handle
        os.close(handle)  # another process has removed this file, and a lock on a removed file excludes no process


def _require_file(handle: int, state_dir: StateDir) -> int:
    found = os.fstat(handle)
    # With two links it is another file too, whose owner and mode would change. With none it has just been removed.
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return handle
    os.close(handle)
    odd = "it is not a file" if not stat.S_ISREG(found.st_mode) else "it has another name elsewhere"
    raise _odd_lock(state_dir, OSError(errno.EINVAL, odd))


def _own_lock(handle: int, state_dir: StateDir) -> None:
    """Makes the lock private to the owner of the model's folder: every user who can open it can keep all writers out."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # another user's lock, which only the owner of the folder can repair
        found = os.fstat(handle)
        if found.st_mode & 0o077:
            os.fchmod(handle, 0o600)
        if state_dir.owner is not None and (found.st_uid, found.st_gid) != state_dir.owner:
            os.fchown(handle, *state_dir.owner)


def _busy(state_dir: StateDir) -> BusyError:
    return BusyError(f"another nestpatch is writing or copying the model of {state_dir.ledger}")


def _odd_lock(state_dir: StateDir, error: OSError) -> StateError:
    return StateError(
        f"{state_dir.lock} is not a lock file of nestpatch: {error.strerror}",
        advice="Remove it, if you did not put it there, and run the command again.",
    )


def tidy(state_dir: StateDir) -> None:
    """Removes the state folder of a model that was not changed. The lock must be held; it is removed last.

    A folder that holds anything else, such as undo records, is left: without a ledger it is not known whether they are needed.

    Args:
        state_dir: The state of the model.
    """
    with suppress(OSError):
        if any(file.name != state_dir.lock.name and not file.name.endswith(".tmp") for file in state_dir.folder.iterdir()):
            return
        for file in state_dir.folder.iterdir():
            if file != state_dir.lock:
                file.unlink()
        state_dir.lock.unlink()
        state_dir.folder.rmdir()
