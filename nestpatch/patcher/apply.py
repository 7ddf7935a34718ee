"""Applying a pack into a copy of the model that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

from nestpatch.errors import ChainError, OutputError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import check_place, new_place, sync_tree
from nestpatch.formats.copying import copy_file
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.safetensors import INDEX
from nestpatch.pack import Pack
from nestpatch.patcher.chain import Do
from nestpatch.patcher.ledger import Ledger, Origin, read_ledger, write_ledger
from nestpatch.patcher.merging import means_of
from nestpatch.patcher.place import LEDGER, Place, place_of
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.transaction import Transaction
from nestpatch.patcher.work import Work, plan_work

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
    """Weight files beside the model that were not copied: they hold unpatched weights of other formats."""
    tensors: int
    rows: int
    row_bytes: int
    """Bytes that differ from a plain copy, at most."""
    seconds: float
    gain: float | None = None
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
    patch: str | Path | Pack,
    output: str | Path | None = None,
    *,
    strength: float = 1.0,
    allow_overlap: bool = False,
    allow_downgrade: bool = False,
    allow_base_mismatch: bool = False,
    base: str | Path | Checkpoint | None = None,
    dither: bool = False,
    hard_link: bool = False,
    digest: bool = False,
    sync: bool = True,
    dry_run: bool = False,
    origin: Origin | None = None,
    on_event: OnEvent = ignore,
) -> Applied:
    """Merges a pack into a copy of a model: a safetensors file, a directory, sharded or not, a GGUF file, or an ONNX model.

    The base is checked on the touched rows first. Untouched bytes are copied as they are; the result is checked against the
    digests in the pack before it gets its name. The copy carries a ledger and undo records, so it can be verified and reverted.
    With `hard_link`, shards without touched rows share their file with the base. With `digest`, the SHA-256 of every weight
    file is taken, which takes longer than copying it. Without `sync`, writing to the disk is left to the system, as `cp` does.
    `base`, `dither` and `origin` are as in `apply_in_place`.

    Raises PackError, CheckpointError, ChainError or OutputError; then nothing was written.
    """
    began = time.perf_counter()
    check_strength(strength)
    pack = patch if isinstance(patch, Pack) else nest.read(patch)
    checkpoint, place = open_model(model)
    target = Path(output) if output is not None else default_output(copied(checkpoint), pack)
    _check_target(checkpoint, target)
    ledger = read_ledger(place.ledger)
    work = plan_work(place, ledger, pack, strength, allow_overlap=allow_overlap, allow_downgrade=allow_downgrade)
    if not work.steps:
        raise ChainError(f"{pack.label} is applied to {model} already", advice="Nothing to do: copy the model as it is.")
    means = means_of(base, dither=dither)
    change = Transaction(place, checkpoint, work.packs, allow_base_mismatch, on_event, means=means, origin=origin or Origin())
    if work.steps[0].do is Do.CHECK:
        change.check(work.steps[0].link)
    files: tuple[WrittenFile, ...] = ()
    if not dry_run:
        ledger, files = _write_copy(change, ledger, work, target, _How(hard_link, digest, sync))
    return Applied(
        pack=pack.label,
        pack_id=nest.pack_id(pack),
        strength=strength,
        output=target,
        files=files,
        left_out=companions_of(checkpoint)[1],
        **asdict(work.size(checkpoint)),
        seconds=time.perf_counter() - began,
        gain=ledger.applied[-1].gain if files else None,
        dry_run=dry_run,
    )


@dataclass(frozen=True)
class _How:
    """How a copy is made."""

    hard_link: bool
    digest: bool
    sync: bool


def _write_copy(
    change: Transaction, ledger: Ledger, work: Work, target: Path, how: _How
) -> tuple[Ledger, tuple[WrittenFile, ...]]:
    """Copies the model of a change and carries the change out in the copy, which appears when all is done."""
    checkpoint, on_event = change.checkpoint, change.on_event
    linked = _untouched(checkpoint, work) if how.hard_link else frozenset()
    with _new_model(target, directory=copied(checkpoint).is_dir()) as sibling:
        _copy(checkpoint, sibling, linked, on_event, flush=how.sync)
        copy = checkpoint.reopen(sibling)
        own = place_of(copy.path)
        _copy_state(change.place, own, ledger)
        # Nobody's files yet: no journal.
        ledger = replace(change, place=own, checkpoint=copy, journaled=False).run(ledger, work.steps)
        files = tuple(_seal(file, sibling, target, on_event, digest=how.digest, sync=how.sync) for file in copy.files)
        if how.sync:
            sync_tree(sibling if sibling.is_dir() else own.folder)
    return ledger, files


def copied(checkpoint: Checkpoint) -> Path:
    """What a copy of a model consists of: its file, or the directory where its files lie together."""
    path = checkpoint.path
    return path if path.is_dir() or len(checkpoint.files) == 1 else path.parent


def _check_target(checkpoint: Checkpoint, target: Path) -> None:
    source = copied(checkpoint)
    check_place(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies inside the model {source}")
    if source != checkpoint.path and target.suffix == checkpoint.path.suffix:
        raise OutputError(
            f"the files of {checkpoint.path} lie together in a directory, and {target} is named like a file",
            advice="Name a directory with -o; nothing was written.",
        )
    if not source.is_dir():
        place = place_of(target)
        for taken in (place.ledger, place.folder):
            if os.path.lexists(taken):
                raise OutputError(f"{taken} exists already: it belongs to a model that was once at {target}")


def companions_of(checkpoint: Checkpoint) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(files to copy along, names of weight files to leave out) of a model directory."""
    source = copied(checkpoint)
    if not source.is_dir():
        return (), ()
    weights = {file.name for file in checkpoint.files}
    others = [file for file in sorted(source.iterdir()) if file.name not in weights and file.is_file()]
    # The copy gets a ledger of its own.
    others = [file for file in others if file.name != LEDGER and not file.name.endswith(f".{LEDGER}")]
    left_out = [file.name for file in others if _is_weights(file)]
    return tuple(file for file in others if not _is_weights(file)), tuple(left_out)


def _is_weights(file: Path) -> bool:
    name = file.name.removesuffix(".index.json")
    return (name.endswith(OTHER_WEIGHTS) or MORE_WEIGHTS in name) and file.name != INDEX


def _untouched(checkpoint: Checkpoint, work: Work) -> frozenset[Path]:
    """The weight files that no step changes."""
    touched = {file for name in work.names for file in checkpoint.info(name).files}
    return frozenset(file for file in checkpoint.files if file not in touched)


@contextmanager
def _new_model(target: Path, *, directory: bool) -> Iterator[Path]:
    """A temporary sibling of `target`; it and the place of what nestpatch keeps of it get their names together at the end.

    A directory carries its own place inside; that of a single file lies beside it and is named first, so that a file that has
    its name has its ledger too.
    """
    with new_place(target) as sibling:
        if directory:
            sibling.mkdir()
            yield sibling
            return
        beside, final = place_of(sibling), place_of(target)
        try:
            yield sibling
            beside.folder.rename(final.folder)
            beside.ledger.rename(final.ledger)
        except BaseException:
            shutil.rmtree(beside.folder, ignore_errors=True)
            beside.ledger.unlink(missing_ok=True)
            raise


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


def _copy_state(place: Place, own: Place, ledger: Ledger) -> None:
    """What is kept of the packs that the base has already, so that the copy can revert them too."""
    own.folder.mkdir()
    for entry in ledger.applied:
        shutil.copyfile(place.undo(entry.undo), own.undo(entry.undo))
        shutil.copyfile(place.pack(entry.pack_id), own.pack(entry.pack_id))
    if ledger.applied:
        write_ledger(own.ledger, ledger)


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
