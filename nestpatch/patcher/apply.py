"""Carries a Plan out: into a copy of the model that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.errors import BaseMismatchError, OutputError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import new_place
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.safetensors import INDEX
from nestpatch.pack import Pack
from nestpatch.patcher.plan import Plan, check_strength, make_plan, merged_blocks
from nestpatch.patcher.transaction import open_model

OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".onnx_data", ".msgpack", ".h5", ".ckpt", ".safetensors")
"""Endings of files that would carry unpatched weights into the output if they were copied along."""


@dataclass(frozen=True)
class WrittenFile:
    """One weight file of the output."""

    path: Path
    nbytes: int
    sha256: str


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
    allow_base_mismatch: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Applied:
    """Merges a pack into a copy of a model: a safetensors file or a directory, sharded or not.

    The base is checked on the touched rows first. Untouched bytes are copied as they are; the result is checked against the
    digests in the pack before it gets its name.

    Raises PackError, CheckpointError or OutputError; then nothing was written.
    """
    began = time.perf_counter()
    check_strength(strength)
    pack = patch if isinstance(patch, Pack) else nest.read(patch)
    checkpoint, _ = open_model(model)
    target = Path(output) if output is not None else default_output(checkpoint.path, pack)
    _check_target(checkpoint, target)
    plan = make_plan(pack, checkpoint, strength, allow_mismatch=allow_base_mismatch)
    copied, left_out = _companions(checkpoint)
    files: tuple[WrittenFile, ...] = ()
    if not dry_run:
        with new_place(target) as sibling:
            _copy(checkpoint, copied, sibling, on_event)
            written = checkpoint.reopen(sibling)
            write_plan(plan, written, on_event)
            files = tuple(_seal(file, sibling, target, on_event) for file in written.files)
    seconds = time.perf_counter() - began
    counts = (len(plan.tensors), plan.rows, plan.nbytes)
    return Applied(pack.label, nest.pack_id(pack), strength, target, files, left_out, *counts, seconds, dry_run)


def _check_target(checkpoint: Checkpoint, target: Path) -> None:
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {target.absolute().parent}")
    if checkpoint.path.is_dir() and checkpoint.path.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies inside the model {checkpoint.path}")


def _companions(checkpoint: Checkpoint) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """(files to copy along, names of weight files to leave out) of a model directory."""
    if not checkpoint.path.is_dir():
        return (), ()
    weights = {file.name for file in checkpoint.files}
    others = [file for file in sorted(checkpoint.path.iterdir()) if file.name not in weights and file.is_file()]
    left_out = [file.name for file in others if _is_weights(file)]
    return tuple(file for file in others if not _is_weights(file)), tuple(left_out)


def _is_weights(file: Path) -> bool:
    name = file.name.removesuffix(".index.json")
    return name.endswith(OTHER_WEIGHTS) and file.name != INDEX


def _copy(checkpoint: Checkpoint, companions: tuple[Path, ...], target: Path, on_event: OnEvent) -> None:
    if not checkpoint.path.is_dir():
        shutil.copyfile(checkpoint.files[0], target)
        shutil.copymode(checkpoint.files[0], target)
        return
    target.mkdir()
    files = (*checkpoint.files, *companions)
    for number, file in enumerate(files, start=1):
        shutil.copyfile(file, target / file.name)
        shutil.copymode(file, target / file.name)
        on_event(Event("copy", number, len(files), file.name))


def write_plan(plan: Plan, checkpoint: Checkpoint, on_event: OnEvent = ignore) -> None:
    """Merges the plan's rows into a checkpoint that holds the base, in place.

    Raises BaseMismatchError when the rows that were written are not those that the pack promised.
    """
    for number, tensor in enumerate(plan.tensors, start=1):
        after = sha256()
        for part, rows in merged_blocks(tensor, plan.strength, checkpoint):
            checkpoint.write_rows(tensor.delta.name, tensor.delta.rows[part].astype(np.int64), rows)
            after.update(rows.view(np.uint8).data)
        if tensor.after is not None and after.hexdigest() != tensor.after:
            raise BaseMismatchError(
                f"{tensor.delta.name}: the merged rows are not those that {plan.pack.label} promises; "
                "the model changed while it was being copied, or the pack is wrong",
                advice="Nothing was kept. Run the command again when nothing else writes the model.",
            )
        on_event(Event("merge", number, len(plan.tensors), tensor.delta.name))


def _seal(file: Path, sibling: Path, target: Path, on_event: OnEvent) -> WrittenFile:
    """Syncs one written file and takes its digest; reports it under its final name."""
    with open(file, "r+b") as handle:
        os.fsync(handle.fileno())
        on_event(Event("digest", note=file.name))
        state = sha256()
        while block := handle.read(1 << 20):
            state.update(block)
        nbytes = handle.tell()
    final = target if file == sibling else target / file.name
    return WrittenFile(final, nbytes, state.hexdigest())
