"""Where nestpatch keeps what it knows of a model: ledger, journal, lock, undo records, kept packs and their signatures.

One weight file has one state, whatever path names it. A directory with model.safetensors or an index of several files, and
such a model.safetensors named itself: `nestpatch.json` and `.nestpatch/` inside the directory. Any other weight file
`m.safetensors`, `m.gguf` or `m.onnx`, also as the only model of its directory: `m.safetensors.nestpatch.json` and
`.m.safetensors.nestpatch/` beside it.

All of it travels with the model, so nothing here is believed: names are checked before they become paths, and links are not
followed.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nestpatch.errors import BusyError, CheckpointFormatError, InPlaceError, StateError
from nestpatch.formats.onnx.folder import models
from nestpatch.formats.safetensors import INDEX, SINGLE, indexed_files, only_file

LEDGER = "nestpatch.json"
FOLDER = ".nestpatch"
TRANSACTION = re.compile(r"[0-9a-f]{16}", re.ASCII)
PACK_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
UNDO = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True)
class Place:
    """The files that belong to one model."""

    ledger: Path
    folder: Path

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    def undo(self, name: str) -> Path:
        """The undo record of an applied pack. Raises StateError for a name that nestpatch never gives."""
        if not UNDO.fullmatch(name):
            raise StateError(f"{name[:80]!r} is no name of an undo record")
        return self.folder / f"{name}.undo"

    def pack(self, pack_id: str) -> Path:
        """The kept copy of a pack: reverting needs its deltas. Raises StateError for what is no SHA-256."""
        if not PACK_ID.fullmatch(pack_id):
            raise StateError(f"{pack_id[:80]!r} is no id of a pack")
        return self.folder / f"{pack_id}.nest"

    @property
    def owner(self) -> tuple[int, int] | None:
        """(user, group) that root gives new files to, because the model's folder is theirs; None: they stay this user's."""
        if os.name == "nt" or os.geteuid() != 0:
            return None
        found = self.folder.parent.stat()
        return (found.st_uid, found.st_gid) if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()) else None

    def check_folder(self) -> None:
        """Raises StateError where the folder is a link or a file: what is reached through it belongs to something else."""
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(self.folder).st_mode):
                raise StateError(
                    f"{self.folder} is not a directory of its own: nestpatch follows no links there",
                    advice="Remove it, if you did not put it there. Nothing was read or written through it.",
                )


def place_of(model: str | Path) -> Place:
    """Where the state of a model is, whether or not it has any.

    Raises CheckpointFormatError for a file that is only one part of a model.
    """
    path = Path(os.path.abspath(model))
    if path.is_dir():
        return _of_directory(path)
    if path.is_symlink():
        # Another name of a model that has its state elsewhere.
        target = _of_file(Path(os.path.realpath(path)))
        if os.path.lexists(target.ledger) or os.path.lexists(target.folder):
            return target
    return _of_file(path)


def _of_directory(path: Path) -> Place:
    inside = Place(path / LEDGER, path / FOLDER)
    if (path / INDEX).is_file() or (path / SINGLE).is_file():
        return inside
    found = only_file(path) or next(iter(models(path)), None)
    return inside if found is None or len(models(path)) > 1 else _beside(found)


def _of_file(path: Path) -> Place:
    parts = indexed_files(path.parent)
    if path.name in parts and len(parts) > 1:
        raise CheckpointFormatError(
            f"{path} is one of the {len(parts)} files of the model in {path.parent}",
            advice=f"Give the directory: {path.parent}",
        )
    whole = path.name in parts or (path.name == SINGLE and not parts)
    return Place(path.parent / LEDGER, path.parent / FOLDER) if whole else _beside(path)


def _beside(path: Path) -> Place:
    return Place(path.with_name(f"{path.name}.{LEDGER}"), path.with_name(f".{path.name}.nestpatch"))


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Holds the model's writer lock; the system frees it when the process dies.

    Raises BusyError when another process holds it, StateError when something else is in its place, InPlaceError when the place
    cannot be written.
    """
    handle = _take_lock(place)
    try:
        yield
    finally:
        _unlock(handle)
        os.close(handle)


@contextmanager
def kept_from_writers(place: Place) -> Iterator[None]:
    """Holds off writers while a model is read. Writes nothing: a model that was never patched, or whose lock this user may not
    open, has none to hold. Raises BusyError while a writer is at work.
    """
    handle = _open_lock(place)
    if handle is None:
        yield
        return
    try:
        if not _try_lock(handle, place, shared=True):
            raise _busy(place)
        yield
    finally:
        _unlock(handle)
        os.close(handle)


def require_idle(place: Place) -> None:
    """Raises BusyError while another process writes the model. Writes nothing."""
    with kept_from_writers(place):
        pass


def _open_lock(place: Place) -> int | None:
    place.check_folder()
    try:
        return _require_file(os.open(place.lock, os.O_RDONLY | _SAFELY), place)
    except PermissionError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise _odd_lock(place, error) from error


def _take_lock(place: Place) -> int:
    while True:
        place.check_folder()
        try:
            _make_folder(place)
            handle = os.open(place.lock, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
        except FileNotFoundError:
            if place.folder.parent.is_dir():
                continue  # tidied up in between
            raise InPlaceError(f"the folder of the model is gone: {place.folder.parent}") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _odd_lock(place, error) from error
            raise InPlaceError(f"cannot write beside the model, in {place.folder}: {error.strerror}") from error
        _own_lock(_require_file(handle, place), place)
        if not _try_lock(handle, place):
            os.close(handle)
            raise _busy(place)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(place.lock)):
                return handle
        os.close(handle)  # the lock of one who tidied up: locks on a removed file exclude nobody


_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def _make_folder(place: Place) -> None:
    with suppress(FileExistsError):
        place.folder.mkdir()
        if place.owner is not None:
            os.chown(place.folder, *place.owner, follow_symlinks=False)


def _require_file(handle: int, place: Place) -> int:
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise _odd_lock(place, OSError(errno.EINVAL, "it is not a file"))


def _own_lock(handle: int, place: Place) -> None:
    """Nobody but the owner of the model's folder may hold the lock: whoever can open it could keep all writers out."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # somebody else's lock: the folder's owner has to mend it
        found = os.fstat(handle)
        if found.st_mode & 0o077:
            os.fchmod(handle, 0o600)
        if place.owner is not None and (found.st_uid, found.st_gid) != place.owner:
            os.fchown(handle, *place.owner)


def _busy(place: Place) -> BusyError:
    return BusyError(f"another nestpatch is writing or copying the model of {place.ledger}")


def _odd_lock(place: Place, error: OSError) -> StateError:
    return StateError(
        f"{place.lock} is not a lock file of nestpatch: {error.strerror}",
        advice="Remove it, if you did not put it there, and run the command again.",
    )


def tidy(place: Place) -> None:
    """Removes the folder of a model that nothing was done to. The lock must be held; it goes last.

    Records stay: without a ledger nobody knows whether they are needed.
    """
    with suppress(OSError):
        if any(file.name != place.lock.name and not file.name.endswith(".tmp") for file in place.folder.iterdir()):
            return
        for file in place.folder.iterdir():
            if file != place.lock:
                file.unlink()
        place.lock.unlink()
        place.folder.rmdir()


def _unlock(handle: int) -> None:
    # Closing is not enough where another thread forks at this moment: its child has the handle too, until it runs its program.
    if os.name != "nt":
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_UN)


def _try_lock(handle: int, place: Place, *, shared: bool = False) -> bool:
    """Whether the lock was free. Raises InPlaceError on a file system without locks."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
            return False
        if shared:
            return True  # nobody can have locked it
        os.close(handle)
        raise InPlaceError(
            f"the file system of {place.folder} offers no locks: {error.strerror}",
            advice="Copy the model to a local disk, patch it there, and copy it back.",
        ) from error
    return True
