"""Applying a pack into a copy of the model that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.errors import BusyError, ChainError, OutputError, UndoError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output, sync_folder, sync_tree, temporary
from nestpatch.files.copying import copy_file
from nestpatch.files.reading import open_regular
from nestpatch.files.scratch import claimed, new_output, sweep
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.safetensors import INDEX
from nestpatch.gate import PackLike, Trust, policy_of, prove
from nestpatch.pack import Pack
from nestpatch.patcher._transaction import Transaction
from nestpatch.patcher.chain import Allowed
from nestpatch.patcher.ledger import Ledger, read_ledger, write_ledger
from nestpatch.patcher.merge import quantized_merge
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model, require_settled
from nestpatch.patcher.state_dir import LEDGER, StateDir, kept_from_writers, state_dir_of
from nestpatch.patcher.steps import Judge, PlannedSteps, plan_apply
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import signature_files

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".ort", ".msgpack", ".h5", ".ckpt", ".safetensors")
"""Endings of files that would carry unpatched weights into the output if they were copied along."""
MORE_WEIGHTS = ".onnx"
"""Inside the names of their data: model.onnx_data, model.onnx.data, model.onnx_data_1."""


@dataclass(frozen=True)
class WrittenFile:
    """One weight file of the output."""

    path: Path
    nbytes: int
    sha256: str | None
    """None where it was not asked for."""


@dataclass(frozen=True)
class Applied:
    """What applying a pack did, or with `dry_run` would do."""

    pack: str
    pack_id: str
    strength: float
    output: Path
    files: tuple[WrittenFile, ...]
    """Empty after a dry run."""
    left_out: tuple[str, ...]
    """Files beside the model that were not copied: unpatched weights of other formats, and links to files outside of it."""
    tensors: int
    rows: int
    row_bytes: int
    """Bytes that differ from a plain copy, at most."""
    seconds: float
    retention: float | None = None
    """The smallest share of the pack's change that arrived in a tensor; None where no rows are quantized."""
    dry_run: bool = False


def default_output(model: Path, pack: Pack) -> Path:
    """Beside the model, named after the pack."""
    suffix = f"{pack.manifest.name}-{pack.manifest.version}"
    model = Path(os.path.abspath(model))
    if model.is_dir():
        return model.with_name(f"{model.name}-{suffix}")
    return model.with_name(f"{model.stem}-{suffix}{model.suffix}")


def apply(
    model: str | Path,
    pack: PackLike,
    output: str | Path | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strength: float = 1.0,
    allow_overlap: bool = False,
    allow_downgrade: bool = False,
    allow_base_mismatch: bool = False,
    allow_other_publisher: bool = False,
    base: str | Path | Checkpoint | None = None,
    dither: bool = False,
    hard_link: bool = False,
    digest: bool = False,
    sync: bool = True,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Applied:
    """Merges a pack into a copy of a model: a safetensors file, a directory, sharded or not, a GGUF file, or an ONNX model.

    The base is checked on the touched rows first. Untouched bytes are copied as they are; the result is checked against the
    digests in the pack before it gets its name. The copy carries a ledger and undo records, so it can be verified and reverted.
    With `hard_link`, shards without touched rows share their file with the base. With `digest`, the SHA-256 of every weight
    file is taken, which takes longer than copying it. Without `sync`, writing to the disk is left to the system, as `cp` does.
    `policy`, `trust`, `allow_unsigned`, `base` and `dither` are as in `apply_in_place`.

    Raises SignatureError, PackError, CheckpointError, ChainError, StateError or OutputError; then nothing was written.
    """
    began = time.perf_counter()
    check_strength(strength)
    rules = policy_of(policy, trust)
    proven = prove(pack, model, policy=rules, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    checkpoint, state_dir = open_model(model)
    target = Path(output) if output is not None else default_output(copied(checkpoint), proven.pack)
    if not dry_run:
        sweep_unfinished(target)
    _check_target(checkpoint, target)
    judge, allowed = Judge(rules, model, allow_unsigned), Allowed(allow_overlap, allow_downgrade, allow_other_publisher)
    quantized = quantized_merge(base, dither=dither)
    with kept_from_writers(state_dir):
        require_settled(state_dir, model)  # again: a writer may have died since
        ledger = read_ledger(state_dir)
        planned = plan_apply(checkpoint, state_dir, ledger, proven, strength, judge, allowed, quantized.base)
        if not planned.steps:
            label = proven.pack.label
            raise ChainError(f"{label} is applied to {model} already", advice="Nothing to do: copy the model as it is.")
        change = Transaction(state_dir, checkpoint, planned, allow_base_mismatch, on_event, quantized=quantized)
        change.check_first()
        files: tuple[WrittenFile, ...] = ()
        if not dry_run:
            ledger, files = _write_copy(change, ledger, target, _How(hard_link, digest, sync))
    return Applied(
        pack=proven.pack.label,
        pack_id=proven.pack_id,
        strength=strength,
        output=target,
        files=files,
        left_out=companions_of(checkpoint)[1],
        **asdict(planned.size(checkpoint)),
        seconds=time.perf_counter() - began,
        retention=ledger.applied[-1].retention if files else None,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _How:
    """How a copy is made."""

    hard_link: bool
    digest: bool
    sync: bool


def _write_copy(change: Transaction, ledger: Ledger, target: Path, how: _How) -> tuple[Ledger, tuple[WrittenFile, ...]]:
    """Copies the model of a change and carries the change out in the copy, which appears when all is done."""
    checkpoint, on_event = change.checkpoint, change.on_event
    linked = _untouched(checkpoint, change.planned) if how.hard_link else frozenset()
    before = _fingerprint(checkpoint, change.state_dir)
    with _new_model(target, directory=copied(checkpoint).is_dir()) as sibling:
        _copy(checkpoint, sibling, linked, on_event, flush=how.sync)
        # Before the rows are looked at: half a change in them would be taken for another base.
        _require_unchanged(checkpoint, change.state_dir, before)
        copy = checkpoint.reopen(sibling)
        own = state_dir_of(copy.path)
        final = state_dir_of_copy(own, sibling, target)
        _copy_state(change.state_dir, own, ledger, final)
        # Nobody's files yet: no journal.
        ledger = replace(change, state_dir=own, checkpoint=copy, journaled=False, final=final).run(ledger)
        files = tuple(_seal(file, sibling, target, on_event, digest=how.digest, sync=how.sync) for file in copy.files)
        if how.sync:
            sync_tree(sibling if sibling.is_dir() else own.folder)
        _require_unchanged(checkpoint, change.state_dir, before)
    return ledger, files


def state_dir_of_copy(own: StateDir, sibling: Path, target: Path) -> StateDir:
    """Where the state of a copy will be, once the copy has its name."""
    if own.folder.parent == sibling.absolute().parent:
        return state_dir_of(target)
    return StateDir(target / own.ledger.relative_to(sibling.absolute()), target / own.folder.relative_to(sibling.absolute()))


def _fingerprint(checkpoint: Checkpoint, state_dir: StateDir) -> list[Any]:
    """Changes when something is written to the model: for where there is no lock to hold."""
    states = [file.stat() for file in checkpoint.files]
    return [read_ledger(state_dir).transaction, *((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)]


def _require_unchanged(checkpoint: Checkpoint, state_dir: StateDir, before: list[Any]) -> None:
    if _fingerprint(checkpoint, state_dir) != before:
        raise BusyError(f"{checkpoint.path} was changed while it was copied")


def copied(checkpoint: Checkpoint) -> Path:
    """What a copy of a model consists of: its file, or the directory where its files lie together."""
    path = checkpoint.path
    return path if path.is_dir() or len(checkpoint.files) == 1 else path.parent


def _check_target(checkpoint: Checkpoint, target: Path) -> None:
    source = copied(checkpoint)
    check_output(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies inside the model {source}")
    if source != checkpoint.path and target.suffix == checkpoint.path.suffix:
        raise OutputError(
            f"the files of {checkpoint.path} lie together in a directory, and {target} is named like a file",
            advice="Name a directory with -o; nothing was written.",
        )
    if not source.is_dir():
        state_dir = state_dir_of(target)
        for taken in (state_dir.ledger, state_dir.folder):
            if os.path.lexists(taken):
                raise OutputError(
                    f"{taken} exists already: it belongs to a model that was once at {target}, or is being copied there now"
                )


def companions_of(checkpoint: Checkpoint) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(files to copy along, names of weight files to leave out) of a model directory."""
    source = copied(checkpoint)
    if not source.is_dir():
        return (), ()
    weights = {file.name for file in checkpoint.files}
    others = [file for file in sorted(source.iterdir()) if file.name not in weights and file.is_file()]
    # The copy gets a ledger of its own.
    others = [file for file in others if file.name != LEDGER and not file.name.endswith(f".{LEDGER}")]
    # The index was read to open the model: without it the copy would be none.
    read = {source / INDEX} if getattr(checkpoint, "index", None) else set()
    left_out = [file.name for file in others if _is_weights(file) or (file not in read and leads_out(file, source))]
    return tuple(file for file in others if file.name not in left_out), tuple(left_out)


def leads_out(file: Path, source: Path) -> bool:
    """Whether a companion is a link to a file outside of its model, where a hostile model could name any file of this user."""
    if not file.is_symlink():
        return False
    home = source.resolve()
    # A snapshot in a Hub cache: models--owner--name/snapshots/<commit>, with its files in models--owner--name/blobs.
    return not {home, home.parent.parent / "blobs" if home.parent.name == "snapshots" else home} & set(file.resolve().parents)


def _is_weights(file: Path) -> bool:
    name = file.name.removesuffix(".index.json")
    return (name.endswith(OTHER_WEIGHTS) or MORE_WEIGHTS in name) and file.name != INDEX


def _untouched(checkpoint: Checkpoint, planned: PlannedSteps) -> frozenset[Path]:
    """The weight files that no step changes."""
    touched = {file for name in planned.tensor_names for file in checkpoint.info(name).files}
    return frozenset(file for file in checkpoint.files if file not in touched)


@contextmanager
def _new_model(target: Path, *, directory: bool) -> Iterator[Path]:
    """A temporary place for a copy, which gets its name at the end, together with its state.

    A directory carries its own state inside. A single file is made in a temporary folder, with its state beside it. Both are
    marked as in use while the process lives (formats/export/scratch.py), so that the next command can remove what a killed one
    left. Raises OutputError.
    """
    with new_output(target, directory=True) if directory else _new_file(target) as state_dir:
        yield state_dir


@contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    folder = temporary(target)
    file = folder / target.name
    with claimed(folder, directory=True):
        try:
            # Before the file: a file without this folder beside it has its state under the final name already.
            state_dir_of(file).folder.mkdir()
            yield file
            _name(file, target)
        except OSError as error:
            raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            _remove_copy(folder, target)


def _name(file: Path, target: Path) -> None:
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


def sweep_unfinished(target: Path) -> None:
    """Removes what killed processes left of copies and exports to this place."""
    with suppress(OSError):  # names too long, folders that may not be read: nothing was left there
        sweep(target, lambda path: _remove_copy(path, target))


def _remove_copy(path: Path, target: Path) -> None:
    """Removes the temporary file or folder of a copy, and state that has its final name while the file has not.

    Killed at any point and called again, it ends in the same: the state goes back into the folder, and is removed with it after
    the file is gone.
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


def _copy(checkpoint: Checkpoint, target: Path, linked: frozenset[Path], on_event: OnEvent, *, flush: bool) -> None:
    if not copied(checkpoint).is_dir():
        on_event(Event("copy", note=copy_file(checkpoint.files[0], target, flush=flush)))
        return
    files = (*checkpoint.files, *companions_of(checkpoint)[0])
    for number, file in enumerate(files, start=1):
        if file in linked:
            os.link(file.resolve(), target / file.name)
        else:
            copy_file(file, target / file.name, flush=flush)
        on_event(Event("copy", number, len(files), file.name))


def _copy_state(state_dir: StateDir, own: StateDir, ledger: Ledger, final: StateDir) -> None:
    """What is kept of the packs that the base has already, so that the copy can revert them too."""
    own.folder.mkdir(exist_ok=True)
    for entry in ledger.applied:
        kept = state_dir.pack(entry.pack_id)
        for file in (state_dir.undo(entry.undo), kept, *signature_files(kept)):
            with open_regular(file, follow=False, error=UndoError) as source, open(own.folder / file.name, "xb") as target:
                shutil.copyfileobj(source, target)
    if ledger.applied:
        write_ledger(own, ledger, final)


def _seal(file: Path, sibling: Path, target: Path, on_event: OnEvent, *, digest: bool, sync: bool) -> WrittenFile:
    """Syncs one written file and takes its digest; reports it under its final name."""
    state = sha256()
    with open(file, "rb") as handle:
        if sync:
            os.fsync(handle.fileno())
        if digest:
            on_event(Event("digest", note=file.name))
            while block := handle.read(1 << 20):
                state.update(block)
    final = target if file == sibling else target / file.name
    return WrittenFile(final, file.stat().st_size, state.hexdigest() if digest else None)
