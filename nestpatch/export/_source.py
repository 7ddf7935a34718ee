"""The input of an export: a model as it is, or a view of it with a pack merged, and the record of the packs in it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, BusyError, OutputError, PackContentError, UnsupportedModelError
from nestpatch.events import OnEvent
from nestpatch.export._safetensors_writer import write_float_model
from nestpatch.files.atomic import check_output
from nestpatch.files.scratch import PATCHED, claimed, scratch
from nestpatch.formats.checkpoint import Checkpoint, ComputedCheckpoint, IntArray, TensorInfo
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.hf.model import AUTO, FloatModel
from nestpatch.formats.manifest import canonical_json
from nestpatch.formats.provenance import PACKS, RECORD, VERSION, read_packs, row_ranges
from nestpatch.formats.safetensors import SafetensorsCheckpoint
from nestpatch.gate import Proven
from nestpatch.pack import Pack, creation_time
from nestpatch.patcher.apply import apply
from nestpatch.patcher.chain import Action
from nestpatch.patcher.copies import fingerprint, sweep_unfinished
from nestpatch.patcher.findings import State
from nestpatch.patcher.held import look, missing
from nestpatch.patcher.kept import load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, TensorRecord, read_ledger
from nestpatch.patcher.merge import QuantizedMerge
from nestpatch.patcher.plan import Plan, check_strength, make_plan, merged_blocks
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import StateDir, state_dir_of
from nestpatch.patcher.steps import Judge, plan_from_ledger
from nestpatch.rows import Rows, digest, merge
from nestpatch.signing.store import load_policy


@dataclass(frozen=True, eq=False)
class Request:
    """The model and the pack of an export, opened and checked."""

    checkpoint: Checkpoint
    state_dir: StateDir
    proven: Proven | None
    strength: float
    fingerprint: tuple[Any, ...]
    """Of the model's files when they were opened."""

    @property
    def gguf(self) -> bool:
        """Whether the model is a GGUF file, whose weights are dequantized."""
        return isinstance(self.checkpoint, GgufCheckpoint)

    @property
    def pack(self) -> Pack | None:
        return self.proven.pack if self.proven is not None else None

    def beside(self, suffix: str, *parts: str) -> Path:
        """The default output: beside the model, named after it and the pack.

        Args:
            suffix: The end of the name.
            parts: What the name says besides.

        Returns:
            The path.
        """
        path = Path(os.path.abspath(self.checkpoint.path))
        stem = path.name if path.is_dir() else path.stem
        pack = [self.pack.manifest.name, self.pack.manifest.version] if self.pack is not None else []
        return path.with_name("-".join([stem, *pack, *parts]) + suffix)

    def require_unchanged(self) -> None:
        """Checks that nothing was written to the model since it was opened.

        Raises:
            BusyError: Something was.
        """
        if fingerprint(self.checkpoint.files, self.state_dir) != self.fingerprint:
            raise BusyError(f"{self.checkpoint.path} was changed while it was exported")


def open_request(model: str | Path, pack: Proven | None, strength: float, *, gguf: bool = False) -> Request:
    """Opens the model for a pack that passed the gate.

    Args:
        model: The model.
        pack: The pack; None for the model alone.
        strength: How much of the pack's deltas the export contains.
        gguf: Whether the export reads GGUF files too, without a pack.

    Returns:
        The request.

    Raises:
        CheckpointError: There is no sound model at the path.
        DataError: The strength is impossible.
        UnsupportedModelError: The model was converted already.
    """
    check_strength(strength)
    checkpoint, state_dir = open_model(model)
    is_gguf = isinstance(checkpoint, GgufCheckpoint)
    if is_gguf and gguf and pack is not None:
        raise UnsupportedModelError(
            f"{pack.pack.label} is not merged while {model} is dequantized",
            advice=f"First make a patched file, then export that: nestpatch apply {model} PACK -o PATCHED.gguf",
        )
    if checkpoint.converted and not (is_gguf and gguf):
        ways = "Give the safetensors model, or patch the converted file itself: nestpatch apply FILE PACK"
        floats = ". A float model can be made of a GGUF file: nestpatch export FILE --to safetensors" if is_gguf else ""
        raise UnsupportedModelError(
            f"{model} was converted already; exports start from the safetensors model", advice=ways + floats
        )
    return Request(checkpoint, state_dir, pack, strength, fingerprint(checkpoint.files, state_dir))


def free_place(output: str | Path, *, dry_run: bool) -> Path:
    """Removes what killed processes left of an output, and checks that it can be written.

    Args:
        output: The output's path.
        dry_run: Whether to check only.

    Returns:
        The path.

    Raises:
        OutputError: It exists already, or cannot be written.
    """
    target = Path(output)
    if not dry_run:
        sweep_unfinished(target)
    check_output(target)
    return target


@dataclass(frozen=True, eq=False)
class ExportSource:
    """What is exported."""

    checkpoint: Checkpoint
    entries: tuple[LedgerEntry, ...]
    """The packs in it, bottom first."""
    packs: Mapping[str, Pack]
    """The same by id."""
    claimed: tuple[dict[str, Any], ...] = ()
    """What the metadata of a GGUF file says of the packs in it, where no ledger does."""

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(entry.label for entry in self.entries)

    def keys(self) -> dict[str, str]:
        """The metadata that lists the packs; empty where there are none."""
        fields = ("name", "version", "pack_id", "strength")
        listed = [{field: getattr(entry, field) for field in fields} for entry in self.entries]
        return {PACKS: canonical_json(listed or list(self.claimed))} if listed or self.claimed else {}

    def record(self) -> dict[str, str]:
        """The same with all fields of the ledger, for formats that have room for them."""
        entries = [asdict(entry) for entry in self.entries]
        for entry in entries:
            for delta in self.packs[entry["pack_id"]] if entry["tensors"] else ():
                entry["tensors"][delta.name]["row_numbers"] = row_ranges(delta.rows)
        return {VERSION: __version__, **self.keys(), **({RECORD: canonical_json(entries)} if entries else {})}


@contextmanager
def source_of(
    request: Request, target: Path, *, whole: bool = False, kind: str = AUTO, dry_run: bool = False, on_event: OnEvent
) -> Iterator[ExportSource]:
    """The model itself, a view of it with the pack merged, or a temporary patched copy beside the target.

    A copy is needed for a converter that reads files itself, and where packs must be undone first. A GGUF file becomes a view
    of its dequantized weights, or a temporary directory with them.

    Args:
        request: The model and the pack.
        target: The output.
        whole: Whether a converter reads the files itself.
        kind: The type of weights that are dequantized.
        dry_run: Whether to check only.
        on_event: Receives the steps.

    Yields:
        The source; a copy is removed afterwards.

    Raises:
        BaseMismatchError: The model is not the pack's base.
        ChainError: The packs in the model cannot be undone, or exclude this one.
        PackContentError: The merge leaves the range of a dtype, or does not give the result in the pack.
    """
    checkpoint, proven, strength = request.checkpoint, request.proven, request.strength
    judge = Judge(load_policy(), checkpoint.path)
    ledger = _confirmed(checkpoint, request.state_dir, judge)
    packs = dict(load_packs(request.state_dir, ledger.applied))
    if isinstance(checkpoint, GgufCheckpoint):
        with _floats(FloatModel(checkpoint, kind), target, whole and not dry_run, on_event) as floats:
            yield ExportSource(floats, ledger.applied, packs, tuple(read_packs(checkpoint.metadata())))
        return
    if proven is None:
        yield ExportSource(checkpoint, ledger.applied, packs)
        return
    steps = plan_from_ledger(request.state_dir, ledger, proven.pack, strength, judge, proven.origin).steps
    if not steps:  # the pack is applied already
        yield ExportSource(checkpoint, ledger.applied, packs)
        return
    packs[proven.pack_id] = proven.pack
    gone = {step.link for step in steps if step.action is Action.UNDO} - {
        step.link for step in steps if step.action is Action.REDO
    }
    kept = tuple(entry for entry in ledger.applied if entry.link not in gone)
    if not whole and {step.action for step in steps} <= {Action.CHECK, Action.APPLY}:
        view = merged_view(proven.pack, checkpoint, strength)
        tensors = {delta.name: _record(delta, checkpoint, view) for delta in proven.pack} if not dry_run else {}
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


@contextmanager
def _floats(model: FloatModel, target: Path, written: bool, on_event: OnEvent) -> Iterator[Checkpoint]:
    """A dequantized GGUF model: the view, or a temporary directory that holds it."""
    if not written:
        yield model
        return
    with scratch(target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp"), PATCHED) as copy, claimed(copy, directory=True):
        write_float_model(model, copy, {}, on_event)
        yield SafetensorsCheckpoint(copy)


def _confirmed(checkpoint: Checkpoint, state_dir: StateDir, judge: Judge) -> Ledger:
    """The ledger of a model after its rows were checked; signers of foreign entries are those that were verified here.

    Raises BaseMismatchError, UndoError; SignatureError for a pack that came with the model without a trusted signature.
    """
    ledger = read_ledger(state_dir)
    gone = missing(look(checkpoint, state_dir, ledger.applied, load_packs(state_dir, ledger.applied)))
    if lost := [entry.label for entry in ledger.applied if entry.pack_id in gone]:
        raise BaseMismatchError(
            f"the ledger of {checkpoint.path} lists {', '.join(lost)}, but the rows of the model do not contain it",
            advice="Put the pack back (nestpatch apply MODEL PACK --in-place), or remove it (nestpatch revert MODEL).",
        )
    entries = (
        replace(entry, signers=judge.require(state_dir, entry.pack_id).signers, roots=()) if entry.foreign else entry
        for entry in ledger.applied
    )
    return replace(ledger, applied=tuple(entries))


def _entry(proven: Proven, strength: float, tensors: dict[str, TensorRecord]) -> LedgerEntry:
    """A ledger entry without a transaction: an exported file has no undo record."""
    manifest = proven.pack.manifest
    return LedgerEntry(
        pack_id=proven.pack_id,
        name=manifest.name,
        version=manifest.version,
        strength=strength,
        when=creation_time(),
        tool=f"nestpatch {__version__}",
        transaction="",
        tensors=tensors,
        supersedes=manifest.supersedes,
        requires=manifest.requires,
        signers=proven.origin.signers,
    )


def _record(delta: TensorDelta, before: Checkpoint, after: Checkpoint) -> TensorRecord:
    digests: Sequence[Any] = (sha256(), sha256())
    for state, checkpoint in zip(digests, (before, after), strict=True):
        for _, rows in checkpoint.iter_rows(delta.name, delta.rows):
            state.update(rows.tobytes())
    return TensorRecord(delta.neurons, *(digest.hexdigest() for digest in digests))


class MergedCheckpoint(ComputedCheckpoint):
    """A read-only Checkpoint of the patched model; the files on disk stay the base."""

    converted = False
    computed = "patched"

    def __init__(self, plan: Plan, base: Checkpoint) -> None:
        self.path: Path = base.path
        self.files: tuple[Path, ...] = base.files
        self._base = base
        self._strength = plan.strength
        self._deltas = {tensor.info.name: tensor.delta for tensor in plan.tensors}

    def reopen(self, path: Path) -> Checkpoint:
        """A view cannot be opened elsewhere.

        Args:
            path: Ignored.

        Raises:
            OutputError: Always.
        """
        raise OutputError(f"{self.path} is patched in memory only: there is nothing at {path}")

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""
        return self._base.tensors()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self._base.has(name)

    def info(self, name: str) -> TensorInfo:
        """As in the base: a merge changes no shape and no dtype. The file of a patched tensor contains the base's rows."""
        return self._base.info(name)

    def extent(self, name: str) -> TensorInfo | None:
        """Where the bytes of an untouched tensor are stored; None for a patched one."""
        if name in self._deltas:
            return None
        return self._base.extent(name)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads sorted rows, merged where the pack touches them.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features] in the stored dtype.

        Raises:
            PackContentError: A sum leaves the dtype's range.
        """
        found = self._base.read_rows(name, rows)
        delta = self._deltas.get(name)
        if delta is None:
            return found
        places = np.searchsorted(delta.rows, rows)
        places[places == delta.neurons] = 0  # rows after the last touched one: the comparison below is false for them
        touched = delta.rows[places] == rows
        if touched.any():
            change = delta.dense_at(places[touched])
            found[touched] = merge(found[touched], change, self._strength)
        return found

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks."""
        if name not in self._deltas:
            yield from self._base.read_all(name)
            return
        for _, rows in self.iter_rows(name, np.arange(self.info(name).rows)):
            yield rows.tobytes()

    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the base's files."""
        return self._base.metadata()


def merged_view(pack: Pack, checkpoint: Checkpoint, strength: float = 1.0) -> MergedCheckpoint:
    """Checks that a checkpoint is a pack's base, and that the merge gives the result in the pack.

    Args:
        pack: The pack.
        checkpoint: The model.
        strength: How much of the deltas to add.

    Returns:
        The model with the pack merged, computed on reading.

    Raises:
        BaseMismatchError: The checkpoint is not the pack's base.
        PackContentError: The merge leaves the range of a dtype, or does not give the result in the pack.
    """
    plan = make_plan(pack, checkpoint, strength)
    for tensor in plan.tensors:
        name = tensor.info.name
        if tensor.state is not State.BASE or strength != 1.0:
            continue
        merged = merged_blocks(pack, [tensor.delta], strength, checkpoint, QuantizedMerge())
        if digest(block.new for block, _ in merged) != pack.manifest.result[name]:
            raise PackContentError(f"{name}: the merged rows are not those that {pack.label} promises")
    return MergedCheckpoint(plan, checkpoint)
