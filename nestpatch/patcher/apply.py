"""The verb `apply`: merging a pack into a copy of a model."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nestpatch.errors import BusyError, ChainError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import sync_file, sync_tree
from nestpatch.files.flushing import flushing
from nestpatch.files.hashing import seal
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import PackLike, Trust
from nestpatch.pack import Pack
from nestpatch.patcher._lock import kept_from_writers
from nestpatch.patcher._request import request
from nestpatch.patcher._transaction import Transaction
from nestpatch.patcher.chain import Allowed
from nestpatch.patcher.copies import (
    companions_of,
    copy_model,
    copy_state,
    fingerprint,
    new_model,
    require_place,
    root_of,
    state_dir_of_copy,
    sweep_unfinished,
)
from nestpatch.patcher.ledger import Ledger, read_ledger
from nestpatch.patcher.recovery import open_model, require_settled
from nestpatch.patcher.registry import record
from nestpatch.patcher.state_dir import StateDir, state_dir_of
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class WrittenFile:
    """One weight file of the output."""

    path: Path
    nbytes: int
    sha256: str | None
    """None unless `digest` was set."""

    def as_json(self) -> dict[str, Any]:
        """The file for `--json`."""
        return {"path": str(self.path), "bytes": self.nbytes, "sha256": self.sha256}


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
    """Smallest share of the pack's change that is left after rounding in any tensor; None where no rows are quantized."""
    dry_run: bool = False

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "pack": self.pack,
            "pack_id": self.pack_id,
            "strength": self.strength,
            "output": str(self.output),
            "files": [file.as_json() for file in self.files],
            "left_out": list(self.left_out),
            "tensors": self.tensors,
            "rows": self.rows,
            "changed_bytes": self.row_bytes,
            "retention": self.retention,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


def _default_output(model: Path, pack: Pack) -> Path:
    """Where `apply` writes when no output is given: beside the model, named after the pack.

    Args:
        model: The model's file or directory.
        pack: The pack.

    Returns:
        An absolute path, e.g. `<model>-no-harm-1.0.0`.
    """
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
    listed: bool = True,
    on_event: OnEvent = ignore,
) -> Applied:
    """Merges a pack into a copy of a model.

    The base is checked on the touched rows first. Untouched bytes are copied as they are; the result is checked against the
    digests in the pack before it gets its name. The copy carries a ledger and undo records, so it can be verified and reverted.

    Args:
        model: A safetensors file, a directory (sharded or not), a GGUF file or an ONNX model. It is not changed.
        pack: A file, a channel (hub://owner/name[@VERSION]), a Pack, or a Proven that passed the gate.
        output: Where to write the copy; None means beside the model, named after the pack.
        policy: Whose signatures count; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed. Wrong signatures are never accepted.
        strength: Multiplies the pack's deltas, over 0 and at most 1.5.
        allow_overlap: Adds the pack to others that change the same rows.
        allow_downgrade: Replaces a newer version of the pack.
        allow_base_mismatch: Accepts a model that is not the pack's base. The ledger records it.
        allow_other_publisher: Replaces a pack that another publisher signed.
        base: The float model, to make quantized rows from exactly.
        dither: Adds noise before quantized rows are rounded, so that small changes survive on average.
        hard_link: Shards without touched rows share their file with the model.
        digest: Takes the SHA-256 of every written weight file, which takes longer than copying it.
        sync: Waits until the copy is on the disk; False leaves that to the system, as `cp` does.
        dry_run: Checks everything and writes nothing.
        listed: Whether `patched_models` lists the copy.
        on_event: Receives progress.

    Returns:
        What was written, or would be.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack is broken, or its merge is not what it promises.
        CheckpointError: The model cannot be read, or is not the pack's base.
        ChainError: The pack does not go together with what is applied, or is applied already.
        StateError: Something is wrong with what is kept beside the model.
        OutputError: The output cannot be written, or another process is writing the model.
    """
    began = time.perf_counter()
    requested = request(
        model,
        pack,
        strength,
        Allowed(allow_overlap, allow_downgrade, allow_other_publisher),
        policy=policy,
        trust=trust,
        allow_unsigned=allow_unsigned,
        base=base,
        dither=dither,
        on_event=on_event,
    )
    checkpoint, state_dir = open_model(model)
    target = Path(output) if output is not None else _default_output(root_of(checkpoint), requested.proven.pack)
    if not dry_run:
        sweep_unfinished(target)
    require_place(checkpoint, target)
    label = requested.proven.pack.label
    with kept_from_writers(state_dir):
        require_settled(state_dir, model)  # again: a writer may have died since
        ledger = read_ledger(state_dir)
        planned = requested.plan(checkpoint, state_dir, ledger)
        if not planned.steps:
            raise ChainError(f"{label} is applied to {model} already", advice="Nothing to do: copy the model as it is.")
        change = Transaction(state_dir, checkpoint, planned, allow_base_mismatch, on_event, quantized=requested.quantized)
        change.check_first()
        files: tuple[WrittenFile, ...] = ()
        if not dry_run:
            ledger, files = _write_copy(change, ledger, target, hard_link=hard_link, digest=digest, sync=sync)
    if files and listed:
        record(target)
    return Applied(
        pack=label,
        pack_id=requested.proven.pack_id,
        strength=strength,
        output=target,
        files=files,
        left_out=companions_of(checkpoint)[1],
        **asdict(planned.size(checkpoint)),
        seconds=time.perf_counter() - began,
        retention=ledger.applied[-1].retention if files else None,
        dry_run=dry_run,
    )


def _write_copy(
    change: Transaction, ledger: Ledger, target: Path, *, hard_link: bool, digest: bool, sync: bool
) -> tuple[Ledger, tuple[WrittenFile, ...]]:
    """Copies the model of a change and carries the change out in the copy, which appears when all is done."""
    checkpoint, on_event = change.checkpoint, change.on_event
    touched = {file for name in change.planned.tensor_names for file in checkpoint.info(name).files}
    linked = frozenset(checkpoint.files) - touched if hard_link else frozenset()
    before = fingerprint(checkpoint.files, change.state_dir)
    with new_model(target, directory=root_of(checkpoint).is_dir()) as sibling, ExitStack() as threads:
        # The disk writes the copy while rows are merged into it.
        flush = threads.enter_context(flushing()) if sync else None
        copy_model(checkpoint, sibling, linked, on_event, flush)
        # Before the rows are read: a half-written change in them would look like another base.
        _require_unchanged(checkpoint, change.state_dir, before)
        copy = checkpoint.reopen(sibling)
        own = state_dir_of(copy.path)
        final = state_dir_of_copy(own, sibling, target)
        copy_state(change.state_dir, own, ledger, final)
        # No journal: the copy is thrown away when anything fails.
        ledger = replace(change, state_dir=own, checkpoint=copy, journaled=False, final=final).run(ledger)
        files = tuple(_seal(file, sibling, target, on_event, digest=digest, sync=sync) for file in copy.files)
        if sync:
            sync_tree(sibling if sibling.is_dir() else own.folder)
        _require_unchanged(checkpoint, change.state_dir, before)
    return ledger, files


def _require_unchanged(checkpoint: Checkpoint, state_dir: StateDir, before: tuple[Any, ...]) -> None:
    if fingerprint(checkpoint.files, state_dir) != before:
        raise BusyError(f"{checkpoint.path} was changed while it was copied")


def _seal(file: Path, sibling: Path, target: Path, on_event: OnEvent, *, digest: bool, sync: bool) -> WrittenFile:
    """Syncs one written file and takes its digest; reports it under its final name."""
    found = None
    if digest:
        on_event(Event("digest", note=file.name))
        found = seal(file, sync=sync)[1]
    elif sync:
        sync_file(file)
    final = target if file == sibling else target / file.name
    return WrittenFile(final, file.stat().st_size, found)
