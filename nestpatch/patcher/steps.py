"""What there is to do: the steps of a change, the packs that they need, and how much they touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nestpatch.errors import ChainError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import Proven
from nestpatch.pack import Pack
from nestpatch.patcher.chain import NOTHING, Action, Allowed, Link, Step, plan_apply, plan_revert
from nestpatch.patcher.held import Missing, look, missing, require_undoable
from nestpatch.patcher.kept import judge_kept, load_pack, load_packs, proven_signers
from nestpatch.patcher.ledger import Ledger, LedgerEntry
from nestpatch.patcher.state_dir import StateDir
from nestpatch.signing.subject import Origin
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import signers_of


@dataclass(frozen=True)
class Size:
    """How much a change touches."""

    tensors: int
    rows: int
    row_bytes: int


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """Steps in order, and the packs that they name, by id."""

    steps: tuple[Step, ...]
    packs: Mapping[str, Pack]
    origin: Origin = field(default_factory=Origin)
    """Of the pack that is applied; what is only put back keeps its own."""
    missing: Missing = field(default_factory=dict)
    """What is undone by leaving it: it is not in the rows any more."""

    @property
    def names(self) -> frozenset[str]:
        """The tensors that change."""
        return frozenset(delta.name for step in self.steps for delta in self.packs[step.link.pack_id])

    @property
    def undone(self) -> frozenset[str]:
        """The ids of the packs that are undone, for good or for the while."""
        return frozenset(step.link.pack_id for step in self.steps if step.action is Action.UNDO)

    @property
    def told(self) -> tuple[str, ...]:
        """The steps, for people."""
        return tuple(f"{step.action.value} {step.link.label}" for step in self.steps if step.action is not Action.CHECK)

    def size(self, checkpoint: Checkpoint) -> Size:
        """Rows count as often as a step writes them."""
        deltas = [delta for step in self.steps if step.action is not Action.CHECK for delta in self.packs[step.link.pack_id]]
        nbytes = sum(delta.neurons * checkpoint.info(delta.name).row_bytes for delta in deltas)
        return Size(len(self.names), sum(delta.neurons for delta in deltas), nbytes)


@dataclass(frozen=True)
class Judge:
    """Whose word counts for what lies beside a model: the policy, and what the user calls the model."""

    policy: Policy
    model: str | Path | None
    allow_unsigned: bool = False

    def publishers(self, state_dir: StateDir, entry: LedgerEntry) -> frozenset[str]:
        """The key ids in whose name an applied pack speaks.

        What this machine wrote down is believed. Of an entry that came with the model the kept signatures decide, and only
        where these prove nothing its own claim, which can then hold back others but opens nothing.
        """
        if not entry.foreign:
            return entry.publishers
        return frozenset(proven_signers(state_dir, entry.pack_id, self.policy, self.model).values()) or entry.publishers

    def require(self, state_dir: StateDir, pack_id: str) -> Origin:
        """Judges the kept signatures of a pack that is to be used. Raises SignatureError, UndoError."""
        outcome = judge_kept(state_dir, pack_id, self.policy, self.model, allow_unsigned=self.allow_unsigned)
        return Origin(signers_of(outcome))


def _overlap(packs: Mapping[str, Pack]) -> dict[tuple[str, str], bool]:
    """Whether two packs change rows in common, for every pair."""
    rows = {pack_id: {delta.name: delta.rows for delta in pack} for pack_id, pack in packs.items()}

    def shared(a: str, b: str) -> bool:
        return any(len(np.intersect1d(rows[a][name], rows[b][name])) > 0 for name in rows[a].keys() & rows[b].keys())

    return {(a, b): shared(a, b) for a in rows for b in rows}


def _links(state_dir: StateDir, ledger: Ledger, judge: Judge) -> list[Link]:
    return [replace(entry.link, publishers=judge.publishers(state_dir, entry)) for entry in ledger.applied]


def plan_steps(
    state_dir: StateDir,
    ledger: Ledger,
    pack: Pack,
    strength: float,
    judge: Judge,
    origin: Origin,
    allowed: Allowed = NOTHING,
    lost: Sequence[LedgerEntry] = (),
    known: Mapping[str, Pack] | None = None,
) -> PlannedSteps:
    """The work of applying a pack to a model with this ledger.

    `lost`: applied packs whose rows are missing; they are put back, or replaced. `known`: applied packs that were read and
    checked already, by id.

    Raises ChainError and its kinds, UndoError, LedgerError; SignatureError for an entry that came with the model.
    """
    manifest = pack.manifest
    links, absent = _links(state_dir, ledger, judge), [entry.link for entry in lost]
    link = Link(
        nest.pack_id(pack), manifest.name, manifest.version, strength, manifest.supersedes, manifest.requires, origin.publishers
    )
    packs = load_packs(state_dir, ledger.applied, {**(known or {}), link.pack_id: pack}) | {link.pack_id: pack}
    shared = _overlap(packs)
    steps = plan_apply(links, link, lambda a, b: shared[a.pack_id, b.pack_id], allowed, absent)
    _require_signed(state_dir, ledger, steps, judge, new=link.pack_id)
    return PlannedSteps(steps, packs, origin)


def plan_on_rows(
    checkpoint: Checkpoint,
    state_dir: StateDir,
    ledger: Ledger,
    proven: Proven,
    strength: float,
    judge: Judge,
    allowed: Allowed,
    base: Checkpoint | None,
) -> PlannedSteps:
    """The same after a look at the rows: what is missing there is put back or replaced, and what is undone is proven first.

    `base`: the float model, for quantized rows. Raises BaseMismatchError where rows hold neither a pack nor what was there
    before it, and as `plan_work` does.
    """
    packs = load_packs(state_dir, ledger.applied, {proven.pack_id: proven.pack})
    gone = missing(look(checkpoint, state_dir, ledger.applied, packs, base))
    lost = [entry for entry in ledger.applied if entry.pack_id in gone]
    planned = plan_steps(state_dir, ledger, proven.pack, strength, judge, proven.origin, allowed, lost, packs)
    require_undoable(checkpoint, state_dir, ledger.applied, planned.packs, planned.undone, base)
    return replace(planned, missing=gone)


def _require_signed(state_dir: StateDir, ledger: Ledger, steps: Sequence[Step], judge: Judge, new: str = "") -> None:
    """Packs that came with the model pass the gate before their deltas are used."""
    foreign = {entry.pack_id: entry for entry in ledger.applied if entry.foreign and entry.pack_id != new}
    for pack_id in dict.fromkeys(step.link.pack_id for step in steps if step.link.pack_id in foreign):
        try:
            judge.require(state_dir, pack_id)
        except (UnsignedError, UntrustedError) as error:
            raise type(error)(
                f"{foreign[pack_id].label} came along with the model, and no key that you trust has signed it: {error}",
                advice="If you know its publisher: nestpatch trust add KEY.pub --name NAME. To use its records all the same, "
                "as far as the pack's own digests prove them: --allow-unsigned.",
            ) from error


def plan_revert_steps(
    state_dir: StateDir,
    ledger: Ledger,
    packs: Mapping[str, Pack],
    to: str,
    judge: Judge,
    only: str | None = None,
    lost: Sequence[LedgerEntry] = (),
) -> PlannedSteps:
    """The work of going back to the base, or to an earlier version of an applied pack; or of taking away only the pack
    with this id. `packs`: the applied ones, read and checked. Raises ChainError, UndoError, LedgerError, SignatureError.
    """
    if only is None and to != "base":
        link = _earlier(ledger, to)
        pack, origin = load_pack(state_dir, link.pack_id, link.label), judge.require(state_dir, link.pack_id)
        # Nobody's pack in the place of a signed one: who allows unsigned packs has asked for that.
        allowed = Allowed(overlap=True, downgrade=True, other_publisher=judge.allow_unsigned and not origin.publishers)
        return plan_steps(state_dir, ledger, pack, link.strength, judge, origin, allowed, lost, packs)
    links = _links(state_dir, ledger, judge)
    shared = _overlap(packs)
    removed = links if only is None else [link for link in links if link.pack_id == only]
    steps = plan_revert(links, removed, lambda a, b: shared[a.pack_id, b.pack_id], [entry.link for entry in lost])
    _require_signed(state_dir, ledger, steps, judge)
    return PlannedSteps(steps, packs)


def _earlier(ledger: Ledger, version: str) -> Link:
    """The pack of that version in the model's history."""
    names = {entry.name for entry in ledger.applied}
    found = [e for e in ledger.history if e["version"] == version and e["name"] in names and e["what"] == "applied"]
    if not found:
        known = sorted({str(e["version"]) for e in ledger.history if e["name"] in names})
        raise ChainError(
            f"version {version} was never applied to this model",
            advice=f"Known versions: {', '.join(known) or 'none'}; or --to base.",
        )
    event = found[-1]
    return Link(str(event["pack_id"]), str(event["name"]), str(event["version"]))
