"""Where the state of a model is. State means: ledger, journal, undo records, kept packs and their signatures.

A weight file has one state, whatever path names it. For a directory with model.safetensors or with an index of several files,
and for such a model.safetensors itself, it is `nestpatch.json` and `.nestpatch/` inside the directory. For any other weight
file `m.safetensors`, `m.gguf` or `m.onnx`, even as the only model of its directory, it is `m.safetensors.nestpatch.json` and
`.m.safetensors.nestpatch/` beside the file.

State travels with the model, so it is not trusted: names are checked before they become paths, and links are not followed.

Public: `StateDir`, `state_dir_of`, `require_own`. The lock is in `_lock`.
"""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from nestpatch.errors import CheckpointFormatError, InPlaceError, StateError
from nestpatch.formats.onnx.folder import models
from nestpatch.formats.safetensors import INDEX, SINGLE, indexed_files, only_file
from nestpatch.values import dataclass

LEDGER = "nestpatch.json"
_FOLDER = ".nestpatch"
TRANSACTION = re.compile(r"[0-9a-f]{16}", re.ASCII)
PACK_ID = re.compile(r"[0-9a-f]{64}", re.ASCII)
UNDO = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True)
class StateDir:
    """The files that hold the state of one model."""

    ledger: Path
    folder: Path

    @classmethod
    def inside(cls, directory: Path) -> StateDir:
        """The state of the model that a directory is.

        Args:
            directory: The model.

        Returns:
            Its state, whether or not there is any.
        """
        return cls(directory / LEDGER, directory / _FOLDER)

    @classmethod
    def beside(cls, file: Path) -> StateDir:
        """The state of a single weight file.

        Args:
            file: The model.

        Returns:
            Its state, whether or not there is any.
        """
        return cls(file.with_name(f"{file.name}.{LEDGER}"), file.with_name(f".{file.name}{_FOLDER}"))

    @property
    def journal(self) -> Path:
        """The journal of a change under way."""
        return self.folder / "journal"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.folder / "lock"

    def undo(self, name: str) -> Path:
        """The undo record of an applied pack.

        Args:
            name: <transaction>-<start of the pack id>.

        Returns:
            Its path.

        Raises:
            StateError: The name does not have that form.
        """
        if not UNDO.fullmatch(name):
            raise StateError(f"{name[:80]!r} is not the name of an undo record")
        return self.folder / f"{name}.undo"

    def pack(self, pack_id: str) -> Path:
        """The kept copy of a pack, whose deltas are needed to revert it.

        Args:
            pack_id: SHA-256 of the pack, hex.

        Returns:
            Its path.

        Raises:
            StateError: The id is not a SHA-256.
        """
        if not PACK_ID.fullmatch(pack_id):
            raise StateError(f"{pack_id[:80]!r} is not the id of a pack")
        return self.folder / f"{pack_id}.nest"

    @property
    def place(self) -> tuple[str, str]:
        """Equal for different paths to one place."""
        return os.path.realpath(self.ledger.parent), self.ledger.name

    @property
    def owner(self) -> tuple[int, int] | None:
        """(user, group) of the model's folder, which root gives new files to; None: new files keep the user who writes them."""
        if os.name == "nt" or os.geteuid() != 0:
            return None
        found = self.folder.parent.stat()
        return (found.st_uid, found.st_gid) if (found.st_uid, found.st_gid) != (os.geteuid(), os.getegid()) else None

    def check_folder(self) -> None:
        """Checks that the folder is a directory, or missing: what a link leads to belongs to something else.

        Raises:
            StateError: It is a link or a file.
        """
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(os.lstat(self.folder).st_mode):
                raise StateError(
                    f"{self.folder} is a link or a file, where a directory is expected: nestpatch follows no links there",
                    advice="Remove it, if you did not put it there. Nothing was read or written through it.",
                )


def state_dir_of(model: str | Path) -> StateDir:
    """Finds the state of a model.

    State that a model got before another weight file or an index was added to its folder, or before it was renamed from
    model.safetensors, is still found.

    Args:
        model: A weight file, or a directory.

    Returns:
        Where the state is, or where it will be if there is none.

    Raises:
        CheckpointFormatError: The file is only one part of a model.
        StateError: The model has several states, or a state that may be another model's.
    """
    # Path.absolute keeps "link/..", unlike abspath: the system takes that for the parent of the link's target.
    path = Path(model).absolute()
    own = _candidates(path)
    found = {state_dir.place: state_dir for state_dir in (*own, *_states_of_targets(path)) if _exists(state_dir)}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise StateError(
            f"{path} has two states: {first.ledger} and {second.ledger}",
            advice="Move away the ledger and folder that do not belong to this model. Nothing was changed.",
        )
    return next(iter(found.values()), own[0])


def require_own(model: str | Path) -> None:
    """Checks that a model can be changed under this path.

    Args:
        model: A weight file, or a directory.

    Raises:
        InPlaceError: A weight file is a link to a model that nestpatch has patched, and one of the two ledgers would miss the
            change; or the directory holds two models.
    """
    path = Path(model).absolute()
    own = {state_dir.place for state_dir in _candidates(path)}
    for file in _weight_files(path):
        for state_dir in _states_of_targets(file):
            if state_dir.place not in own and _exists(state_dir):
                target = Path(os.path.realpath(file))
                raise InPlaceError(
                    f"{file} is a link to {target}, of a model that nestpatch has patched: {state_dir.ledger} names the packs",
                    advice="Change that model itself, or write a patched copy with -o OUTPUT.",
                )
    if path.is_dir() and _is_left_out_of_index(path / SINGLE):
        raise InPlaceError(
            f"{path} holds two models: {SINGLE}, and the files that {INDEX} names",
            advice=f"Some programs load the one, some the other. Move {SINGLE} or the files of the index to another folder.",
        )


def _exists(state_dir: StateDir) -> bool:
    """Whether there is any state. A lock and temporary files do not count."""
    if os.path.lexists(state_dir.ledger):
        return True
    try:
        return any(name != state_dir.lock.name and not name.endswith(".tmp") for name in os.listdir(state_dir.folder))  # noqa: PTH208
    except FileNotFoundError:
        return False
    except OSError:  # a file, or a folder that this user may not read
        return True


def _weight_files(path: Path) -> list[Path]:
    """The weight files of a model. Empty for a directory that holds several models or none."""
    if not path.is_dir():
        return [path]
    if (path / INDEX).is_file():
        return [path / name for name in sorted(indexed_files(path))]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    onnx = models(path)
    file = only_file(path) or (onnx[0] if len(onnx) == 1 else None)
    return [file] if file is not None else []


def _candidates(path: Path) -> list[StateDir]:
    """Where the state of a model may be. The first is for a model that has none yet."""
    files = _weight_files(path)
    if len(files) == 1:
        return _candidates_of_file(files[0])
    inside = StateDir.inside(path)
    if _is_left_out_of_index(path / SINGLE) and _exists(inside):
        raise _ambiguous(path / SINGLE, inside)
    for file in files:
        if _exists(alone := StateDir.beside(file)):
            raise StateError(
                f"{file} was patched by itself, its ledger is {alone.ledger}; now {INDEX} makes it a part of a model",
                advice=f"Move {INDEX} away and revert the file (nestpatch revert), or move the file's ledger and folder away.",
            )
    return [inside]


def _candidates_of_file(path: Path) -> list[StateDir]:
    parts = indexed_files(path.parent)
    if path.name in parts and len(parts) > 1:
        raise CheckpointFormatError(
            f"{path} is one of the {len(parts)} files of the model in {path.parent}",
            advice=f"Give the directory: {path.parent}",
        )
    inside, beside = StateDir.inside(path.parent), StateDir.beside(path)
    if path.name in parts or (path.name == SINGLE and not parts):
        return [inside, beside]
    if _is_left_out_of_index(path) and _exists(inside) and not _exists(beside):
        raise _ambiguous(path, inside)
    # The only file of a directory may have been named model.safetensors before.
    return [beside, inside] if only_file(path.parent) == path else [beside]


def _states_of_targets(path: Path) -> list[StateDir]:
    """Where the states may be of the models that the links among a model's files lead to: a link is another name of a file."""
    found = []
    for file in _weight_files(path):
        if file.is_symlink():
            target = Path(os.path.realpath(file))
            parts = indexed_files(target.parent)
            is_part = target.name in parts and len(parts) > 1
            found += [StateDir.inside(target.parent)] if is_part else _candidates_of_file(target)
    return found


def _is_left_out_of_index(single: Path) -> bool:
    """Whether a file is a model.safetensors that the index in its folder does not name."""
    parts = indexed_files(single.parent)
    return bool(parts) and single.name == SINGLE and single.name not in parts and os.path.lexists(single)


def _ambiguous(single: Path, inside: StateDir) -> StateError:
    return StateError(
        f"{inside.ledger} may be the ledger of {single} or of the model that {INDEX} makes of other files",
        advice=f"Move {SINGLE} to a folder of its own, or the files of the index: whichever was added later.",
    )
