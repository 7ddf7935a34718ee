"""Whether the rows of a model hold what its ledger says, tensor by tensor.

For an entry that this machine wrote, the digests in the ledger are compared with the rows. An entry that came with the model is
not trusted: the pack's own digests decide. Where the rows are not simply the pack's result (another strength, a stack, another
dtype), the undo record is followed down to the base in memory; that counts only when merging leads to the same rows again, and
when the base has the digest that the pack names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, LedgerError, PackContentError, QuantizationError, UndoError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.pack import Pack
from nestpatch.patcher._undo import UndoReader, bits, checksums, restored
from nestpatch.patcher.findings import Finding, State, evidence_of
from nestpatch.patcher.identity import examine, is_base
from nestpatch.patcher.ledger import LedgerEntry
from nestpatch.patcher.merge import FROM_ROWS, LEAST_RETENTION, QuantizedMerge, Retention, fitted, merged_rows, touched_block
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.touched import touched_digests, working_bytes
from nestpatch.rows import Rows, inner, united
from nestpatch.values import dataclass

SHOWN_ROWS = 5
"""Row numbers that a difference names."""
Missing: TypeAlias = Mapping[str, frozenset[str]]
"""Pack id -> the tensors in which the pack is missing, for packs that are missing in some."""


class Holds(Enum):
    """What the rows of one tensor hold where a pack was applied."""

    PACK = "the pack"
    BEFORE = "what was there before the pack"
    OTHER = "something else"


@dataclass(frozen=True)
class Difference:
    """One tensor that does not hold what it should."""

    tensor: str
    rows: tuple[int, ...]
    """The first rows that differ; empty where rows cannot be named."""
    count: int
    detail: str

    def as_json(self) -> dict[str, Any]:
        """The difference for `--json`."""
        return {"tensor": self.tensor, "rows": self.count, "first_rows": list(self.rows), "detail": self.detail}


@dataclass(frozen=True)
class HeldTensor:
    """One tensor of one applied pack."""

    entry: LedgerEntry
    tensor: str
    holds: Holds
    difference: Difference | None = None
    """None where the rows hold the pack."""
    old: int = 0
    """How many of the rows that differ hold what they held before."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One applied pack over one tensor."""

    entry: LedgerEntry
    pack: Pack
    delta: TensorDelta
    record: UndoReader

    def undone(self, current: Rows, info: TensorInfo) -> Rows:
        """What its rows held before the pack, by the undo record; block by block, as a change may touch all rows.

        Args:
            current: What its rows hold, [neurons, in_features] in the stored dtype, or uint8 [neurons, row_bytes].
            info: The tensor.

        Returns:
            The same form.

        Raises:
            UndoError: The record is damaged.
        """
        original, parts = np.empty_like(current), list(info.blocks(len(current)))
        found = self.record.residuals(self.delta.name, (current[part].nbytes for part in parts))
        for part, data in zip(parts, found, strict=True):
            lacking = np.frombuffer(data, f"<u{current.dtype.itemsize}").reshape(current[part].shape)
            original[part] = restored(current[part], lacking, self.delta.dense(part.start, part.stop), self.entry.strength)
        return original


def layers_of(state_dir: StateDir, applied: Sequence[LedgerEntry], packs: Mapping[str, Pack]) -> dict[str, list[Layer]]:
    """The packs over every tensor, with their undo records.

    Args:
        state_dir: The state of the model.
        applied: The ledger's entries, bottom first.
        packs: Pack id -> pack, for all of them.

    Returns:
        Tensor name -> the packs over it, bottom first.

    Raises:
        UndoError: An undo record is missing or broken.
    """
    layers: dict[str, list[Layer]] = {}
    for entry in applied:
        pack = packs[entry.pack_id]
        record = UndoReader(state_dir.undo(entry.undo), [delta.name for delta in pack])
        for delta in pack:
            layers.setdefault(delta.name, []).append(Layer(entry, pack, delta, record))
    return layers


def look(
    checkpoint: Checkpoint,
    state_dir: StateDir,
    applied: Sequence[LedgerEntry],
    packs: Mapping[str, Pack],
    base: Checkpoint | None = None,
    *,
    down_to_base: bool = False,
) -> list[HeldTensor]:
    """What the rows of every applied pack hold.

    Args:
        checkpoint: The model.
        state_dir: Its state.
        applied: The ledger's entries, bottom first.
        packs: Pack id -> pack, for all of them.
        base: The float model, for rows that were rounded.
        down_to_base: Follows the undo records of entries that came with the model even where the rows are plainly the pack's
            result, because they are about to be used.

    Returns:
        One value per tensor of every pack; the pack on top first.

    Raises:
        UndoError: An undo record is missing or broken.
        CheckpointError: Rows cannot be read.
        LedgerError: A pack changes tensors that the model does not have.
    """
    for entry in applied:
        _require_fit(checkpoint, entry, packs[entry.pack_id])
    layers = layers_of(state_dir, applied, packs)
    examined = {
        entry.pack_id: {finding.name: finding for finding in _examined(packs[entry.pack_id], checkpoint, base)}
        for entry in applied
        if entry.foreign
    }
    ours = {name for name, stack in layers.items() if not any(layer.entry.foreign for layer in stack)}
    digests = {
        entry.pack_id: touched_digests([delta for delta in packs[entry.pack_id] if delta.name in ours], checkpoint)
        for entry in applied
    }
    found: list[HeldTensor] = []
    for name, stack in layers.items():
        if name in ours:
            found += _by_ledger(checkpoint, stack, [digests[layer.entry.pack_id][name] for layer in stack])
            continue
        findings = [examined.get(layer.entry.pack_id, {}).get(name) for layer in stack]
        if len(stack) == 1 and not down_to_base and _is_plainly_there(stack[0], findings[0]):
            found.append(HeldTensor(stack[0].entry, name, Holds.PACK))
            continue
        proofs = _prove(checkpoint, name, stack, base)
        found += [_judged(*one, strict=down_to_base) for one in zip(stack, findings, proofs, strict=True)]
    order = {entry.pack_id: number for number, entry in enumerate(applied)}
    return sorted(found, key=lambda one: (-order[one.entry.pack_id], one.tensor))


def _require_fit(checkpoint: Checkpoint, entry: LedgerEntry, pack: Pack) -> None:
    for delta in pack:
        expected = pack.manifest.base.tensors[delta.name].shape
        found = checkpoint.info(delta.name).shape if checkpoint.has(delta.name) else None
        if found != expected:
            raise LedgerError(
                f"the ledger names {entry.label}, which was made for another model: expected {delta.name} of shape "
                f"{list(expected)}, found {list(found) if found is not None else 'no such tensor'}"
            )


def _examined(pack: Pack, checkpoint: Checkpoint, base: Checkpoint | None) -> list[Finding]:
    """The findings, by the pack's own sketches where `base` is not its float base.

    The evidence of rounded tensors is that of all of them together.
    """
    try:
        findings = examine(pack, checkpoint, base)
    except (BaseMismatchError, QuantizationError):
        findings = examine(pack, checkpoint)
    together = evidence_of(findings)
    return [replace(found, evidence=together) if found.state is State.ROUNDED else found for found in findings]


def missing(found: Sequence[HeldTensor]) -> Missing:
    """The packs that are missing in the rows.

    Args:
        found: What `look` returned.

    Returns:
        Pack id -> the tensors in which it is missing.

    Raises:
        BaseMismatchError: Rows hold neither the pack nor what was there before: putting the pack back would hide that.
    """
    for one in found:
        if one.holds is Holds.OTHER and one.difference is not None:
            raise BaseMismatchError(
                f"{one.tensor} no longer holds what {one.entry.label} wrote: {one.difference.detail}",
                advice="Something else changed the model. `nestpatch verify MODEL` names the rows. Nothing was changed now.",
            )
    gone: dict[str, set[str]] = {}
    for one in found:
        if one.holds is Holds.BEFORE:
            gone.setdefault(one.entry.pack_id, set()).add(one.tensor)
    return {pack_id: frozenset(names) for pack_id, names in gone.items()}


def require_proven(found: Sequence[HeldTensor]) -> None:
    """Checks the undo records of entries that came with the model.

    Args:
        found: What `look` returned, with `down_to_base`.

    Raises:
        UndoError: A record is not proven to lead to the pack's base.
    """
    for one in found:
        if one.entry.foreign and one.holds is Holds.OTHER and one.difference is not None:
            raise UndoError(
                f"the undo record of {one.entry.label} came with the model, and nothing proves that it leads back to the base "
                f"of that pack: {one.tensor}: {one.difference.detail}",
                advice="Get the base model again from where it came from; or, for a quantized model, give --base.",
            )


def _by_ledger(checkpoint: Checkpoint, stack: Sequence[Layer], digests: Sequence[str]) -> list[HeldTensor]:
    """Compares with the digests that this machine recorded, top first. Rows that a pack above changed again are skipped."""
    found, above = [], np.empty(0, np.int64)
    for layer, rows_sha256 in zip(reversed(stack), reversed(digests), strict=True):
        found.append(_compare(checkpoint, layer, above, rows_sha256))
        above = united([above, layer.delta.rows])
    if len(stack) > 1 and any(one.holds is Holds.OTHER for one in found) and _all_before(checkpoint, stack):
        return [replace(one, holds=Holds.BEFORE) for one in found]
    return found


def _all_before(checkpoint: Checkpoint, stack: Sequence[Layer]) -> bool:
    """Whether the rows hold what was there before the lowest of several packs, each row that of the lowest over it."""
    base: dict[int, int] = {}
    for layer in stack:
        before, _ = layer.record.checksums(layer.delta.name, layer.delta.neurons)
        for row, checksum in zip(layer.delta.rows.tolist(), before.tolist(), strict=True):
            base.setdefault(row, checksum)
    rows = np.array(sorted(base), np.int64)
    sums = checksums(checkpoint.read_rows(stack[0].delta.name, rows))
    return bool(np.array_equal(sums, np.array([base[row] for row in rows.tolist()], np.uint64)))


def _compare(checkpoint: Checkpoint, layer: Layer, above: IntArray, rows_sha256: str) -> HeldTensor:
    entry, delta = layer.entry, layer.delta
    expected = entry.tensors[delta.name]
    if rows_sha256 == expected.after:
        return HeldTensor(entry, delta.name, Holds.PACK)
    sums = np.concatenate([checksums(rows) for _, rows in checkpoint.iter_rows(delta.name, delta.rows)])
    visible = ~np.isin(delta.rows, above)
    before, after = layer.record.checksums(delta.name, delta.neurons)
    wrong = visible & (sums != after)
    if not wrong.any() and not visible.all():
        return HeldTensor(entry, delta.name, Holds.PACK)  # only rows that a pack above changed differ
    old = int((wrong & (sums == before)).sum())
    holds = Holds.BEFORE if rows_sha256 == expected.before else Holds.OTHER
    return HeldTensor(entry, delta.name, holds, _difference(layer, wrong, old, rows_sha256), old)


def _difference(layer: Layer, wrong: npt.NDArray[np.bool_], old: int, found: str) -> Difference:
    delta, label, expected = layer.delta, layer.entry.label, layer.entry.tensors[layer.delta.name].after
    if not wrong.any():
        return Difference(delta.name, (), 0, "digests differ, checksums do not")
    rows, count = tuple(delta.rows[wrong][:SHOWN_ROWS].tolist()), int(wrong.sum())
    where = f"row {rows[0]}" + (f" and {count - 1} more" if count > 1 else "")
    held = f"{old} of them hold what they held before {label}" if old else f"neither before nor after {label}"
    return Difference(delta.name, rows, count, f"{where}: {held}; rows sha256 {found[:12]}.. instead of {expected[:12]}..")


@dataclass(frozen=True)
class _Proof:
    """What following the undo record of one layer showed."""

    remade: bool
    """Whether merging leads from the restored rows to the rows in the file."""
    covered: bool
    """Whether a pack above changed some of its rows again."""
    leads_to_base: bool
    """Whether the restored rows are the base that the pack names."""


def _prove(checkpoint: Checkpoint, name: str, stack: Sequence[Layer], base: Checkpoint | None) -> list[_Proof]:
    """Follows the undo records of a tensor's packs down to the base, in memory. One proof a layer, bottom first."""
    rows = united(layer.delta.rows for layer in stack)
    values = checkpoint.read_rows(name, rows)
    remade, covered = [], []
    above = np.empty(0, np.int64)
    for layer in reversed(stack):
        places = np.searchsorted(rows, layer.delta.rows)
        current = values[places]
        original = layer.undone(current, checkpoint.info(name))
        remade.append(_is_remade(checkpoint, layer, original, current, base))
        covered.append(bool(np.isin(layer.delta.rows, above).any()))
        values[places] = original
        above = united([above, layer.delta.rows])
    proofs = []
    for layer, again, over in zip(stack, reversed(remade), reversed(covered), strict=True):
        identity = layer.pack.manifest.base.tensors[name]
        bottom = is_base(layer.delta, identity, checkpoint, values[np.searchsorted(rows, layer.delta.rows)], base)
        proofs.append(_Proof(again, over, bottom))
    return proofs


def _is_remade(checkpoint: Checkpoint, layer: Layer, original: Rows, current: Rows, base: Checkpoint | None) -> bool:
    delta, dtype = layer.delta, layer.pack.manifest.base.tensors[layer.delta.name].dtype
    quantized = QuantizedMerge(None if layer.entry.rounding.startswith(FROM_ROWS) else base, "dither" in layer.entry.rounding)
    info: TensorInfo = fitted(checkpoint, delta, quantized.base)
    total = Retention()
    try:
        for part in info.blocks(delta.neurons, working_bytes(info)):
            change = delta.dense(part.start, part.stop)
            block = touched_block(info, delta, dtype, part, original[part], quantized.base)
            made, retention = merged_rows(block, change, layer.entry.strength, dither=quantized.dither)
            total += retention
            if not np.array_equal(bits(made), bits(np.ascontiguousarray(current[part]))):
                return False
    except (PackContentError, QuantizationError):
        return False
    if info.plain and layer.pack.manifest.base.tensors[delta.name].quantized:
        total = _delivered(info, layer, original, current)  # no digest tells such a base from the merged rows
    elif info.plain or quantized.base is not None:
        return True
    # Rounding can lose a change, and some packs change nothing: the same rows prove nothing then.
    return total.requested > 0 and total.share >= LEAST_RETENTION


def _delivered(info: TensorInfo, layer: Layer, original: Rows, current: Rows) -> Retention:
    """How much of a layer's change is between two states of its rows."""
    total = Retention()
    for part in info.blocks(layer.delta.neurons):
        wanted = layer.entry.strength * layer.delta.dense(part.start, part.stop).astype(np.float64)
        moved = info.decoded(current[part]).astype(np.float64) - info.decoded(original[part])
        total += Retention(inner(moved, wanted), inner(wanted, wanted))
    return total


def _is_plainly_there(layer: Layer, finding: Finding | None) -> bool:
    return finding is not None and finding.state is State.PATCHED and layer.entry.strength == 1.0


def _judged(layer: Layer, finding: Finding | None, proof: _Proof, *, strict: bool) -> HeldTensor:
    """The result for an entry that came with the model, from the examined rows and the followed undo record."""
    entry, name = layer.entry, layer.delta.name
    before = HeldTensor(entry, name, Holds.BEFORE, Difference(name, (), 0, "still holds the base"))
    if finding is not None and finding.state in (State.BASE, State.WIDENED):
        # Also where a pack changes nothing, so that its result is the base.
        return before
    plainly = _is_plainly_there(layer, finding) and not proof.covered
    if (proof.leads_to_base and proof.remade) or (plainly and not strict):
        return HeldTensor(entry, name, Holds.PACK)
    if finding is not None and finding.evidence is not None and finding.evidence.unpatched:
        return before
    reason = finding.detail if finding is not None and finding.detail else "the rows do not show it"
    detail = f"nothing proves that it holds {entry.label}: {reason}"
    return HeldTensor(entry, name, Holds.OTHER, Difference(name, finding.rows[:SHOWN_ROWS] if finding else (), 0, detail))
