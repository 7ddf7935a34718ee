"""The verbs that change a model where it is: apply, revert, recover. Each is one transaction under the model's lock."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestpatch.errors import ChainError, UndoError
from nestpatch.events import OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.atomic import new_place
from nestpatch.formats.interface import Checkpoint, open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.chain import Do, Link, Step, plan_apply, plan_revert
from nestpatch.patcher.ledger import Entry, Ledger, read_ledger
from nestpatch.patcher.place import Place, locked, place_of
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.transaction import Transaction, recover, require_writable


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
    dry_run: bool = False


@contextmanager
def _writing(path: str | Path) -> Iterator[tuple[Checkpoint, Place, Ledger]]:
    checkpoint, place = open_checkpoint(path), place_of(path)
    fresh = not place.folder.exists()
    try:
        with locked(place):
            recover(place, checkpoint)
            yield checkpoint, place, read_ledger(place.ledger)
    finally:
        if fresh and place.folder.is_dir() and not place.ledger.exists() and not place.journal.exists():
            # Nothing came of it: leave the model's folder as it was.
            shutil.rmtree(place.folder, ignore_errors=True)


def load_packs(place: Place, entries: Sequence[Entry]) -> dict[str, Pack]:
    """The kept copies of applied packs, by id. Raises UndoError when one is missing or altered."""
    packs = {}
    for entry in entries:
        path = place.pack(entry.pack_id)
        pack = nest.read(path) if path.exists() else None
        if pack is None or nest.pack_id(pack) != entry.pack_id:
            raise UndoError(f"{path}, the kept copy of {entry.label}, is missing or altered")
        packs[entry.pack_id] = pack
    return packs


def _overlap(packs: Mapping[str, Pack]) -> dict[tuple[str, str], bool]:
    """Whether two packs change rows in common, for every pair."""
    rows = {pack_id: {delta.name: delta.rows for delta in pack} for pack_id, pack in packs.items()}

    def shared(a: str, b: str) -> bool:
        return any(len(np.intersect1d(rows[a][name], rows[b][name])) > 0 for name in rows[a].keys() & rows[b].keys())

    return {(a, b): shared(a, b) for a in rows for b in rows}


def apply_in_place(
    model: str | Path,
    patch: str | Path | Pack,
    *,
    strength: float = 1.0,
    allow_overlap: bool = False,
    allow_downgrade: bool = False,
    allow_base_mismatch: bool = False,
    detach: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> Changed:
    """Merges a pack into a model's own files. Memory does not grow with the model.

    An older version of the same pack is replaced in the same transaction; packs of other names stack. A killed process leaves a
    model that the next command makes whole: either as before or as after.

    Raises ChainError, BaseMismatchError, InPlaceError, BusyError, PackError; the model is then as it was.
    """
    began = time.perf_counter()
    check_strength(strength)
    pack = patch if isinstance(patch, Pack) else nest.read(patch)
    manifest = pack.manifest
    link = Link(nest.pack_id(pack), manifest.name, manifest.version, strength, manifest.supersedes, manifest.requires)
    with _writing(model) as (checkpoint, place, ledger):
        packs = load_packs(place, ledger.applied) | {link.pack_id: pack}
        shared = _overlap(packs)
        steps = plan_apply(
            [entry.link for entry in ledger.applied],
            link,
            lambda a, b: shared[a.pack_id, b.pack_id],
            allow_overlap=allow_overlap,
            allow_downgrade=allow_downgrade,
        )
        own = _detach(checkpoint) if detach and not dry_run else checkpoint
        transaction = Transaction(place, own, packs, allow_base_mismatch, on_event)
        return _carry_out(transaction, ledger, steps, began, dry_run=dry_run)


def revert(model: str | Path, to: str = "base", *, dry_run: bool = False, on_event: OnEvent = ignore) -> Changed:
    """Undoes what was applied, bit for bit: everything (`to="base"`), or back to an earlier version of the applied pack.

    Raises ChainError when there is nothing to go back to, UndoError, InPlaceError, BusyError; the model is then as it was.
    """
    began = time.perf_counter()
    with _writing(model) as (checkpoint, place, ledger):
        if not ledger.applied:
            raise ChainError(f"nothing is applied to {model}: it is at its base, as far as its ledger knows")
        packs = load_packs(place, ledger.applied)
        applied = [entry.link for entry in ledger.applied]
        if to == "base":
            steps = plan_revert(applied, applied, lambda a, b: True)  # noqa: ARG005
        else:
            link = _earlier(ledger, to)
            packs[link.pack_id] = _load_earlier(place, link)
            shared = _overlap(packs)
            overlap = lambda a, b: shared[a.pack_id, b.pack_id]  # noqa: E731
            steps = plan_apply(applied, link, overlap, allow_overlap=True, allow_downgrade=True)
        transaction = Transaction(place, checkpoint, packs, on_event=on_event)
        return _carry_out(transaction, ledger, steps, began, dry_run=dry_run)


def _earlier(ledger: Ledger, version: str) -> Link:
    """The pack of that version in the model's history."""
    names = {entry.name for entry in ledger.applied}
    found = [e for e in ledger.history if e.get("version") == version and e.get("name") in names and e.get("what") == "applied"]
    if not found:
        known = sorted({str(e.get("version")) for e in ledger.history if e.get("name") in names})
        raise ChainError(
            f"version {version} was never applied to this model",
            advice=f"Known versions: {', '.join(known) or 'none'}; or --to base.",
        )
    event = found[-1]
    return Link(str(event["pack_id"]), str(event["name"]), str(event["version"]))


def _load_earlier(place: Place, link: Link) -> Pack:
    path = place.pack(link.pack_id)
    if not path.exists():
        raise UndoError(
            f"{path}, the kept copy of {link.label}, is missing", advice="Apply that version's pack with --allow-downgrade."
        )
    return nest.read(path)


def _carry_out(transaction: Transaction, ledger: Ledger, steps: Sequence[Step], began: float, *, dry_run: bool) -> Changed:
    checkpoint, packs = transaction.checkpoint, transaction.packs
    deltas = [delta for step in steps if step.do is not Do.CHECK for delta in packs[step.link.pack_id]]
    if dry_run:
        require_writable(checkpoint, sorted({delta.name for delta in deltas}))
        if steps and steps[0].do is Do.CHECK:
            transaction.check(steps[0].link)
    elif steps:
        ledger = transaction.run(ledger, steps)
    return Changed(
        model=checkpoint.path,
        steps=tuple(f"{step.do.value} {step.link.label}" for step in steps if step.do is not Do.CHECK),
        applied=tuple(entry.label for entry in ledger.applied),
        tensors=len({delta.name for delta in deltas}),
        rows=sum(delta.neurons for delta in deltas),
        row_bytes=sum(delta.neurons * checkpoint.info(delta.name).row_bytes for delta in deltas),
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _detach(checkpoint: Checkpoint) -> Checkpoint:
    """Gives the model files of its own where it has links: each is copied and takes its link's place at once."""
    for file in checkpoint.files:
        if file.is_symlink() or file.stat().st_nlink > 1:
            with new_place(file, overwrite=True) as sibling:
                shutil.copyfile(file, sibling)
                with open(sibling, "r+b") as handle:
                    os.fsync(handle.fileno())
    return checkpoint.reopen(checkpoint.path)
