"""Planning a change: the steps that turn what is applied to a model into what is wanted, with the packs that they need.

`chain.py` has the rules, as values. Here they meet the model: the ledger and the kept packs beside it, the policy that judges
their signatures, and the rows.

Public: `plan_apply`, `plan_revert`, `plan_from_ledger`, `PlannedSteps`, `Judge`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path

import numpy as np

from nestpatch.errors import ChainError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import Proven
from nestpatch.pack import Pack
from nestpatch.patcher.chain import NOTHING, Action, Allowed, Link, Overlap, Step, steps_to_apply, steps_to_revert
from nestpatch.patcher.held import Missing, look, missing, require_proven
from nestpatch.patcher.kept import judge_kept, load_pack, load_packs, proven_signers
from nestpatch.patcher.ledger import Ledger, LedgerEntry
from nestpatch.patcher.state_dir import StateDir
from nestpatch.signing.subject import Origin
from nestpatch.signing.trust import Policy
from nestpatch.values import dataclass


@dataclass(frozen=True)
class ChangeSize:
    """How much a change writes."""

    tensors: int
    rows: int
    row_bytes: int


@dataclass(frozen=True, eq=False)
class PlannedSteps:
    """The steps of a change, in order, with everything that is needed to carry them out."""

    steps: tuple[Step, ...]
    packs: Mapping[str, Pack]
    """Pack id -> pack, for every pack that a step names."""
    origin: Origin = field(default_factory=Origin)
    """Origin of the pack that is applied. Packs that are applied again keep the origin in the ledger."""
    missing: Missing = field(default_factory=dict)
    """Tensors whose rows no longer hold an applied pack: to undo it, they are left as they are."""

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of the tensors that the steps change."""
        return frozenset(delta.name for step in self.steps for delta in self.packs[step.link.pack_id])

    @property
    def undone(self) -> frozenset[str]:
        """Ids of the packs that are undone, including those that are applied again."""
        return frozenset(step.link.pack_id for step in self.steps if step.action is Action.UNDO)

    @property
    def labels(self) -> tuple[str, ...]:
        """One line a step, for people."""
        return tuple(f"{step.action.value} {step.link.label}" for step in self.steps if step.action is not Action.CHECK)

    def size(self, checkpoint: Checkpoint) -> ChangeSize:
        """Measures the change.

        Args:
            checkpoint: The model that is to change.

        Returns:
            The size. A row counts once for every step that writes it.
        """
        deltas = [delta for step in self.steps if step.action is not Action.CHECK for delta in self.packs[step.link.pack_id]]
        nbytes = sum(delta.neurons * checkpoint.info(delta.name).row_bytes for delta in deltas)
        return ChangeSize(len(self.tensor_names), sum(delta.neurons for delta in deltas), nbytes)


@dataclass(frozen=True)
class Judge:
    """The policy by which the packs kept beside a model are judged."""

    policy: Policy
    model: str | Path | None
    """The model as the user names it: decides which rules of the policy apply."""
    allow_unsigned: bool = False

    def publishers(self, state_dir: StateDir, entry: LedgerEntry) -> frozenset[str]:
        """The publishers of an applied pack.

        An entry that this machine wrote is used as it is. For an entry that came with the model, the kept signatures decide. If
        they prove nothing, the entry's own claim is used: it can make the rules stricter, but permits nothing.

        Args:
            state_dir: Where the state of the model is.
            entry: The applied pack.

        Returns:
            Key ids.
        """
        if not entry.foreign:
            return entry.publishers
        return frozenset(proven_signers(state_dir, entry.pack_id, self.policy, self.model).values()) or entry.publishers

    def require(self, state_dir: StateDir, pack_id: str) -> Origin:
        """Checks the kept signatures of a pack before its deltas are used.

        Args:
            state_dir: Where the state of the model is.
            pack_id: The pack.

        Returns:
            The origin, with the signers that were checked.

        Raises:
            SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
            UndoError: The kept copy is missing or altered.
        """
        outcome = judge_kept(state_dir, pack_id, self.policy, self.model, allow_unsigned=self.allow_unsigned)
        return Origin(outcome.key_ids)


def plan_apply(
    checkpoint: Checkpoint,
    state_dir: StateDir,
    ledger: Ledger,
    proven: Proven,
    strength: float,
    judge: Judge,
    allowed: Allowed,
    base: Checkpoint | None,
) -> PlannedSteps:
    """Plans to apply a pack, after the rows were compared with the ledger.

    Applied packs whose rows are missing are put back or replaced. Undo records that came with the model are proven before a
    step may use them.

    Args:
        checkpoint: The model.
        state_dir: Where its state is.
        ledger: What is applied to it.
        proven: The pack, which has passed the gate.
        strength: Factor on the deltas.
        judge: The policy for packs that came with the model.
        allowed: What the user has permitted.
        base: The float model, for rows that are stored quantized.

    Returns:
        The plan. It has no steps if the pack is applied already and no rows are missing.

    Raises:
        ChainError: The version rules forbid it (and its subclasses).
        BaseMismatchError: Rows hold neither an applied pack nor what they held before it.
        UndoError: A kept pack or an undo record is missing, altered or not proven.
        LedgerError: The ledger contradicts the packs or the model.
        SignatureError: A pack that came with the model is needed, and too few trusted keys signed it.
    """
    packs = load_packs(state_dir, ledger.applied, {proven.pack_id: proven.pack})
    gone = missing(look(checkpoint, state_dir, ledger.applied, packs, base))
    lost = [entry for entry in ledger.applied if entry.pack_id in gone]
    planned = plan_from_ledger(state_dir, ledger, proven.pack, strength, judge, proven.origin, allowed, lost, packs)
    if any(entry.foreign and entry.pack_id in planned.undone for entry in ledger.applied):
        found = look(checkpoint, state_dir, ledger.applied, planned.packs, base, down_to_base=True)
        require_proven([one for one in found if one.entry.pack_id in planned.undone])
    return replace(planned, missing=gone)


def plan_from_ledger(
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
    """Plans to apply a pack without looking at the rows: for callers that have compared them with the ledger already.

    Args:
        state_dir: Where the state of the model is.
        ledger: What is applied to it.
        pack: The pack to apply.
        strength: Factor on the deltas.
        judge: The policy for packs that came with the model.
        origin: Who signed the pack, and the channel that it came from.
        allowed: What the user has permitted.
        lost: The applied packs whose rows are missing: they are put back or replaced.
        known: Pack id -> pack, for applied packs that have been read and checked already.

    Returns:
        The plan.

    Raises:
        ChainError: The version rules forbid it (and its subclasses).
        UndoError: A kept pack is missing or altered.
        LedgerError: The ledger contradicts a kept pack.
        SignatureError: A pack that came with the model is needed, and too few trusted keys signed it.
    """
    manifest, pack_id = pack.manifest, nest.pack_id(pack)
    new = Link(pack_id, manifest.name, manifest.version, strength, manifest.supersedes, manifest.requires, origin.publishers)
    packs = load_packs(state_dir, ledger.applied, {**(known or {}), pack_id: pack}) | {pack_id: pack}
    absent = [entry.link for entry in lost]
    steps = steps_to_apply(_links(state_dir, ledger, judge), new, _overlap(packs), allowed, absent)
    _require_signed(state_dir, ledger, steps, judge, new=pack_id)
    return PlannedSteps(steps, packs, origin)


def plan_revert(
    state_dir: StateDir,
    ledger: Ledger,
    packs: Mapping[str, Pack],
    to: str,
    judge: Judge,
    only: str | None = None,
    lost: Sequence[LedgerEntry] = (),
) -> PlannedSteps:
    """Plans to go back to the base, to an earlier version of an applied pack, or to the model without one of its packs.

    Args:
        state_dir: Where the state of the model is.
        ledger: What is applied to it.
        packs: Pack id -> pack, for all applied packs, read and checked.
        to: "base", or a version in the model's history.
        judge: The policy for packs that came with the model, and for the earlier version.
        only: Id of the one applied pack to remove; `to` is then ignored.
        lost: The applied packs whose rows are missing.

    Returns:
        The plan.

    Raises:
        ChainError: The version was never applied, or the version rules forbid the step (and subclasses).
        UndoError: A kept pack is missing or altered.
        LedgerError: The ledger contradicts a kept pack.
        SignatureError: A pack that came with the model, or the earlier version, is not signed by enough trusted keys.
    """
    if only is None and to != "base":
        link = _find_earlier(ledger, to)
        pack, origin = load_pack(state_dir, link.pack_id, link.label), judge.require(state_dir, link.pack_id)
        # A user who allows unsigned packs also allows one to replace a signed pack.
        allowed = Allowed(overlap=True, downgrade=True, other_publisher=judge.allow_unsigned and not origin.publishers)
        return plan_from_ledger(state_dir, ledger, pack, link.strength, judge, origin, allowed, lost, packs)
    links = _links(state_dir, ledger, judge)
    removed = links if only is None else [link for link in links if link.pack_id == only]
    steps = steps_to_revert(links, removed, _overlap(packs), [entry.link for entry in lost])
    _require_signed(state_dir, ledger, steps, judge)
    return PlannedSteps(steps, packs)


def _links(state_dir: StateDir, ledger: Ledger, judge: Judge) -> list[Link]:
    return [replace(entry.link, publishers=judge.publishers(state_dir, entry)) for entry in ledger.applied]


def _overlap(packs: Mapping[str, Pack]) -> Overlap:
    rows = {pack_id: {delta.name: delta.rows for delta in pack} for pack_id, pack in packs.items()}

    def share_rows(a: Link, b: Link) -> bool:
        mine, other = rows[a.pack_id], rows[b.pack_id]
        return any(len(np.intersect1d(mine[name], other[name])) > 0 for name in mine.keys() & other.keys())

    return share_rows


def _require_signed(state_dir: StateDir, ledger: Ledger, steps: Sequence[Step], judge: Judge, new: str = "") -> None:
    """Packs that came with the model pass the gate before their deltas are used. `new`: id of the pack that has passed it."""
    foreign = {entry.pack_id: entry for entry in ledger.applied if entry.foreign and entry.pack_id != new}
    for pack_id in dict.fromkeys(step.link.pack_id for step in steps if step.link.pack_id in foreign):
        try:
            judge.require(state_dir, pack_id)
        except (UnsignedError, UntrustedError) as error:
            raise type(error)(
                f"{foreign[pack_id].label} came with the model, and no key that you trust has signed it: {error}",
                advice="If you know its publisher: nestpatch trust add KEY.pub --name NAME. To use its undo records anyway, "
                "where the pack's own digests prove them: --allow-unsigned.",
            ) from error


def _find_earlier(ledger: Ledger, version: str) -> Link:
    """The latest pack of that version in the model's history."""
    names = {entry.name for entry in ledger.applied}
    events = [event for event in ledger.history if event["name"] in names]
    found = [event for event in events if event["version"] == version and event["what"] == "applied"]
    if not found:
        known = sorted({str(event["version"]) for event in events})
        raise ChainError(
            f"version {version} was never applied to this model",
            advice=f"Known versions: {', '.join(known) or 'none'}; or --to base.",
        )
    return Link(str(found[-1]["pack_id"]), str(found[-1]["name"]), version)
