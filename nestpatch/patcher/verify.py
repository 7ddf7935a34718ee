"""Which state is this model in? Answered from the touched rows; `full` hashes whole tensors.

Without a patch: is what the ledger says in the rows? With one: is exactly this pack in the rows? Then the pack's own digests
decide, and nothing beside the model does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.errors import LedgerError, PackError, SignatureError, StateError
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, IntArray
from nestpatch.pack import Pack
from nestpatch.patcher._undo import restored
from nestpatch.patcher.held import SHOWN_ROWS, Difference, HeldTensor, Holds, Layer, layers_of, look
from nestpatch.patcher.identity import APPLICABLE, Finding, State, examine
from nestpatch.patcher.kept import load_pack, load_packs
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.steps import Judge
from nestpatch.rows import Rows
from nestpatch.signing.trust import Policy, load_for_looking


class Verdict(Enum):
    """The state of a model."""

    BASE = "base"
    PATCHED = "patched"
    HALF = "half patched"
    ALTERED = "altered"
    MISSING = "missing"
    """The ledger names packs, and the rows hold what was there before."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    verdict: Verdict
    packs: tuple[str, ...]
    """What is applied, bottom first."""
    tensors: int
    differences: tuple[Difference, ...]
    detail: str
    full: bool
    seconds: float
    asked: str = ""
    """The pack that the caller asked about; empty: about the model as a whole."""

    @property
    def known(self) -> bool:
        """Whether all is as it should be: the pack that was asked about is in the rows; else base or patched."""
        return self.verdict is Verdict.PATCHED or (self.verdict is Verdict.BASE and not self.asked)


def verify(
    model: str | Path,
    pack: str | Path | Pack | None = None,
    *,
    strength: float = 1.0,
    base: Checkpoint | None = None,
    full: bool = False,
    policy: Policy | None = None,
) -> Verification:
    """Looks at the rows that packs touch. Writes nothing.

    Args:
        model: A checkpoint of any format.
        pack: Whether exactly this pack is in the rows, at `strength`; None: whether the rows hold what the ledger says.
        strength: Only with a pack.
        base: The float model, for quantized rows.
        full: Hashes whole tensors too.
        policy: Only without a pack: who has to have signed packs that came with the model; None means that of this user.

    Raises:
        CheckpointError: The model cannot be read.
        PackError: The pack cannot be read.
        StateError: The ledger or an undo record is broken, or a change was interrupted.
    """
    began = time.perf_counter()
    checkpoint, state_dir = open_model(model)
    pack = nest.read(pack) if isinstance(pack, (str, Path)) else pack
    ledger = read_ledger(state_dir)
    judge = Judge(load_for_looking() if policy is None else policy, model)
    if pack is not None:
        result = _is_in_rows(checkpoint, state_dir, ledger, pack, strength, base, full=full)
    elif ledger.applied:
        result = _against_ledger(checkpoint, state_dir, ledger.applied, base, full=full)
        if result[0] is Verdict.PATCHED and (doubt := _unproven(state_dir, ledger.applied, judge)):
            result = (Verdict.UNKNOWN, *result[1:4], doubt)
    else:
        result = _against_packs(checkpoint, _kept_packs(state_dir, ledger, judge), full=full)
    verdict, packs, tensors, differences, detail = result
    asked, seconds = pack.label if pack is not None else "", time.perf_counter() - began
    return Verification(verdict, packs, tensors, tuple(differences), detail, full, seconds, asked)


_Result = tuple[Verdict, tuple[str, ...], int, list[Difference], str]


def _is_in_rows(
    checkpoint: Checkpoint,
    state_dir: StateDir,
    ledger: Ledger,
    pack: Pack,
    strength: float,
    base: Checkpoint | None,
    *,
    full: bool,
) -> _Result:
    """The pack's own digests against the rows; what the ledger says is only a hint where to look for an undo record."""
    pack_id = nest.pack_id(pack)
    also = tuple(entry.label for entry in ledger.applied if entry.pack_id != pack_id)
    more = f"; the ledger also names {', '.join(also)}" if also else ""
    verdict, packs, tensors, differences, detail = _against_pack(checkpoint, pack, base, full=full)
    if verdict is Verdict.PATCHED and strength == 1.0:
        return verdict, packs, tensors, differences, detail + more
    hint = next((entry for entry in ledger.applied if entry.pack_id == pack_id), None)
    if hint is not None and verdict is not Verdict.BASE:
        found = _followed(checkpoint, state_dir, ledger, pack, hint, base)
        if all(one.holds is Holds.PACK for one in found) and hint.strength == strength and found:
            dose = f" at strength {strength:g}" if strength != 1.0 else ""
            return Verdict.PATCHED, (pack.label,), tensors, [], f"holds {pack.label}{dose}{more}"
        lacking = [one.difference for one in found if one.difference is not None]
        dose = (
            f"it may be there at strength {hint.strength:g}"
            if hint.strength != strength
            else "not as the pack would leave them"
        )
        return (
            Verdict.ALTERED,
            (),
            tensors,
            lacking or differences,
            f"the rows do not hold {pack.label} at strength {strength:g}: {dose}{more}",
        )
    if verdict is Verdict.PATCHED:
        return Verdict.ALTERED, (), tensors, [], f"holds {pack.label} at strength 1, not at {strength:g}{more}"
    return verdict, packs, tensors, differences, detail + more


def _followed(
    checkpoint: Checkpoint, state_dir: StateDir, ledger: Ledger, pack: Pack, hint: LedgerEntry, base: Checkpoint | None
) -> list[HeldTensor]:
    """What the rows of one pack prove, its undo record followed down to the base. Packs on top must leave its rows alone."""
    claimed = [replace(entry, foreign=True) for entry in ledger.applied]
    try:
        packs = load_packs(state_dir, claimed, {hint.pack_id: pack})
        found = look(checkpoint, state_dir, claimed, packs, base, down_to_base=True)
        stacks = layers_of(state_dir, claimed, packs)
    except (StateError, LedgerError):
        return []
    own = [one for one in found if one.entry.pack_id == hint.pack_id]
    return [_uncovered(one, stacks[one.tensor]) for one in own]


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
    """The packs of the history, as far as they are at hand; what came with the model only as the policy lets it pass."""
    packs = []
    lines = [(event["pack_id"], f"{event['name']} {event['version']}", "foreign" in event) for event in ledger.history]
    for pack_id, label, foreign in dict.fromkeys(lines):
        with suppress(PackError, SignatureError, StateError):  # it only served this comparison
            if foreign:
                judge.require(state_dir, pack_id)
            packs.append(load_pack(state_dir, pack_id, label))
    return packs


def _unproven(state_dir: StateDir, applied: Sequence[LedgerEntry], judge: Judge) -> str:
    """Why a pack that came with the model, and is in the rows, proves nothing; empty when the policy lets all of them pass."""
    for entry in applied:
        try:
            if entry.foreign:
                judge.require(state_dir, entry.pack_id)
        except (SignatureError, StateError) as error:
            return f"holds {entry.label} by a pack that came with the model, and nobody answers for that pack: {error}"
    return ""


def _against_packs(checkpoint: Checkpoint, packs: Sequence[Pack], *, full: bool) -> _Result:
    if not packs:
        return Verdict.UNKNOWN, (), 0, [], "nestpatch knows nothing of this model; give the patch to compare with"
    best: _Result | None = None
    for pack in packs:
        result = _against_pack(checkpoint, pack, full=full)
        if best is None or result[0] in (Verdict.BASE, Verdict.PATCHED):
            best = result
    assert best is not None  # noqa: S101 - packs is not empty
    return best


def _against_pack(checkpoint: Checkpoint, pack: Pack, base: Checkpoint | None = None, *, full: bool) -> _Result:
    findings = examine(pack, checkpoint, base)
    states = {finding.state for finding in findings}
    differences = [_difference(finding) for finding in findings if finding.state not in (*APPLICABLE, State.PATCHED)]
    count = len(findings)
    if differences:
        return Verdict.ALTERED, (), count, differences, f"neither the base nor the result of {pack.label}"
    if states == {State.PATCHED}:
        return Verdict.PATCHED, (pack.label,), count, [], f"holds the result of {pack.label}"
    if State.PATCHED in states:
        lacking = [Difference(f.name, (), 0, "still holds the base") for f in findings if f.state is not State.PATCHED]
        return Verdict.HALF, (pack.label,), count, lacking, f"holds {pack.label} in some tensors only"
    if full and (altered := _whole_tensors(checkpoint, pack)):
        return Verdict.ALTERED, (), count, altered, f"the rows are the base of {pack.label}, but tensors differ elsewhere"
    return Verdict.BASE, (), count, [], f"the base of {pack.label}"


def _difference(finding: Finding) -> Difference:
    return Difference(finding.name, finding.rows[:SHOWN_ROWS], len(finding.rows), f"{finding.state.value}: {finding.detail}")


def _whole_tensors(checkpoint: Checkpoint, pack: Pack) -> list[Difference]:
    altered = []
    for delta in pack:
        identity = pack.manifest.base.tensors[delta.name]
        if checkpoint.info(delta.name).dtype != identity.dtype:
            continue  # widened: its bytes have no digest in the pack
        altered += _compare_whole(delta.name, identity.sha256, _digest_whole(checkpoint, delta.name, None, None))
    return altered


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


def _against_ledger(
    checkpoint: Checkpoint, state_dir: StateDir, applied: Sequence[LedgerEntry], base: Checkpoint | None, *, full: bool
) -> _Result:
    packs = load_packs(state_dir, applied)
    labels = tuple(entry.label for entry in applied)
    found = look(checkpoint, state_dir, applied, packs, base)
    differences = [one.difference for one in found if one.difference is not None]
    if differences:
        lost = [one for one in found if one.difference is not None]
        if all(one.holds is Holds.BEFORE for one in found):
            detail = f"the ledger names {', '.join(labels)}, and the rows hold what was there before"
            return Verdict.MISSING, labels, len(found), differences, detail
        half = all(one.holds is Holds.BEFORE or one.old == one.difference.count for one in lost if one.difference)
        detail = f"not what {', '.join(labels)} left" + (": some rows hold what they held before" if half else "")
        return Verdict.HALF if half else Verdict.ALTERED, labels, len(found), differences, detail
    if full and (altered := _whole_below(checkpoint, layers_of(state_dir, applied, packs))):
        return Verdict.ALTERED, labels, len(found), altered, "the patched rows are right, but tensors differ elsewhere"
    came = "; the ledger came with the model, the packs confirm it" if any(entry.foreign for entry in applied) else ""
    doses = (f" at strength {entry.strength:g}" if entry.strength != 1 else "" for entry in applied)
    held = ", ".join(label + dose for label, dose in zip(labels, doses, strict=True))
    return Verdict.PATCHED, labels, len(found), [], f"holds {held}{came}"


def _whole_below(checkpoint: Checkpoint, stacks: Mapping[str, Sequence[Layer]]) -> list[Difference]:
    """Whole tensors with all packs taken away again in memory, compared with the base digests in the packs."""
    altered = []
    for name, layers in sorted(stacks.items()):
        info = checkpoint.info(name)
        identity = layers[0].pack.manifest.base.tensors[name]
        entry = layers[0].entry
        if info.dtype != identity.dtype or (entry.base_mismatch_allowed and not entry.foreign):
            continue  # no digest to compare with
        rows = np.unique(np.concatenate([layer.delta.rows.astype(np.int64) for layer in layers]))
        values = checkpoint.read_rows(name, rows)
        for layer in reversed(layers):
            where = np.searchsorted(rows, layer.delta.rows)
            (data,) = layer.record.residuals(name, iter([layer.delta.neurons * info.row_bytes]))
            lacking = np.frombuffer(data, f"<u{values.dtype.itemsize}").reshape(layer.delta.neurons, -1)
            values[where] = restored(values[where], lacking, layer.delta.dense(), layer.entry.strength)
        altered += _compare_whole(name, identity.sha256, _digest_whole(checkpoint, name, rows, values))
    return altered
