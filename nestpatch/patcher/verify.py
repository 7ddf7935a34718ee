"""The verb `verify`: which state a model is in, from its touched rows; `full` hashes whole tensors too. Writes nothing.

Without a pack: do the rows hold what the ledger says? With a pack: is exactly this pack in the rows? Then the pack's own
digests decide, and nothing that is stored beside or inside the model does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import LedgerError, PackError, SignatureError, StateError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, IntArray
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE, By, Finding, State
from nestpatch.patcher.held import SHOWN_ROWS, Difference, HeldTensor, Holds, Layer, layers_of, look
from nestpatch.patcher.identity import examine
from nestpatch.patcher.kept import load_pack, load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.status import ReleasedPack, released_packs
from nestpatch.patcher.steps import Judge
from nestpatch.rows import Rows, digest, united
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy
from nestpatch.values import dataclass


class Verdict(Enum):
    """The state of a model."""

    BASE = "base"
    PATCHED = "patched"
    HALF = "half patched"
    ALTERED = "altered"
    MISSING = "missing"
    """The ledger names packs, and the rows hold what was there before."""
    CLAIMED = "claimed"
    """The rows are those that the metadata of the model's own files records for a pack. Only the pack can prove it."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    verdict: Verdict
    packs: tuple[str, ...]
    """What is applied, bottom first."""
    tensors: int
    """Tensors whose rows were compared."""
    differences: tuple[Difference, ...]
    detail: str
    full: bool
    seconds: float
    asked: str = ""
    """The pack that was given; empty where none was."""
    by: str = ""
    """What the rows were recognised by, of all tensors the least sure: "digests", "float base" or "sketches". Empty where a
    ledger or an undo record was followed, and where they were not recognised."""

    @property
    def known(self) -> bool:
        """Whether the rows hold the given pack; where none was given, whether they are the base or hold what is recorded."""
        return self.verdict is Verdict.PATCHED or (self.verdict is Verdict.BASE and not self.asked)

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "pack": self.asked or None,
            "verdict": self.verdict.value,
            "known": self.known,
            "packs": list(self.packs),
            "tensors": self.tensors,
            "differences": [one.as_json() for one in self.differences],
            "detail": self.detail,
            "by": self.by or None,
            "full": self.full,
            "seconds": self.seconds,
        }


def verify(
    model: str | Path,
    pack: str | Path | Pack | None = None,
    *,
    strength: float = 1.0,
    base: Checkpoint | None = None,
    full: bool = False,
    policy: Policy | None = None,
) -> Verification:
    """Compares the rows that packs touch. Writes nothing.

    Args:
        model: A checkpoint of any format.
        pack: Compared with the rows, at `strength`; None compares the rows with the ledger.
        strength: Factor on the deltas of the pack.
        base: The float model, for quantized rows.
        full: Hashes whole tensors too.
        policy: Only without a pack: the keys that must have signed packs that came with the model; None means the policy of
            this user.

    Returns:
        The verdict, with the rows that differ.

    Raises:
        CheckpointError: The model cannot be read.
        PackError: The pack cannot be read.
        StateError: The ledger or an undo record is broken, or a change was interrupted.
    """
    began = time.perf_counter()
    checkpoint, state_dir = open_model(model)
    pack = nest.read(pack) if isinstance(pack, (str, Path)) else pack
    ledger = read_ledger(state_dir)
    found = _Verifier(checkpoint, state_dir, ledger, base, full)
    judge = Judge(load_policy(needs_home=False) if policy is None else policy, model)
    result = found.holds(pack, strength) if pack is not None else found.as_recorded(judge)
    return Verification(
        verdict=result.verdict,
        packs=result.packs,
        tensors=result.tensors,
        differences=tuple(result.differences),
        detail=result.detail,
        full=full,
        seconds=time.perf_counter() - began,
        asked=pack.label if pack is not None else "",
        by=result.by,
    )


@dataclass(frozen=True)
class _Result:
    verdict: Verdict
    tensors: int
    detail: str
    packs: tuple[str, ...] = ()
    differences: Sequence[Difference] = ()
    by: str = ""


@dataclass(frozen=True, eq=False)
class _Verifier:
    """A model, opened, with what its ledger says."""

    checkpoint: Checkpoint
    state_dir: StateDir
    ledger: Ledger
    base: Checkpoint | None
    full: bool

    def holds(self, pack: Pack, strength: float) -> _Result:
        """The pack's own digests against the rows. The ledger is only a hint where to look for an undo record."""
        pack_id, applied = nest.pack_id(pack), self.ledger.applied
        also = tuple(entry.label for entry in applied if entry.pack_id != pack_id)
        result = self._against_pack(pack, self.base)
        hint = next((entry for entry in applied if entry.pack_id == pack_id), None)
        if not (result.verdict is Verdict.PATCHED and strength == 1.0):
            if hint is not None and result.verdict is not Verdict.BASE:
                result = self._by_undo_record(pack, strength, hint, result)
            elif result.verdict is Verdict.PATCHED:
                detail = f"holds {pack.label} at strength 1, not at {strength:g}"
                result = _Result(Verdict.ALTERED, result.tensors, detail)
        claims = [one for one in released_packs(self.checkpoint) if one.pack_id == pack_id and hint is None]
        if claims and result.verdict is not Verdict.PATCHED:
            also_claimed = f"the file's metadata claims it{_at(claims[0].strength)}"
            result = replace(result, detail=f"{result.detail}; {also_claimed}, which only the base could confirm")
        return replace(result, detail=f"{result.detail}; the ledger also names {', '.join(also)}") if also else result

    def _by_undo_record(self, pack: Pack, strength: float, hint: LedgerEntry, plain: _Result) -> _Result:
        """What the rows show when the undo record of the pack is followed down to the base."""
        found = self._followed(pack, hint)
        if found and all(one.holds is Holds.PACK for one in found) and hint.strength == strength:
            return _Result(Verdict.PATCHED, plain.tensors, f"holds {pack.label}{_at(strength)}", (pack.label,))
        lacking = [one.difference for one in found if one.difference is not None]
        other = f"it may be there at strength {hint.strength:g}" if hint.strength != strength else "not as the pack leaves them"
        detail = f"the rows do not hold {pack.label} at strength {strength:g}: {other}"
        return _Result(Verdict.ALTERED, plain.tensors, detail, differences=lacking or plain.differences)

    def _followed(self, pack: Pack, hint: LedgerEntry) -> list[HeldTensor]:
        """What the rows of one pack prove, its undo record followed down to the base. Packs above must leave its rows alone."""
        claimed = [replace(entry, foreign=True) for entry in self.ledger.applied]
        try:
            packs = load_packs(self.state_dir, claimed, {hint.pack_id: pack})
            found = look(self.checkpoint, self.state_dir, claimed, packs, self.base, down_to_base=True)
            stacks = layers_of(self.state_dir, claimed, packs)
        except (StateError, LedgerError):
            return []
        own = [one for one in found if one.entry.pack_id == hint.pack_id]
        return [_uncovered(one, stacks[one.tensor]) for one in own]

    def as_recorded(self, judge: Judge) -> _Result:
        """Whether the rows hold what the ledger says; without a ledger, what kept packs and the files' metadata say."""
        if self.ledger.applied:
            result = self._against_ledger()
            if result.verdict is Verdict.PATCHED and (doubt := _unproven(self.state_dir, self.ledger.applied, judge)):
                result = replace(result, verdict=Verdict.UNKNOWN, detail=doubt)
            return result
        results = [self._against_pack(pack) for pack in _kept_packs(self.state_dir, self.ledger, judge)]
        known = [result for result in results if result.verdict in (Verdict.BASE, Verdict.PATCHED)]
        if not known and (released := released_packs(self.checkpoint)):
            return _against_metadata(released)
        unknown = _Result(Verdict.UNKNOWN, 0, "no ledger and no metadata names a pack; give the pack to compare with")
        return (known[-1:] or results[:1] or [unknown])[0]

    def _against_pack(self, pack: Pack, base: Checkpoint | None = None) -> _Result:
        findings = examine(pack, self.checkpoint, base)
        states, count, by = {finding.state for finding in findings}, len(findings), _least_sure(findings)
        differences = [
            Difference(f.name, f.rows[:SHOWN_ROWS], len(f.rows), f"{f.state.value}: {f.detail}")
            for f in findings
            if f.state not in (*APPLICABLE, State.PATCHED)
        ]
        if differences:
            detail = f"neither the base nor the result of {pack.label}"
            return _Result(Verdict.ALTERED, count, detail, differences=differences)
        if states == {State.PATCHED}:
            return _Result(Verdict.PATCHED, count, f"holds the result of {pack.label}", (pack.label,), by=by)
        if State.PATCHED in states:
            lacking = [Difference(f.name, (), 0, "still holds the base") for f in findings if f.state is not State.PATCHED]
            return _Result(Verdict.HALF, count, f"holds {pack.label} in some tensors only", (pack.label,), lacking, by)
        if self.full and (altered := self._whole_tensors(pack, findings)):
            detail = f"the rows are the base of {pack.label}, but tensors differ elsewhere"
            return _Result(Verdict.ALTERED, count, detail, differences=altered)
        return _Result(Verdict.BASE, count, f"the base of {pack.label}", by=by)

    def _against_ledger(self) -> _Result:
        applied = self.ledger.applied
        packs, labels = load_packs(self.state_dir, applied), tuple(entry.label for entry in applied)
        found = look(self.checkpoint, self.state_dir, applied, packs, self.base)
        lost = [(one, one.difference) for one in found if one.difference is not None]
        if lost:
            differences = [difference for _, difference in lost]
            if all(one.holds is Holds.BEFORE for one in found):
                detail = f"the ledger names {', '.join(labels)}, and the rows hold what was there before"
                return _Result(Verdict.MISSING, len(found), detail, labels, differences)
            half = all(one.holds is Holds.BEFORE or one.old == difference.count for one, difference in lost)
            detail = f"not what {', '.join(labels)} left" + (": some rows hold what they held before" if half else "")
            return _Result(Verdict.HALF if half else Verdict.ALTERED, len(found), detail, labels, differences)
        if self.full and (altered := self._whole_below(layers_of(self.state_dir, applied, packs))):
            detail = "the patched rows are right, but tensors differ elsewhere"
            return _Result(Verdict.ALTERED, len(found), detail, labels, altered)
        came = "; the ledger came with the model, the packs confirm it" if any(entry.foreign for entry in applied) else ""
        held = ", ".join(entry.label + _at(entry.strength) for entry in applied)
        return _Result(Verdict.PATCHED, len(found), f"holds {held}{came}", labels)

    def _whole_tensors(self, pack: Pack, findings: Sequence[Finding]) -> list[Difference]:
        """The tensors of a pack that differ from its base outside of its rows."""
        altered = []
        for delta, finding in zip(pack, findings, strict=True):
            identity = pack.manifest.base.tensors[delta.name]
            if finding.by is not By.DIGESTS or self.checkpoint.info(delta.name).dtype != identity.dtype:
                continue  # rounded or widened: its bytes have no digest in the pack
            altered += _compare_whole(delta.name, identity.sha256, _digest_whole(self.checkpoint, delta.name, None, None))
        return altered

    def _whole_below(self, stacks: Mapping[str, Sequence[Layer]]) -> list[Difference]:
        """Undoes all packs in memory, and compares the whole tensors with the base digests in the packs."""
        altered = []
        for name, layers in sorted(stacks.items()):
            info = self.checkpoint.info(name)
            identity = layers[0].pack.manifest.base.tensors[name]
            entry = layers[0].entry
            if info.dtype != identity.dtype or (entry.base_mismatch_allowed and not entry.foreign):
                continue  # no digest to compare with
            rows = united(layer.delta.rows for layer in layers)
            values = self.checkpoint.read_rows(name, rows)
            for layer in reversed(layers):
                where = np.searchsorted(rows, layer.delta.rows)
                values[where] = layer.undone(values[where], info)
            bottom = values[np.searchsorted(rows, layers[0].delta.rows)]
            if identity.quantized and digest([bottom]) != identity.rows_sha256:
                continue  # blocks of another quantizer
            altered += _compare_whole(name, identity.sha256, _digest_whole(self.checkpoint, name, rows, values))
        return altered


def _least_sure(findings: Sequence[Finding]) -> str:
    """What the tensors were recognised by; empty where one was not."""
    found = [finding.by for finding in findings]
    return "" if None in found else next((by.value for by in reversed(By) if by in found), "")


def _at(strength: object) -> str:
    """The strength for a message; empty for 1."""
    return "" if strength == 1 else f" at strength {strength:g}" if isinstance(strength, (int, float)) else ""


def _uncovered(one: HeldTensor, stack: Sequence[Layer]) -> HeldTensor:
    position = next(number for number, layer in enumerate(stack) if layer.entry.pack_id == one.entry.pack_id)
    for above in stack[position + 1 :]:
        shared = np.intersect1d(above.delta.rows, stack[position].delta.rows)
        if len(shared):
            detail = f"{len(shared)} of its rows were changed again by {above.entry.label}, first row {int(shared[0])}"
            rows = tuple(int(row) for row in shared[:SHOWN_ROWS])
            return HeldTensor(one.entry, one.tensor, Holds.OTHER, Difference(one.tensor, rows, len(shared), detail))
    return one


def _kept_packs(state_dir: StateDir, ledger: Ledger, judge: Judge) -> list[Pack]:
    """The packs of the history that are still kept; those that came with the model only where the policy accepts them."""
    packs = []
    lines = [(event["pack_id"], f"{event['name']} {event['version']}", "foreign" in event) for event in ledger.history]
    for pack_id, label, foreign in dict.fromkeys(lines):
        with suppress(PackError, SignatureError, StateError):  # it only served this comparison
            if foreign:
                judge.require(state_dir, pack_id)
            packs.append(load_pack(state_dir, pack_id, label))
    return packs


def _unproven(state_dir: StateDir, applied: Sequence[LedgerEntry], judge: Judge) -> str:
    """Why a pack that came with the model, and is in the rows, proves nothing; empty when the policy accepts all of them."""
    for entry in applied:
        try:
            if entry.foreign:
                judge.require(state_dir, entry.pack_id)
        except (SignatureError, StateError) as error:
            return f"holds {entry.label} by a pack that came with the model, and no trusted signature confirms it: {error}"
    return ""


def _against_metadata(released: Sequence[ReleasedPack]) -> _Result:
    """What the metadata of the model's own files claims, compared with the rows."""
    names = ", ".join(one.label + _at(one.strength) for one in released)
    differences = [difference for one in released for difference in one.differences]
    compared = sum(one.compared for one in released)
    proof = "nestpatch verify MODEL PACK proves it"
    if differences:
        detail = f"the file's metadata names {names}, and the rows are not those that it records"
        return _Result(Verdict.ALTERED, compared, detail, differences=differences)
    if not all(one.consistent for one in released):
        return _Result(Verdict.UNKNOWN, compared, f"the file's metadata names {names} without digests of rows; {proof}")
    labels = tuple(one.label for one in released)
    detail = f"the rows are those that the file's own metadata records for {names}; this is a claim of the file, {proof}"
    return _Result(Verdict.CLAIMED, compared, detail, labels)


def _compare_whole(name: str, expected: str, found: str) -> list[Difference]:
    if expected == found:
        return []
    return [Difference(name, (), 0, f"outside the patched rows: sha256 {found[:12]}.. instead of {expected[:12]}..")]


def _digest_whole(checkpoint: Checkpoint, name: str, rows: IntArray | None, values: Rows | None) -> str:
    """SHA-256 of a tensor, with some rows replaced."""
    state = sha256()
    for part, block in checkpoint.iter_rows(name, np.arange(checkpoint.info(name).rows)):
        if rows is not None and values is not None:
            inside = (rows >= part.start) & (rows < part.stop)
            block[rows[inside] - part.start] = values[inside]
        state.update(block.view(np.uint8).data)
    return state.hexdigest()
