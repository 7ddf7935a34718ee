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
from nestpatch.files.locks import try_lock, unlock
from nestpatch.formats.onnx.folder import models
from nestpatch.formats.safetensors import INDEX, SINGLE, indexed_files, only_file

LEDGER = "nestpatch.json"
FOLDER = ".nestpatch"
TRANSACTION = re.compile(r"[0-9a-f]{16}", re.ASCII)
PACK_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
UNDO = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True)
class StateDir:
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


def state_dir_of(model: str | Path) -> StateDir:
    """Where the state of a model is, whether or not it has any.

    Where a model had its state by the name or the company that it had before, it is found there: another weight file or an
    index in the folder loses none.

    Raises CheckpointFormatError for a file that is only one part of a model, StateError where several states could be its own.
    """
    # Dots stay: abspath would drop "link/..", which the system takes for the parent of what the link leads to.
    path = Path(model).absolute()
    own = _own(path)
    found = {_key(state_dir): state_dir for state_dir in (*own, *_behind(path)) if has_state(state_dir)}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise StateError(
            f"{path} has two states: {first.ledger} and {second.ledger}",
            advice="Move away the one that is not of this model, ledger and folder. Nothing was changed.",
        )
    return next(iter(found.values()), own[0])


def has_state(state_dir: StateDir) -> bool:
    """Whether anything is kept there. A lock and temporary files are no state."""
    if os.path.lexists(state_dir.ledger):
        return True
    try:
        return any(name != state_dir.lock.name and not name.endswith(".tmp") for name in os.listdir(state_dir.folder))  # noqa: PTH208
    except FileNotFoundError:
        return False
    except OSError:  # a file, or a folder that this user may not read
        return True


def require_own(model: str | Path) -> None:
    """Raises InPlaceError where a model cannot be changed by this path: its files are links to a model that nestpatch has
    patched, so that the change would be missing in one of the two ledgers; or its folder holds two models.
    """
    path = Path(model).absolute()
    own = {_key(state_dir) for state_dir in _own(path)}
    for file in _files(path):
        for state_dir in _behind(file):
            if _key(state_dir) not in own and has_state(state_dir):
                target = Path(os.path.realpath(file))
                raise InPlaceError(
                    f"{file} is a link to {target}, of a model that nestpatch has patched: {state_dir.ledger} says with what",
                    advice="Change that model itself, or write a patched copy with -o OUTPUT.",
                )
    if path.is_dir() and _is_beside_an_index(path / SINGLE):
        raise InPlaceError(
            f"{path} holds two models: {SINGLE}, and the files that {INDEX} names",
            advice=f"Some programs load the one, some the other. Move {SINGLE} or the files of the index to another folder.",
        )


def _key(state_dir: StateDir) -> tuple[str, str]:
    """The same for one place by different names."""
    return os.path.realpath(state_dir.ledger.parent), state_dir.ledger.name


def _own(path: Path) -> list[StateDir]:
    """Where a model may have its state; the first is for a model that has none yet."""
    if not path.is_dir():
        return _of_file(path)
    if (file := _only_file(path)) is not None:
        return _of_file(file)
    inside = StateDir(path / LEDGER, path / FOLDER)
    if _is_beside_an_index(path / SINGLE) and has_state(inside):
        raise _ambiguous(path / SINGLE, inside)
    for name in sorted(indexed_files(path)):
        if has_state(alone := _beside(path / name)):
            raise StateError(
                f"{path / name} was patched by itself, its ledger is {alone.ledger}; now {INDEX} makes it a part of a model",
                advice=f"Move {INDEX} away and revert the file (nestpatch revert), or move the file's ledger and folder away.",
            )
    return [inside]


def _only_file(folder: Path) -> Path | None:
    """The file that is the model of a directory; None where there are several, or none."""
    if (folder / INDEX).is_file():
        parts = indexed_files(folder)
        return folder / next(iter(parts)) if len(parts) == 1 else None
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = models(folder)
    return only_file(folder) or (found[0] if len(found) == 1 else None)


def _of_file(path: Path) -> list[StateDir]:
    parts = indexed_files(path.parent)
    if path.name in parts and len(parts) > 1:
        raise CheckpointFormatError(
            f"{path} is one of the {len(parts)} files of the model in {path.parent}",
            advice=f"Give the directory: {path.parent}",
        )
    inside, beside = StateDir(path.parent / LEDGER, path.parent / FOLDER), _beside(path)
    if path.name in parts or (path.name == SINGLE and not parts):
        return [inside, beside]
    if _is_beside_an_index(path) and has_state(inside) and not has_state(beside):
        raise _ambiguous(path, inside)
    # It may have been called model.safetensors before.
    return [beside, inside] if only_file(path.parent) == path else [beside]


def _is_beside_an_index(single: Path) -> bool:
    """Whether a file is a model.safetensors that the index in its folder leaves out."""
    parts = indexed_files(single.parent)
    return bool(parts) and single.name == SINGLE and single.name not in parts and os.path.lexists(single)


def _ambiguous(single: Path, inside: StateDir) -> StateError:
    return StateError(
        f"{inside.ledger} may be the ledger of {single} or of the model that {INDEX} makes of other files",
        advice=f"Move {SINGLE} to a folder of its own, or the files of the index: whichever came later.",
    )


def _files(path: Path) -> list[Path]:
    """The weight files of a model, as far as its state depends on them."""
    if not path.is_dir():
        return [path]
    file = _only_file(path)
    return [file] if file is not None else [path / name for name in sorted(indexed_files(path))]


def _behind(path: Path) -> list[StateDir]:
    """Where the models have their states whose files a model's links lead to: a link is another name of a file."""
    places = []
    for file in _files(path):
        if file.is_symlink():
            target = Path(os.path.realpath(file))
            parts = indexed_files(target.parent)
            is_part = target.name in parts and len(parts) > 1
            places += [StateDir(target.parent / LEDGER, target.parent / FOLDER)] if is_part else _of_file(target)
    return places


def _beside(path: Path) -> StateDir:
    return StateDir(path.with_name(f"{path.name}.{LEDGER}"), path.with_name(f".{path.name}.nestpatch"))


@contextmanager
def locked(state_dir: StateDir) -> Iterator[None]:
    """Holds the model's writer lock; the system frees it when the process dies.

    Raises BusyError when another process holds it, StateError when something else is in its place, InPlaceError when the place
    cannot be written.
    """
    handle = _take_lock(state_dir)
    try:
        yield
    finally:
        unlock(handle)
        os.close(handle)


@contextmanager
def kept_from_writers(state_dir: StateDir) -> Iterator[None]:
    """Holds off writers while a model is read. Writes nothing: a model that was never patched, or whose lock this user may not
    open, has none to hold. Raises BusyError while a writer is at work.
    """
    handle = _open_lock(state_dir)
    if handle is None:
        yield
        return
    try:
        if not _try_lock(handle, state_dir, shared=True):
            raise _busy(state_dir)
        yield
    finally:
        unlock(handle)
        os.close(handle)


def require_idle(state_dir: StateDir) -> None:
    """Raises BusyError while another process writes the model. Writes nothing."""
    with kept_from_writers(state_dir):
        pass


def _open_lock(state_dir: StateDir) -> int | None:
    state_dir.check_folder()
    try:
        return _require_file(os.open(state_dir.lock, os.O_RDONLY | _SAFELY), state_dir)
    except PermissionError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise _odd_lock(state_dir, error) from error


def _take_lock(state_dir: StateDir) -> int:
    while True:
        state_dir.check_folder()
        try:
            _make_folder(state_dir)
            handle = os.open(state_dir.lock, os.O_RDWR | os.O_CREAT | _SAFELY, 0o600)
        except FileNotFoundError:
            if state_dir.folder.parent.is_dir():
                continue  # tidied up in between
            raise InPlaceError(f"the folder of the model is gone: {state_dir.folder.parent}") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise _odd_lock(state_dir, error) from error
            raise InPlaceError(f"cannot write beside the model, in {state_dir.folder}: {error.strerror}") from error
        _own_lock(_require_file(handle, state_dir), state_dir)
        if not _try_lock(handle, state_dir):
            os.close(handle)
            raise _busy(state_dir)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.lstat(state_dir.lock)):
                return handle
        os.close(handle)  # the lock of one who tidied up: locks on a removed file exclude nobody


_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def _make_folder(state_dir: StateDir) -> None:
    with suppress(FileExistsError):
        state_dir.folder.mkdir()
        if state_dir.owner is not None:
            os.chown(state_dir.folder, *state_dir.owner, follow_symlinks=False)


def _require_file(handle: int, state_dir: StateDir) -> int:
    found = os.fstat(handle)
    # A hard link to another file: owner and mode of that would be changed. None: it was tidied up in between.
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return handle
    os.close(handle)
    odd = "it is not a file" if not stat.S_ISREG(found.st_mode) else "it has another name elsewhere"
    raise _odd_lock(state_dir, OSError(errno.EINVAL, odd))


def _own_lock(handle: int, state_dir: StateDir) -> None:
    """Nobody but the owner of the model's folder may hold the lock: whoever can open it could keep all writers out."""
    if os.name == "nt":
        return
    with suppress(PermissionError):  # another user's lock: the folder's owner has to mend it
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
    """Removes the folder of a model that nothing was done to. The lock must be held; it goes last.

    Records stay: without a ledger nobody knows whether they are needed.
    """
    with suppress(OSError):
        if any(file.name != state_dir.lock.name and not file.name.endswith(".tmp") for file in state_dir.folder.iterdir()):
            return
        for file in state_dir.folder.iterdir():
            if file != state_dir.lock:
                file.unlink()
        state_dir.lock.unlink()
        state_dir.folder.rmdir()


def _try_lock(handle: int, state_dir: StateDir, *, shared: bool = False) -> bool:
    """Whether the lock was free. Raises InPlaceError on a file system without locks."""
    try:
        return try_lock(handle, shared=shared)
    except OSError as error:
        if shared:
            return True  # no writer can hold a lock there
        os.close(handle)
        raise InPlaceError(
            f"the file system of {state_dir.folder} offers no locks: {error.strerror}",
            advice="Copy the model to a local disk, patch it there, and copy it back.",
        ) from error
