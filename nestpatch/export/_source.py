"""What an export starts from: a model as it is, or as it would be with a pack merged, and the record of the packs in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch import __version__
from nestpatch.errors import BaseMismatchError, BusyError, UnsupportedModelError
from nestpatch.events import OnEvent
from nestpatch.export._merged import merged_view
from nestpatch.files.scratch import PATCHED, claimed, scratch
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, row_blocks
from nestpatch.formats.provenance import PATCHES, VERSION, patches_json
from nestpatch.gate import Proven
from nestpatch.pack import Pack, TensorDelta, now
from nestpatch.patcher.apply import apply
from nestpatch.patcher.chain import Do
from nestpatch.patcher.held import look, missing
from nestpatch.patcher.kept import load_packs
from nestpatch.patcher.ledger import Entry, Ledger, TensorRecord, read_ledger
from nestpatch.patcher.merge import rows_of
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import Place, place_of
from nestpatch.patcher.steps import Judge, plan_work
from nestpatch.signing.trust import load_policy

RECORD = "nestpatch.record"
"""Metadata of exported safetensors files: JSON, the ledger's entries with the digests of rows before and after."""


@dataclass(frozen=True, eq=False)
class Source:
    """What is exported."""

    checkpoint: Checkpoint
    entries: tuple[Entry, ...]
    """The packs that it holds, bottom first."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.label for entry in self.entries)

    def keys(self) -> dict[str, str]:
        """What the exported file says of its packs; nothing where it has none."""
        listed = [
            {field: getattr(entry, field) for field in ("name", "version", "pack_id", "strength")} for entry in self.entries
        ]
        return {PATCHES: patches_json(listed)} if listed else {}

    def record(self) -> dict[str, str]:
        """The same with all that the ledger knows, for files that have room for it."""
        entries = [asdict(entry) for entry in self.entries]
        return {VERSION: __version__, **self.keys(), **({RECORD: nest.canonical_json(entries)} if entries else {})}


@dataclass(frozen=True, eq=False)
class Wanted:
    """The model and the patch of an export, opened and checked."""

    checkpoint: Checkpoint
    place: Place
    proven: Proven | None
    strength: float

    @property
    def pack(self) -> Pack | None:
        return self.proven.pack if self.proven is not None else None

    @property
    def fingerprint(self) -> list[Any]:
        """Changes when something is written to the model."""
        states = [file.stat() for file in self.checkpoint.files]
        transaction = read_ledger(self.place).transaction
        return [*((state.st_ino, state.st_size, state.st_mtime_ns) for state in states), transaction]

    def default_output(self, suffix: str, *more: str) -> Path:
        """Beside the model, named after it, the patch and what else there is to say."""
        place = Path(os.path.abspath(self.checkpoint.path))
        stem = place.name if place.is_dir() else place.stem
        patch = [self.pack.manifest.name, self.pack.manifest.version] if self.pack is not None else []
        return place.with_name("-".join([stem, *patch, *more]) + suffix)


def open_wanted(model: str | Path, patch: Proven | None, strength: float) -> Wanted:
    """Opens the model for a patch that passed the gate.

    Raises CheckpointError, DataError; UnsupportedModelError for a model that was converted already.
    """
    check_strength(strength)
    checkpoint, place = open_model(model)
    if checkpoint.converted:
        raise UnsupportedModelError(
            f"{model} was converted already: exports start from the safetensors model",
            advice="Give the safetensors model. A converted file is patched as it is: nestpatch apply FILE PATCH",
        )
    return Wanted(checkpoint, place, patch, strength)


def require_unchanged(wanted: Wanted, before: list[Any]) -> None:
    """Raises BusyError when something was written to the model since its fingerprint was `before`."""
    if wanted.fingerprint != before:
        raise BusyError(f"{wanted.checkpoint.path} was changed while it was exported")


@contextmanager
def source_of(
    wanted: Wanted, target: Path, *, whole: bool = False, dry_run: bool = False, on_event: OnEvent
) -> Iterator[Source]:
    """The model itself, a view of it as patched, or a patched copy beside the target for the while.

    A copy is needed for a converter that reads files itself (`whole`), and where packs have to be undone first.

    Raises BaseMismatchError, ChainError, PackContentError.
    """
    checkpoint, place, proven, strength = wanted.checkpoint, wanted.place, wanted.proven, wanted.strength
    judge = Judge(load_policy(), checkpoint.path)
    ledger = _confirmed(checkpoint, place, judge)
    steps = plan_work(place, ledger, proven.pack, strength, judge, proven.origin).steps if proven is not None else ()
    if proven is None or not steps:
        yield Source(checkpoint, ledger.applied)
        return
    pack = proven.pack
    gone = {step.link for step in steps if step.do is Do.UNDO} - {step.link for step in steps if step.do is Do.REDO}
    kept = tuple(entry for entry in ledger.applied if entry.link not in gone)
    if not whole and {step.do for step in steps} <= {Do.CHECK, Do.APPLY}:
        view = merged_view(pack, checkpoint, strength)
        tensors = {delta.name: _record(delta, checkpoint, view) for delta in pack} if not dry_run else {}
        yield Source(view, (*kept, _entry(proven, strength, tensors)))
        return
    with scratch(target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp"), PATCHED) as copy:
        if dry_run:
            apply(checkpoint.path, proven, copy, strength=strength, dry_run=True)
            yield Source(checkpoint, (*kept, _entry(proven, strength, {})))
            return
        with claimed(copy, directory=True):
            done = apply(checkpoint.path, proven, copy / checkpoint.path.name, strength=strength, on_event=on_event)
            yield Source(checkpoint.reopen(done.output), read_ledger(place_of(done.output)).applied)


def _confirmed(checkpoint: Checkpoint, place: Place, judge: Judge) -> Ledger:
    """The ledger of a model, whose rows hold what it says: an export passes it on, but no claims about who signed what.

    Raises BaseMismatchError, UndoError; SignatureError for a pack that came with the model and that nobody answers for.
    """
    ledger = read_ledger(place)
    gone = missing(look(checkpoint, place, ledger.applied, load_packs(place, ledger.applied)))
    if lost := [entry.label for entry in ledger.applied if entry.pack_id in gone]:
        raise BaseMismatchError(
            f"the ledger of {checkpoint.path} names {', '.join(lost)}, and the rows do not hold that",
            advice="Put the pack back (nestpatch apply MODEL PATCH --in-place), or take it off (nestpatch revert MODEL).",
        )
    return replace(ledger, applied=tuple(_vouched(entry, place, judge) for entry in ledger.applied))


def _vouched(entry: Entry, place: Place, judge: Judge) -> Entry:
    """With the signers that were checked, where the entry came with the model."""
    return replace(entry, signers=judge.require(place, entry.pack_id).signers, roots=()) if entry.foreign else entry


def _entry(proven: Proven, strength: float, tensors: dict[str, TensorRecord]) -> Entry:
    """As the ledger would have it, but with no transaction: there is nothing beside the file to undo it by."""
    manifest = proven.pack.manifest
    return Entry(
        pack_id=proven.pack_id,
        name=manifest.name,
        version=manifest.version,
        strength=strength,
        when=now(),
        tool=f"nestpatch {__version__}",
        transaction="",
        tensors=tensors,
        supersedes=manifest.supersedes,
        requires=manifest.requires,
        signers=proven.origin.signers,
    )


def _record(delta: TensorDelta, before: Checkpoint, after: Checkpoint) -> TensorRecord:
    digests: Sequence[Any] = (sha256(), sha256())
    for part in row_blocks(delta.neurons, before.info(delta.name).row_bytes):
        for digest, checkpoint in zip(digests, (before, after), strict=True):
            digest.update(checkpoint.read_rows(delta.name, rows_of(delta, part)).tobytes())
    return TensorRecord(delta.neurons, *(digest.hexdigest() for digest in digests))
