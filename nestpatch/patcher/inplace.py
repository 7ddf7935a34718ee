"""The verbs that change a model where it is: apply, revert, recover. Each is one transaction under the model's lock."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from nestpatch.errors import ChainError, InPlaceError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats.atomic import new_place
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.gate import Patch, Trust, prove
from nestpatch.patcher.chain import Do
from nestpatch.patcher.ledger import Ledger, read_ledger, write_ledger
from nestpatch.patcher.merging import means_of
from nestpatch.patcher.place import Place, locked, place_of, tidy
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.recovery import recover
from nestpatch.patcher.transaction import Transaction, require_writable
from nestpatch.patcher.work import Work, plan_return, plan_work
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class Changed:
    """What an in-place command did, or with `dry_run` would do."""

    model: Path
    steps: tuple[str, ...]
    """In order, for people; empty when there was nothing to do."""
    applied: tuple[str, ...]
    """What is applied now, bottom first."""
    tensors: int
    rows: int
    row_bytes: int
    """Of the model, written once or more."""
    seconds: float
    gain: float | None = None
    """The smallest share of the pack's change that arrived in a tensor; None where no rows are quantized."""
    dry_run: bool = False


@contextmanager
def _writing(path: str | Path) -> Iterator[tuple[Checkpoint, Place, Ledger]]:
    checkpoint, place = open_checkpoint(path), place_of(path)
    fresh = not place.folder.exists()
    with locked(place):
        recover(place, checkpoint)
        try:
            yield checkpoint, place, read_ledger(place.ledger)
        except OSError as error:
            raise InPlaceError(f"cannot change the model: {error.strerror or error} ({error.filename})") from error
        finally:
            if fresh and not place.ledger.exists() and not place.journal.exists():
                # Nothing came of it: leave the model's folder as it was.
                tidy(place)


def apply_in_place(
    model: str | Path,
    patch: Patch,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strength: float = 1.0,
    allow_overlap: bool = False,
    allow_downgrade: bool = False,
    allow_base_mismatch: bool = False,
    base: str | Path | Checkpoint | None = None,
    dither: bool = False,
    detach: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Changed:
    """Merges a pack into a model's own files. Memory does not grow with the model.

    An older version of the same pack is replaced in the same transaction; packs of other names stack. A killed process leaves a
    model that the next command makes whole: either as before or as after. `base` and `dither` are for quantized rows: the float
    model to make them from exactly, or noise that carries small changes through the rounding.

    The patch passes the gate first (nestpatch/gate.py), by `policy`, `trust` and `allow_unsigned`: whoever trusts a key takes
    no pack that too few trusted keys signed.

    Raises SignatureError, ChainError, BaseMismatchError, InPlaceError, BusyError, PackError; the model is then as it was.
    """
    began = time.perf_counter()
    check_strength(strength)
    proven = prove(patch, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    pack = proven.pack
    with _writing(model) as (checkpoint, place, ledger):
        work = plan_work(place, ledger, pack, strength, allow_overlap=allow_overlap, allow_downgrade=allow_downgrade)
        own = _detach(checkpoint) if detach and not dry_run else checkpoint
        means = means_of(base, dither=dither)
        origin = proven.origin
        transaction = Transaction(place, own, work.packs, allow_base_mismatch, on_event, means=means, origin=origin)
        return _carry_out(transaction, ledger, work, began, dry_run=dry_run)


def revert(
    model: str | Path,
    to: str = "base",
    *,
    base: str | Path | Checkpoint | None = None,
    dither: bool = False,
    only: str | None = None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Changed:
    """Undoes what was applied, bit for bit: everything (`to="base"`), or back to an earlier version of the applied pack.

    `base` and `dither` are as for `apply_in_place`: an earlier version is applied again. A model that is taken back to its
    base follows no channel any more. With `only`, the id of an applied pack, just that one is taken away, and the model goes
    on following its channels.

    Raises ChainError when there is nothing to go back to, UndoError, InPlaceError, BusyError; the model is then as it was.
    """
    began = time.perf_counter()
    with _writing(model) as (checkpoint, place, ledger):
        if not ledger.applied and not ledger.follows:
            raise ChainError(f"nothing is applied to {model}: it is at its base, as far as its ledger knows")
        work = plan_return(place, ledger, to, only)
        left = replace(ledger, follows=()) if to == "base" and only is None else ledger
        means = means_of(base, dither=dither)
        transaction = Transaction(place, checkpoint, work.packs, on_event=on_event, means=means)
        if left != ledger and not work.steps and not dry_run:
            write_ledger(place.ledger, left)
        return _carry_out(transaction, left, work, began, dry_run=dry_run)


def follow_channel(model: str | Path, channel: str) -> None:
    """Writes into the ledger of a model that its updates come from a channel. Raises InPlaceError, BusyError, LedgerError."""
    if channel in read_ledger(place_of(model).ledger).follows:
        return
    with _writing(model) as (_, place, ledger):
        write_ledger(place.ledger, ledger.following(channel))


def _carry_out(transaction: Transaction, ledger: Ledger, work: Work, began: float, *, dry_run: bool) -> Changed:
    checkpoint, steps = transaction.checkpoint, work.steps
    if dry_run:
        require_writable(checkpoint, sorted(work.names))
        if steps and steps[0].do is Do.CHECK:
            transaction.check(steps[0].link)
    elif steps:
        ledger = transaction.run(ledger, steps)
    elif (followed := ledger.following(transaction.origin.channel)) != ledger:
        write_ledger(transaction.place.ledger, followed)
    size, applied = work.size(checkpoint), tuple(entry.label for entry in ledger.applied)
    new = [entry.gain for entry in ledger.applied if entry.transaction == ledger.transaction and steps]
    gain = min((gain for gain in new if gain is not None), default=None)
    seconds = time.perf_counter() - began
    return Changed(checkpoint.path, work.told, applied, size.tensors, size.rows, size.row_bytes, seconds, gain, dry_run)


def _detach(checkpoint: Checkpoint) -> Checkpoint:
    """Gives the model files of its own where it has links: each is copied and takes its link's place at once."""
    for file in checkpoint.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            with new_place(file, overwrite=True) as sibling:
                shutil.copyfile(file, sibling)
                with open(sibling, "r+b") as handle:
                    os.fsync(handle.fileno())
    return checkpoint.reopen(checkpoint.path)
