"""What an export starts from: a model as it is, or as it would be with a pack merged, and the record of the packs in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
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
from nestpatch.formats.provenance import PACKS, RECORD, VERSION, packs_json, row_ranges
from nestpatch.gate import Proven
from nestpatch.pack import Pack, TensorDelta, now
from nestpatch.patcher.apply import apply
from nestpatch.patcher.chain import Action
from nestpatch.patcher.held import look, missing
from nestpatch.patcher.kept import load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, TensorRecord, read_ledger
from nestpatch.patcher.merge import rows_of
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import StateDir, state_dir_of
from nestpatch.patcher.steps import Judge, plan_from_ledger
from nestpatch.signing.trust import load_policy


@dataclass(frozen=True, eq=False)
class ExportSource:
    """What is exported."""

    checkpoint: Checkpoint
    entries: tuple[LedgerEntry, ...]
    """The packs that it holds, bottom first."""
    packs: Mapping[str, Pack]
    """The same by id."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.label for entry in self.entries)

    def keys(self) -> dict[str, str]:
        """What the exported file says of its packs; nothing where it has none."""
        listed = [
            {field: getattr(entry, field) for field in ("name", "version", "pack_id", "strength")} for entry in self.entries
        ]
        return {PACKS: packs_json(listed)} if listed else {}

    def record(self) -> dict[str, str]:
        """The same with all that the ledger knows, for files that have room for it."""
        entries = [asdict(entry) for entry in self.entries]
        for entry in entries:
            for delta in self.packs[entry["pack_id"]] if entry["tensors"] else ():
                entry["tensors"][delta.name]["row_numbers"] = row_ranges(delta.rows)
        return {VERSION: __version__, **self.keys(), **({RECORD: nest.canonical_json(entries)} if entries else {})}


@dataclass(frozen=True, eq=False)
class Wanted:
    """The model and the patch of an export, opened and checked."""

    checkpoint: Checkpoint
    state_dir: StateDir
    proven: Proven | None
    strength: float

    @property
    def pack(self) -> Pack | None:
        return self.proven.pack if self.proven is not None else None

    @property
    def fingerprint(self) -> list[Any]:
        """Changes when something is written to the model."""
        states = [file.stat() for file in self.checkpoint.files]
        transaction = read_ledger(self.state_dir).transaction
        return [*((state.st_ino, state.st_size, state.st_mtime_ns) for state in states), transaction]

    def default_output(self, suffix: str, *more: str) -> Path:
        """Beside the model, named after it, the patch and what else there is to say."""
        state_dir = Path(os.path.abspath(self.checkpoint.path))
        stem = state_dir.name if state_dir.is_dir() else state_dir.stem
        patch = [self.pack.manifest.name, self.pack.manifest.version] if self.pack is not None else []
        return state_dir.with_name("-".join([stem, *patch, *more]) + suffix)


def open_wanted(model: str | Path, pack: Proven | None, strength: float) -> Wanted:
    """Opens the model for a patch that passed the gate.

    Raises CheckpointError, DataError; UnsupportedModelError for a model that was converted already.
    """
    check_strength(strength)
    checkpoint, state_dir = open_model(model)
    if checkpoint.converted:
        raise UnsupportedModelError(
            f"{model} was converted already: exports start from the safetensors model",
            advice="Give the safetensors model. A converted file is patched as it is: nestpatch apply FILE PATCH",
        )
    return Wanted(checkpoint, state_dir, pack, strength)


def require_unchanged(wanted: Wanted, before: list[Any]) -> None:
    """Raises BusyError when something was written to the model since its fingerprint was `before`."""
    if wanted.fingerprint != before:
        raise BusyError(f"{wanted.checkpoint.path} was changed while it was exported")


@contextmanager
def source_of(
    wanted: Wanted, target: Path, *, whole: bool = False, dry_run: bool = False, on_event: OnEvent
) -> Iterator[ExportSource]:
    """The model itself, a view of it as patched, or a patched copy beside the target for the while.

    A copy is needed for a converter that reads files itself (`whole`), and where packs have to be undone first.

    Raises BaseMismatchError, ChainError, PackContentError.
    """
    checkpoint, state_dir, proven, strength = wanted.checkpoint, wanted.state_dir, wanted.proven, wanted.strength
    judge = Judge(load_policy(), checkpoint.path)
    ledger = _confirmed(checkpoint, state_dir, judge)
    steps = plan_from_ledger(state_dir, ledger, proven.pack, strength, judge, proven.origin).steps if proven is not None else ()
    packs = dict(load_packs(state_dir, ledger.applied))
    if proven is None or not steps:
        yield ExportSource(checkpoint, ledger.applied, packs)
        return
    pack = packs[proven.pack_id] = proven.pack
    gone = {step.link for step in steps if step.action is Action.UNDO} - {
        step.link for step in steps if step.action is Action.REDO
    }
    kept = tuple(entry for entry in ledger.applied if entry.link not in gone)
    if not whole and {step.action for step in steps} <= {Action.CHECK, Action.APPLY}:
        view = merged_view(pack, checkpoint, strength)
        tensors = {delta.name: _record(delta, checkpoint, view) for delta in pack} if not dry_run else {}
        yield ExportSource(view, (*kept, _entry(proven, strength, tensors)), packs)
        return
    with scratch(target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp"), PATCHED) as copy:
        if dry_run:
            apply(checkpoint.path, proven, copy, strength=strength, dry_run=True)
            yield ExportSource(checkpoint, (*kept, _entry(proven, strength, {})), packs)
            return
        with claimed(copy, directory=True):
            place = copy / checkpoint.path.name
            done = apply(checkpoint.path, proven, place, strength=strength, listed=False, on_event=on_event)
            yield ExportSource(checkpoint.reopen(done.output), read_ledger(state_dir_of(done.output)).applied, packs)


def _confirmed(checkpoint: Checkpoint, state_dir: StateDir, judge: Judge) -> Ledger:
    """The ledger of a model, whose rows hold what it says: an export passes it on, but no claims about who signed what.

    Raises BaseMismatchError, UndoError; SignatureError for a pack that came with the model and that nobody answers for.
    """
    ledger = read_ledger(state_dir)
    gone = missing(look(checkpoint, state_dir, ledger.applied, load_packs(state_dir, ledger.applied)))
    if lost := [entry.label for entry in ledger.applied if entry.pack_id in gone]:
        raise BaseMismatchError(
            f"the ledger of {checkpoint.path} names {', '.join(lost)}, and the rows do not hold that",
            advice="Put the pack back (nestpatch apply MODEL PATCH --in-place), or take it off (nestpatch revert MODEL).",
        )
    return replace(ledger, applied=tuple(_vouched(entry, state_dir, judge) for entry in ledger.applied))


def _vouched(entry: LedgerEntry, state_dir: StateDir, judge: Judge) -> LedgerEntry:
    """With the signers that were checked, where the entry came with the model."""
    return replace(entry, signers=judge.require(state_dir, entry.pack_id).signers, roots=()) if entry.foreign else entry


def _entry(proven: Proven, strength: float, tensors: dict[str, TensorRecord]) -> LedgerEntry:
    """As the ledger would have it, but with no transaction: there is nothing beside the file to undo it by."""
    manifest = proven.pack.manifest
    return LedgerEntry(
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
