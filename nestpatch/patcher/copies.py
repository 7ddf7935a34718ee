"""A copy of a model that appears under its name whole or not at all, together with its own state.

Exports use `companions_of`, `leads_out`, `fingerprint` and `sweep_unfinished` for the same purpose; the rest serves `apply`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nestpatch.errors import OutputError, UndoError
from nestpatch.events import Event, OnEvent
from nestpatch.files.atomic import check_output, sync_folder, temporary
from nestpatch.files.copying import copy_file
from nestpatch.files.reading import open_regular
from nestpatch.files.scratch import claimed, new_output, sweep
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.safetensors import INDEX
from nestpatch.patcher.ledger import Ledger, read_ledger, write_ledger
from nestpatch.patcher.state_dir import LEDGER, StateDir, state_dir_of
from nestpatch.signing.verify import signature_files

_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".ort", ".msgpack", ".h5", ".ckpt", ".safetensors")
"""Endings of files that would carry unpatched weights into the output if they were copied along."""
_ONNX_DATA = ".onnx"
"""Part of the names of ONNX data files: model.onnx_data, model.onnx.data, model.onnx_data_1."""


def root_of(checkpoint: Checkpoint) -> Path:
    """What a copy of a model consists of: its only file, or the directory that holds its files.

    Args:
        checkpoint: The model.

    Returns:
        The path of the file or of the directory.
    """
    path = checkpoint.path
    return path if path.is_dir() or len(checkpoint.files) == 1 else path.parent


def fingerprint(files: Sequence[Path], state_dir: StateDir | None = None) -> tuple[Any, ...]:
    """A value that changes when a process writes to a model: for systems and file systems without locks.

    Args:
        files: The weight files.
        state_dir: The state of the model; None leaves its ledger out.

    Returns:
        The last transaction in the ledger, and the inode, size and time of the last write of every file.

    Raises:
        LedgerError: The ledger is broken.
        OSError: A file cannot be read.
    """
    transaction = read_ledger(state_dir).transaction if state_dir is not None else ""
    states = [file.stat() for file in files]
    return (transaction, *((state.st_ino, state.st_size, state.st_mtime_ns) for state in states))


def companions_of(checkpoint: Checkpoint) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a model directory that are not its weights: configuration, tokenizer, and weights in other formats.

    Args:
        checkpoint: The model; one that is a single file has no companions.

    Returns:
        (files to copy along, names of files to leave out: unpatched weights, and links to files outside the model).
    """
    source = root_of(checkpoint)
    if not source.is_dir():
        return (), ()
    weights = {file.name for file in checkpoint.files}
    others = [file for file in sorted(source.iterdir()) if file.name not in weights and file.is_file()]
    # The copy gets a ledger of its own.
    others = [file for file in others if file.name != LEDGER and not file.name.endswith(f".{LEDGER}")]
    # The index was read to open the model: without it the copy could not be opened.
    read = {source / INDEX} if getattr(checkpoint, "index", None) else set()
    copied: list[Path] = []
    left_out: list[Path] = []
    for file in others:
        name = file.name.removesuffix(".index.json")
        other_weights = (name.endswith(_OTHER_WEIGHTS) or _ONNX_DATA in name) and file.name != INDEX
        unsafe = file not in read and leads_out(file, source)
        (left_out if other_weights or unsafe else copied).append(file)
    return tuple(copied), tuple(file.name for file in left_out)


def leads_out(file: Path, source: Path) -> bool:
    """Whether a companion is a link to a file outside its model: a hostile model could name any file of this user.

    Args:
        file: A file of the model directory.
        source: The model directory.

    Returns:
        False for links into the blobs of the same repository in a Hub cache.
    """
    if not file.is_symlink():
        return False
    home = source.resolve()
    # A snapshot in a Hub cache: models--owner--name/snapshots/<commit>, with its files in models--owner--name/blobs.
    return not {home, home.parent.parent / "blobs" if home.parent.name == "snapshots" else home} & set(file.resolve().parents)


def require_place(checkpoint: Checkpoint, target: Path) -> None:
    """Checks, before any work, that a copy can be written to a place.

    Args:
        checkpoint: The model to copy.
        target: The path of the copy.

    Raises:
        OutputError: The place is taken, is inside the model, has the wrong kind of name, or cannot be written.
    """
    source = root_of(checkpoint)
    check_output(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise OutputError(f"{target} is inside the model {source}")
    if source != checkpoint.path and target.suffix == checkpoint.path.suffix:
        raise OutputError(
            f"{checkpoint.path} is copied with its directory, and {target} is named like a file",
            advice="Name a directory with -o; nothing was written.",
        )
    if not source.is_dir():
        state_dir = state_dir_of(target)
        for taken in (state_dir.ledger, state_dir.folder):
            if os.path.lexists(taken):
                raise OutputError(
                    f"{taken} exists already: it belongs to a model that was once at {target}, or is being copied there now"
                )


@contextmanager
def new_model(target: Path, *, directory: bool) -> Iterator[Path]:
    """A temporary place for a copy, which gets its name at the end, together with its state.

    A directory carries its own state inside. A single file is made in a temporary folder, with its state beside it. Both are
    marked as in use while the process lives (files/scratch.py), so that the next command can remove what a killed one left.

    Args:
        target: The final path.
        directory: Whether the copy is a directory.

    Yields:
        The temporary path.

    Raises:
        OutputError: The place was taken meanwhile, or cannot be written.
    """
    if directory:
        with new_output(target, directory=True) as sibling:
            yield sibling
        return
    folder = temporary(target)
    file = folder / target.name
    with claimed(folder, directory=True):
        try:
            # Before the file: a file without this folder beside it has its state under the final name already.
            state_dir_of(file).folder.mkdir()
            yield file
            _give_name(file, target)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            _remove_copy(folder, target)


def _give_name(file: Path, target: Path) -> None:
    """Moves a copied file and its state to their place, the state first: a file that has its name has its ledger too."""
    own, final = state_dir_of(file), state_dir_of(target)
    try:
        if os.path.lexists(target):
            raise FileExistsError
        # Fails where another process was faster: its folder is not empty.
        own.folder.rename(final.folder)
    except OSError as error:
        if os.path.lexists(target) or os.path.lexists(final.folder):
            raise OutputError(f"{target} exists already: another process has made it meanwhile") from error
        raise
    own.ledger.rename(final.ledger)
    sync_folder(target.parent)
    file.rename(target)
    sync_folder(target.parent)


def state_dir_of_copy(own: StateDir, sibling: Path, target: Path) -> StateDir:
    """Where the state of a copy will be once the copy has its name.

    Args:
        own: Where its state is now.
        sibling: The temporary path of the copy.
        target: Its final path.

    Returns:
        The final state directory.
    """
    if own.folder.parent == sibling.absolute().parent:
        return state_dir_of(target)
    return StateDir(target / own.ledger.relative_to(sibling.absolute()), target / own.folder.relative_to(sibling.absolute()))


def sweep_unfinished(target: Path) -> None:
    """Removes what killed processes left of copies and exports to this place.

    Args:
        target: The final path of the output.
    """
    with suppress(OSError):  # names too long, folders that may not be read: nothing was left there
        sweep(target, lambda path: _remove_copy(path, target))


def _remove_copy(path: Path, target: Path) -> None:
    """Removes the temporary file or folder of a copy, and state that has its final name while the file does not.

    It can be killed at any point and called again: the state goes back into the folder, and is removed with it after the file.
    """
    file = path / target.name
    if file.is_file() and not os.path.lexists(target):
        own, final = state_dir_of(file), state_dir_of(target)
        if not own.folder.exists():
            for source, back in ((final.ledger, own.ledger), (final.folder, own.folder)):
                with suppress(FileNotFoundError):
                    source.rename(back)
        file.unlink()
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def copy_model(
    checkpoint: Checkpoint, target: Path, linked: Collection[Path], on_event: OnEvent, flush: Callable[[Path], None] | None
) -> None:
    """Copies the files of a model, and its companions.

    Args:
        checkpoint: The model.
        target: The file or directory to write.
        linked: Weight files that get a hard link instead of a copy.
        on_event: Receives progress.
        flush: As `copy_file` has it.

    Raises:
        OSError: A file cannot be read or written.
    """
    if not root_of(checkpoint).is_dir():
        on_event(Event("copy", note=copy_file(checkpoint.files[0], target, flush=flush)))
        return
    files = (*checkpoint.files, *companions_of(checkpoint)[0])
    for number, file in enumerate(files, start=1):
        if file in linked:
            os.link(file.resolve(), target / file.name)
        else:
            copy_file(file, target / file.name, flush=flush)
        on_event(Event("copy", number, len(files), file.name))


def copy_state(state_dir: StateDir, own: StateDir, ledger: Ledger, final: StateDir) -> None:
    """Copies what is kept of the packs that a model already has, so that the copy can be reverted too.

    Args:
        state_dir: The state of the model.
        own: The state of the copy, now.
        ledger: The ledger of the model.
        final: Where the state of the copy will be: the ledger is sealed for that place.

    Raises:
        UndoError: A kept file is missing or not a regular file.
    """
    own.folder.mkdir(exist_ok=True)
    for entry in ledger.applied:
        kept = state_dir.pack(entry.pack_id)
        for file in (state_dir.undo(entry.undo), kept, *signature_files(kept)):
            with open_regular(file, follow=False, error=UndoError) as source, open(own.folder / file.name, "xb") as target:
                shutil.copyfileobj(source, target)
    if ledger.applied:
        write_ledger(own, ledger, final)
