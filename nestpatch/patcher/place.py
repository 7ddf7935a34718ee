"""Where nestpatch keeps what it knows of a model: ledger, journal, lock, undo records and kept packs.

For a model directory (and for its model.safetensors named directly): `nestpatch.json` and `.nestpatch/` inside it.
For any other weight file `m.safetensors`: `m.safetensors.nestpatch.json` and `.m.safetensors.nestpatch/` beside it. An ONNX
model goes by its .onnx file, whether that or its directory is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nestpatch.errors import BusyError, InPlaceError
from nestpatch.formats.onnx.folder import models
from nestpatch.formats.safetensors import SINGLE

LEDGER = "nestpatch.json"
FOLDER = ".nestpatch"


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

    def undo(self, transaction: str) -> Path:
        """The undo record that a transaction wrote."""
        return self.folder / f"{transaction}.undo"

    def pack(self, pack_id: str) -> Path:
        """The kept copy of a pack: reverting needs its deltas."""
        return self.folder / f"{pack_id}.nest"


def place_of(model: str | Path) -> Place:
    """Where the files of a model lie, whether or not they exist."""
    path = Path(model)
    if path.is_dir() and len(found := models(path)) == 1:
        path = found[0]
    if path.is_dir():
        return Place(path / LEDGER, path / FOLDER)
    if path.name == SINGLE:
        return Place(path.parent / LEDGER, path.parent / FOLDER)
    return Place(path.with_name(f"{path.name}.{LEDGER}"), path.with_name(f".{path.name}.nestpatch"))


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """Holds the model's writer lock; the system frees it when the process dies.

    Raises BusyError when another process holds it, InPlaceError when the place cannot be written.
    """
    handle = _take_lock(place)
    try:
        yield
    finally:
        _unlock(handle)
        os.close(handle)


def _take_lock(place: Place) -> int:
    while True:
        try:
            place.folder.mkdir(exist_ok=True)
            handle = os.open(place.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            if place.folder.parent.is_dir():
                continue  # tidied up in between
            raise InPlaceError(f"the folder of the model is gone: {place.folder.parent}") from None
        except OSError as error:
            raise InPlaceError(f"cannot write beside the model, in {place.folder}: {error.strerror}") from error
        if not _try_lock(handle):
            os.close(handle)
            raise BusyError(f"another nestpatch is writing the model of {place.ledger}")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), place.lock.stat()):
                return handle
        os.close(handle)  # the lock of one who tidied up: locks on a removed file exclude nobody


def tidy(place: Place) -> None:
    """Removes the folder of a model that nothing was done to. The lock must be held; it goes last."""
    with suppress(OSError):
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


def _try_lock(handle: int) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
