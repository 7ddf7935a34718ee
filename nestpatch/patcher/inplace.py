"""The verbs that change a model where it is: apply and revert. Each is one transaction under the model's lock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nestpatch.errors import ChainError, InPlaceError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import PackLike, Trust, policy_of
from nestpatch.patcher._lock import locked, tidy
from nestpatch.patcher._request import request
from nestpatch.patcher._transaction import Transaction
from nestpatch.patcher.chain import Allowed
from nestpatch.patcher.held import look, missing, require_proven
from nestpatch.patcher.kept import keep, load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger, write_ledger
from nestpatch.patcher.merge import quantized_merge
from nestpatch.patcher.recovery import finish_or_roll_back, require_settled, require_writable
from nestpatch.patcher.registry import record
from nestpatch.patcher.state_dir import StateDir, require_own, state_dir_of
from nestpatch.patcher.steps import Judge, plan_revert
from nestpatch.signing.trust import Policy
from nestpatch.values import dataclass


@dataclass(frozen=True)
class Changed:
    """What an in-place command did, or with `dry_run` would do."""

    model: Path
    steps: tuple[str, ...]
    """In order, for people; empty when there was nothing to do."""
    entries: tuple[LedgerEntry, ...]
    """What is applied now, bottom first; the rows were compared."""
    tensors: int
    rows: int
    row_bytes: int
    """Bytes of the model that were written, each as often as a step wrote it."""
    seconds: float
    retention: float | None = None
    """Smallest share of the pack's change that is left after rounding in any tensor; None where no rows are quantized."""
    dry_run: bool = False
    strength: float = 1.0
    """Of the pack that was applied."""

    @property
    def applied(self) -> tuple[str, ...]:
        """The labels of `entries`."""
        return tuple(entry.label for entry in self.entries)

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the pack that was applied and its strength.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "model": str(self.model),
            "steps": list(self.steps),
            "applied": [entry.as_json() for entry in self.entries],
            "tensors": self.tensors,
            "rows": self.rows,
            "changed_bytes": self.row_bytes,
            "retention": self.retention,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True, eq=False)
class _Opened:
    """A model that is about to change, or with a dry run is only read."""

    checkpoint: Checkpoint
    state_dir: StateDir
    ledger: Ledger


@contextmanager
def _writing(path: str | Path, policy: Policy, *, dry_run: bool = False, listed: bool = True) -> Iterator[_Opened]:
    """Opens a model under its lock and ends an interrupted change first. A dry run takes no lock and writes nothing."""
    checkpoint, state_dir = open_checkpoint(path), state_dir_of(path)
    require_own(path)
    if dry_run:
        require_settled(state_dir, path)
        yield _Opened(checkpoint, state_dir, read_ledger(state_dir))
        return
    fresh = not state_dir.folder.exists()
    with locked(state_dir):
        finish_or_roll_back(state_dir, checkpoint, policy=policy, model=path)
        try:
            yield _Opened(checkpoint, state_dir, read_ledger(state_dir))
        except OSError as error:
            raise InPlaceError(f"cannot change the model: {error.strerror or error} ({error.filename})") from error
        finally:
            if fresh and not state_dir.ledger.exists() and not state_dir.journal.exists():
                # Nothing was changed: leave the model's folder as it was.
                tidy(state_dir)
    if listed:
        record(checkpoint.path)


def apply_in_place(
    model: str | Path,
    pack: PackLike,
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
    detach: bool = False,
    dry_run: bool = False,
    listed: bool = True,
    on_event: OnEvent = ignore,
) -> Changed:
    """Merges a pack into a model's own files. Memory does not grow with the model.

    The pack passes the gate first (nestpatch/gate.py). An older version of the same pack is replaced in the same transaction;
    packs of other names stack. After a killed process, the next command that writes leaves the model as before the change or as
    after it. A pack that is applied already, but whose rows were replaced by those of the base since, is put back.

    Args:
        model: A safetensors file, a directory (sharded or not), a GGUF file or an ONNX model.
        pack: A file, a channel (hub://owner/name[@VERSION]), a Pack, or a Proven that passed the gate. A channel is followed
            from then on.
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
        detach: Replaces links with copies first.
        dry_run: Checks everything and writes nothing.
        listed: Whether `patched_models` lists the model.
        on_event: Receives progress.

    Returns:
        What was changed, or would be.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack is broken, or its merge is not what it promises.
        CheckpointError: The model cannot be read, or is not the pack's base.
        ChainError: The pack does not go together with what is applied.
        StateError: Something is wrong with what is kept beside the model.
        InPlaceError: The model's files cannot be written.
        BusyError: Another process is writing the model.
        After any of them the model is as it was.
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
    with _writing(model, requested.judge.policy, dry_run=dry_run, listed=listed) as opened:
        planned = requested.plan(opened.checkpoint, opened.state_dir, opened.ledger)
        change = Transaction(
            opened.state_dir,
            opened.checkpoint,
            planned,
            allow_base_mismatch,
            on_event,
            quantized=requested.quantized,
            detach=detach,
        )
        if not planned.steps and not dry_run:
            keep(opened.state_dir, requested.proven.pack, requested.proven.pack_id, requested.proven.origin)
        return replace(_carry_out(change, opened.ledger, began, dry_run=dry_run), strength=strength)


def revert(
    model: str | Path,
    to: str = "base",
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    base: str | Path | Checkpoint | None = None,
    dither: bool = False,
    only: str | None = None,
    dry_run: bool = False,
    listed: bool = True,
    on_event: OnEvent = ignore,
) -> Changed:
    """Undoes what was applied, bit for bit: everything, or back to an earlier version of the applied pack.

    An earlier version is applied again after its kept signatures were judged like those of a file. Undo records that came with
    the model are used only where the packs' own digests prove that they lead to the base. A model that is taken back to its
    base follows no channel any more.

    Args:
        model: The patched model.
        to: "base", or the version to go back to.
        policy: Whose signatures count; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Uses kept packs that too few trusted keys have signed.
        base: The float model, to make quantized rows from exactly.
        dither: Adds noise before quantized rows are rounded.
        only: The id of the one applied pack to undo; the model keeps following its channels.
        dry_run: Checks everything and writes nothing.
        listed: Whether `patched_models` lists the model.
        on_event: Receives progress.

    Returns:
        What was changed, or would be.

    Raises:
        ChainError: There is nothing to go back to.
        UndoError: An undo record is missing, broken, or not proven to lead to the base.
        SignatureError: A kept pack is not signed as the policy asks.
        BaseMismatchError: Something else changed the rows since.
        InPlaceError: The model's files cannot be written.
        BusyError: Another process is writing the model.
        After any of them the model is as it was.
    """
    began = time.perf_counter()
    rules = policy_of(policy, trust)
    judge, quantized = Judge(rules, model, allow_unsigned), quantized_merge(base, dither=dither)
    with _writing(model, rules, dry_run=dry_run, listed=listed) as opened:
        ledger, state_dir = opened.ledger, opened.state_dir
        if not ledger.applied and not ledger.follows:
            raise ChainError(f"nothing is applied to {model}: its ledger names no pack")
        packs = load_packs(state_dir, ledger.applied)
        found = look(opened.checkpoint, state_dir, ledger.applied, packs, quantized.base, down_to_base=True)
        require_proven(found)
        gone = missing(found)
        lost = [entry for entry in ledger.applied if entry.pack_id in gone]
        planned = plan_revert(state_dir, ledger, packs, to, judge, only, lost)
        left = replace(ledger, follows=(), offered=()) if to == "base" and only is None else ledger
        change = Transaction(
            state_dir, opened.checkpoint, replace(planned, missing=gone), on_event=on_event, quantized=quantized
        )
        if left != ledger and not planned.steps and not dry_run:
            write_ledger(state_dir, left)
        return _carry_out(change, left, began, dry_run=dry_run)


def follow_channel(model: str | Path, channel: str, policy: Policy) -> None:
    """Writes into the ledger of a model that its updates come from a channel.

    Args:
        model: The model.
        channel: Address of the channel.
        policy: Whose signatures confirm the journal of an interrupted change.

    Raises:
        InPlaceError: The ledger cannot be written.
        BusyError: Another process is writing the model.
        LedgerError: The ledger is broken.
    """
    if channel in read_ledger(state_dir_of(model)).follows:
        return
    with _writing(model, policy) as opened:
        write_ledger(opened.state_dir, opened.ledger.following(channel))


def _carry_out(transaction: Transaction, ledger: Ledger, began: float, *, dry_run: bool) -> Changed:
    checkpoint, planned = transaction.checkpoint, transaction.planned
    if dry_run:
        if not transaction.detach:
            require_writable(checkpoint, sorted(planned.tensor_names))
        transaction.check_first()
    elif planned.steps:
        ledger = transaction.run(ledger)
    elif (followed := ledger.following(planned.origin.channel)) != ledger:
        write_ledger(transaction.state_dir, followed)
    size = planned.size(checkpoint)
    new = [entry.retention for entry in ledger.applied if entry.transaction == ledger.transaction and planned.steps]
    retention = min((retention for retention in new if retention is not None), default=None)
    seconds = time.perf_counter() - began
    return Changed(
        checkpoint.path, planned.labels, ledger.applied, size.tensors, size.rows, size.row_bytes, seconds, retention, dry_run
    )
