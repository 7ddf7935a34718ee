"""Exporting a model to another format, patched on the way: rows are merged as they are read, and only the result is written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import BusyError, OutputError, UnsupportedModelError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.export.converter import convert_gguf, require_converter
from nestpatch.formats.export.gguf_types import AUTO, file_type
from nestpatch.formats.export.scratch import PATCHED, claimed, scratch
from nestpatch.formats.export.to_gguf import GgufFile, model_name, write_gguf
from nestpatch.formats.interface import Checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import MAX_NAME, apply
from nestpatch.patcher.chain import Do
from nestpatch.patcher.ledger import Entry, read_ledger
from nestpatch.patcher.overlay import merged_view
from nestpatch.patcher.place import Place
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.work import plan_work

PATCHES_KEY = "nestpatch.patches"
"""Metadata of an exported file: JSON, the packs that its weights hold, bottom first."""


@dataclass(frozen=True)
class Exported:
    """What an export wrote, or with `dry_run` would write."""

    path: Path
    nbytes: int
    """0 after a dry run where llama.cpp decides on it."""
    sha256: str
    """Empty after a dry run."""
    tensors: int
    type: str
    architecture: str
    patches: tuple[str, ...]
    """The packs in it, bottom first."""
    notes: tuple[str, ...]
    """What a user should know of the file."""
    seconds: float
    dry_run: bool = False


def default_output(model: Path, pack: Pack | None, kind: str) -> Path:
    """Beside the model, named after it, the patch and the type."""
    place = Path(os.path.abspath(model))
    stem = place.name if place.is_dir() else place.stem
    patch = [pack.manifest.name, pack.manifest.version] if pack is not None else []
    return place.with_name("-".join([stem, *patch, *([] if kind == AUTO else [kind])]) + ".gguf")


def export_gguf(
    model: str | Path,
    output: str | Path | None = None,
    patch: str | Path | Pack | None = None,
    *,
    strength: float = 1.0,
    type: str = "auto",  # noqa: A002 - the word that users of GGUF files say
    name: str | None = None,
    llama_cpp: str | Path | None = None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Exported:
    """Exports a safetensors model to a GGUF file for llama.cpp, with a pack merged into it if one is given.

    `type` is that of the weights: "auto" keeps the checkpoint's; f32, f16, bf16 and q8_0 are written here, others such as
    q4_k_m by llama-cpp-python. `name` is what the file calls the model. `llama_cpp` is a checkout of llama.cpp whose converter
    is used instead. The packs of the model's ledger and the given one are listed in the file under "nestpatch.patches".

    Raises PackError, CheckpointError, ChainError, OutputError, DataError, MissingExtraError; then nothing was written.
    """
    began = time.perf_counter()
    kind = file_type(type).name
    check_strength(strength)
    pack = patch if isinstance(patch, Pack) or patch is None else nest.read(patch)
    if llama_cpp is not None:
        require_converter(Path(llama_cpp))
    checkpoint, place = open_model(model)
    if checkpoint.converted:
        raise UnsupportedModelError(
            f"{model} was converted already: exports start from the safetensors model",
            advice="Give the safetensors model. A GGUF file is patched as it is: nestpatch apply FILE.gguf PATCH",
        )
    target = Path(output) if output is not None else default_output(checkpoint.path, pack, kind)
    _check_target(target)
    before = _fingerprint(checkpoint, place)
    making = _source(checkpoint, place, pack, strength, target, whole=llama_cpp is not None, dry_run=dry_run, on_event=on_event)
    with making as (source, patches):
        common: dict[str, Any] = {
            "kind": kind,
            "name": name or model_name(checkpoint.path),
            "keys": {PATCHES_KEY: json.dumps(patches, ensure_ascii=False)} if patches else {},
            "dry_run": dry_run,
            "on_event": on_event,
        }
        if llama_cpp is not None:
            written = convert_gguf(source, target, Path(llama_cpp), **common)
        else:
            written = write_gguf(source, target, **common)
    if not dry_run and _fingerprint(checkpoint, place) != before:
        target.unlink(missing_ok=True)
        raise BusyError(f"{model} was changed while it was exported")
    return _exported(written, patches, time.perf_counter() - began)


def _exported(written: GgufFile, patches: Sequence[dict[str, Any]], seconds: float) -> Exported:
    return Exported(
        path=written.path,
        nbytes=written.nbytes,
        sha256=written.sha256,
        tensors=written.tensors,
        type=written.type,
        architecture=written.architecture,
        patches=tuple(f"{entry['name']} {entry['version']}" for entry in patches),
        notes=written.notes,
        seconds=seconds,
        dry_run=written.dry_run,
    )


def _check_target(target: Path) -> None:
    if len(os.fsencode(target.name)) > MAX_NAME:
        raise OutputError(
            f"the name {target.name[:40]}... is too long for a file system", advice="Choose a shorter one with -o."
        )
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already")
    if not target.absolute().parent.is_dir():
        raise OutputError(f"there is no directory {target.absolute().parent}")


def _fingerprint(checkpoint: Checkpoint, place: Place) -> list[Any]:
    """Changes when something is written to the model."""
    states = [file.stat() for file in checkpoint.files]
    return [*((state.st_ino, state.st_size, state.st_mtime_ns) for state in states), read_ledger(place.ledger).transaction]


@contextmanager
def _source(
    checkpoint: Checkpoint,
    place: Place,
    pack: Pack | None,
    strength: float,
    target: Path,
    *,
    whole: bool,
    dry_run: bool,
    on_event: OnEvent,
) -> Iterator[tuple[Checkpoint, list[dict[str, Any]]]]:
    """(what to export, the packs that it holds): the model itself, a view of it as patched, or a patched copy for the while.

    A copy is needed for a converter that reads files itself (`whole`), and where packs have to be undone first.
    """
    applied = read_ledger(place.ledger).applied
    steps = plan_work(place, read_ledger(place.ledger), pack, strength).steps if pack is not None else ()
    if pack is None or not steps:
        yield checkpoint, _listed(applied)
        return
    gone = {step.link for step in steps if step.do is Do.UNDO} - {step.link for step in steps if step.do is Do.REDO}
    manifest = pack.manifest
    own = {"name": manifest.name, "version": manifest.version, "pack_id": nest.pack_id(pack), "strength": strength}
    patches = [*_listed(entry for entry in applied if entry.link not in gone), own]
    if not whole and {step.do for step in steps} <= {Do.CHECK, Do.APPLY}:
        yield merged_view(pack, checkpoint, strength), patches
        return
    with scratch(target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp"), PATCHED) as copy:
        if dry_run:
            apply(checkpoint.path, pack, copy, strength=strength, dry_run=True)
            yield checkpoint, patches
            return
        copy.mkdir()
        with claimed(copy):
            done = apply(checkpoint.path, pack, copy / checkpoint.path.name, strength=strength, on_event=on_event)
            yield checkpoint.reopen(done.output), patches


def _listed(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    return [
        {"name": entry.name, "version": entry.version, "pack_id": entry.pack_id, "strength": entry.strength}
        for entry in entries
    ]
