"""What there is to do: the steps of a change, the packs that they need, and how much they touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nestpatch.errors import ChainError, LedgerError, UndoError
from nestpatch.formats import nest
from nestpatch.formats.interface import Checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.chain import Do, Link, Step, plan_apply, plan_revert
from nestpatch.patcher.ledger import Entry, Ledger
from nestpatch.patcher.place import Place


@dataclass(frozen=True)
class Size:
    """How much a change touches."""

    tensors: int
    rows: int
    row_bytes: int


@dataclass(frozen=True, eq=False)
class Work:
    """Steps in order, and the packs that they name, by id."""

    steps: tuple[Step, ...]
    packs: Mapping[str, Pack]

    @property
    def names(self) -> frozenset[str]:
        """The tensors that change."""
        return frozenset(delta.name for step in self.steps for delta in self.packs[step.link.pack_id])

    @property
    def told(self) -> tuple[str, ...]:
        """The steps, for people."""
        return tuple(f"{step.do.value} {step.link.label}" for step in self.steps if step.do is not Do.CHECK)

    def size(self, checkpoint: Checkpoint) -> Size:
        """Rows count as often as a step writes them."""
        deltas = [delta for step in self.steps if step.do is not Do.CHECK for delta in self.packs[step.link.pack_id]]
        nbytes = sum(delta.neurons * checkpoint.info(delta.name).row_bytes for delta in deltas)
        return Size(len(self.names), sum(delta.neurons for delta in deltas), nbytes)


def load_packs(place: Place, entries: Sequence[Entry]) -> dict[str, Pack]:
    """The kept copies of applied packs, by id. Raises UndoError or LedgerError when one is missing or altered."""
    packs = {}
    for entry in entries:
        path = place.pack(entry.pack_id)
        pack = nest.read(path) if path.exists() else None
        if pack is None or nest.pack_id(pack) != entry.pack_id:
            raise UndoError(f"{path}, the kept copy of {entry.label}, is missing or altered")
        if {delta.name: delta.neurons for delta in pack} != {name: record.rows for name, record in entry.tensors.items()}:
            raise LedgerError(f"the ledger and the kept copy of {entry.label} disagree about what it changes")
        packs[entry.pack_id] = pack
    return packs


def _overlap(packs: Mapping[str, Pack]) -> dict[tuple[str, str], bool]:
    """Whether two packs change rows in common, for every pair."""
    rows = {pack_id: {delta.name: delta.rows for delta in pack} for pack_id, pack in packs.items()}

    def shared(a: str, b: str) -> bool:
        return any(len(np.intersect1d(rows[a][name], rows[b][name])) > 0 for name in rows[a].keys() & rows[b].keys())

    return {(a, b): shared(a, b) for a in rows for b in rows}


def plan_work(
    place: Place, ledger: Ledger, pack: Pack, strength: float, *, allow_overlap: bool = False, allow_downgrade: bool = False
) -> Work:
    """The work of applying a pack to a model with this ledger. Raises ChainError or UndoError."""
    manifest = pack.manifest
    link = Link(nest.pack_id(pack), manifest.name, manifest.version, strength, manifest.supersedes, manifest.requires)
    packs = load_packs(place, ledger.applied) | {link.pack_id: pack}
    shared = _overlap(packs)
    steps = plan_apply(
        [entry.link for entry in ledger.applied],
        link,
        lambda a, b: shared[a.pack_id, b.pack_id],
        allow_overlap=allow_overlap,
        allow_downgrade=allow_downgrade,
    )
    return Work(steps, packs)


def plan_return(place: Place, ledger: Ledger, to: str, only: str | None = None) -> Work:
    """The work of going back to the base, or to an earlier version of an applied pack; or of taking away only the pack
    with this id. Raises ChainError or UndoError.
    """
    packs = load_packs(place, ledger.applied)
    applied = [entry.link for entry in ledger.applied]
    if only is not None:
        shared = _overlap(packs)
        removed = [link for link in applied if link.pack_id == only]
        return Work(plan_revert(applied, removed, lambda a, b: shared[a.pack_id, b.pack_id]), packs)
    if to == "base":
        return Work(plan_revert(applied, applied, lambda a, b: True), packs)  # noqa: ARG005
    link = _earlier(ledger, to)
    return plan_work(place, ledger, _load_earlier(place, link), link.strength, allow_overlap=True, allow_downgrade=True)


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
