"""Which state is this model in? Answered from the touched rows, against the ledger or a pack; `full` hashes whole tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nestpatch.errors import PackError
from nestpatch.formats import nest
from nestpatch.formats.interface import Checkpoint, IntArray, row_blocks
from nestpatch.pack import Pack, TensorDelta
from nestpatch.patcher.identity import APPLICABLE, Finding, State, examine
from nestpatch.patcher.ledger import Entry, read_ledger
from nestpatch.patcher.place import Place
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.undo import UndoReader, checksums, restored
from nestpatch.patcher.work import load_packs
from nestpatch.rows import Rows

SHOWN_ROWS = 5


class Verdict(Enum):
    """The state of a model."""

    BASE = "base"
    PATCHED = "patched"
    HALF = "half patched"
    ALTERED = "altered"
    UNKNOWN = "unknown"


KNOWN = (Verdict.BASE, Verdict.PATCHED)


@dataclass(frozen=True)
class Difference:
    """One tensor that does not hold what it should."""

    tensor: str
    rows: tuple[int, ...]
    """The first rows that differ; empty where rows cannot be told."""
    count: int
    detail: str


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

    @property
    def known(self) -> bool:
        return self.verdict in KNOWN


def verify(model: str | Path, patch: str | Path | Pack | None = None, *, full: bool = False) -> Verification:
    """Compares the rows that packs touch with what the ledger, the pack, or the kept packs say of them.

    Raises CheckpointError, PackError, LedgerError or UndoError.
    """
    began = time.perf_counter()
    checkpoint, place = open_model(model)
    ledger = read_ledger(place.ledger)
    pack = nest.read(patch) if isinstance(patch, (str, Path)) else patch
    if ledger.applied:
        result = _against_ledger(checkpoint, place, ledger.applied, pack, full=full)
    else:
        candidates = [pack] if pack is not None else _kept_packs(place, [str(e.get("pack_id")) for e in ledger.history])
        result = _against_packs(checkpoint, candidates, full=full)
    verdict, packs, tensors, differences, detail = result
    return Verification(verdict, packs, tensors, tuple(differences), detail, full, time.perf_counter() - began)


_Result = tuple[Verdict, tuple[str, ...], int, list[Difference], str]


def _kept_packs(place: Place, pack_ids: Sequence[str]) -> list[Pack]:
    packs = []
    for pack_id in dict.fromkeys(pack_ids):
        try:
            packs.append(nest.read(place.pack(pack_id)))
        except PackError:  # it only served this comparison
            continue
    return packs


def _against_packs(checkpoint: Checkpoint, packs: Sequence[Pack], *, full: bool) -> _Result:
    if not packs:
        return Verdict.UNKNOWN, (), 0, [], "nestpatch knows nothing of this model; give the patch to compare with"
    best: _Result | None = None
    for pack in packs:
        result = _against_pack(checkpoint, pack, full=full)
        if best is None or result[0] in KNOWN:
            best = result
    assert best is not None  # noqa: S101 - packs is not empty
    return best


def _against_pack(checkpoint: Checkpoint, pack: Pack, *, full: bool) -> _Result:
    findings = examine(pack, checkpoint)
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
    info, state = checkpoint.info(name), sha256()
    for part in row_blocks(info.rows, info.row_bytes, info.stretch):
        block = checkpoint.read_rows(name, np.arange(part.start, part.stop))
        if rows is not None and values is not None:
            inside = (rows >= part.start) & (rows < part.stop)
            block[rows[inside] - part.start] = values[inside]
        state.update(block.view(np.uint8).data)
    return state.hexdigest()


def _against_ledger(
    checkpoint: Checkpoint, place: Place, applied: Sequence[Entry], pack: Pack | None, *, full: bool
) -> _Result:
    packs = load_packs(place, applied)
    labels = tuple(entry.label for entry in applied)
    records = [UndoReader(place.undo(entry.undo), [delta.name for delta in packs[entry.pack_id]]) for entry in applied]
    differences: list[Difference] = []
    reverted, tensors = 0, 0
    covered: dict[str, IntArray] = {}
    for entry, record in zip(reversed(applied), reversed(records), strict=True):
        for delta in packs[entry.pack_id]:
            tensors += 1
            above = covered.get(delta.name, np.empty(0, np.int64))
            found = _check_tensor(checkpoint, entry, delta, record, above)
            covered[delta.name] = np.union1d(above, delta.rows.astype(np.int64))
            if found is not None:
                differences.append(found[0])
                reverted += found[1]
    if differences:
        half = reverted == sum(difference.count for difference in differences)
        verdict = Verdict.HALF if half else Verdict.ALTERED
        detail = f"not what {', '.join(labels)} left" + (": some rows hold what they held before" if half else "")
        return verdict, labels, tensors, differences, detail
    if full and (altered := _whole_below(checkpoint, applied, packs, records)):
        return Verdict.ALTERED, labels, tensors, altered, "the patched rows are right, but tensors differ elsewhere"
    detail = f"holds {', '.join(labels)}"
    if pack is not None and nest.pack_id(pack) not in packs:
        detail += f"; {pack.label} is not applied"
    return Verdict.PATCHED, labels, tensors, [], detail


def _check_tensor(
    checkpoint: Checkpoint, entry: Entry, delta: TensorDelta, record: UndoReader, above: IntArray
) -> tuple[Difference, int] | None:
    """The difference of one tensor's rows and how many of them hold what they held before; None when all is right.

    Rows that a pack above changed again are that pack's business.
    """
    info = checkpoint.info(delta.name)
    state, sums = sha256(), []
    for part in row_blocks(delta.neurons, info.row_bytes, info.stretch):
        rows = checkpoint.read_rows(delta.name, delta.rows[part].astype(np.int64))
        state.update(rows.view(np.uint8).data)
        sums.append(checksums(rows))
    expected = entry.tensors[delta.name].after
    if state.hexdigest() == expected:
        return None
    visible = ~np.isin(delta.rows, above)
    before, after = record.checksums(delta.name)
    found: npt.NDArray[np.uint64] = np.concatenate(sums)
    wrong = visible & (found != after)
    if not wrong.any():
        # Only rows that a pack above changed differ, as they must, unless a checksum was fooled.
        return None if not visible.all() else (Difference(delta.name, (), 0, "digests differ, checksums do not"), 0)
    old = int((wrong & (found == before)).sum())
    rows_found = tuple(delta.rows[wrong][:SHOWN_ROWS].tolist())
    count = int(wrong.sum())
    where = f"row {rows_found[0]}" + (f" and {count - 1} more" if count > 1 else "")
    held = f"{old} of them hold what they held before {entry.label}" if old else f"neither before nor after {entry.label}"
    detail = f"{where}: {held}; rows sha256 {state.hexdigest()[:12]}.. instead of {expected[:12]}.."
    return Difference(delta.name, rows_found, count, detail), old


def _whole_below(
    checkpoint: Checkpoint, applied: Sequence[Entry], packs: dict[str, Pack], records: Sequence[UndoReader]
) -> list[Difference]:
    """Whole tensors with all packs taken away again in memory, compared with the base digests in the packs."""
    altered = []
    for name in sorted({delta.name for pack in packs.values() for delta in pack}):
        info = checkpoint.info(name)
        layers = [
            (entry, delta, record)
            for entry, record in zip(applied, records, strict=True)
            for delta in packs[entry.pack_id]
            if delta.name == name
        ]
        identity = packs[layers[0][0].pack_id].manifest.base.tensors[name]
        if info.dtype != identity.dtype or layers[0][0].base_mismatch_allowed:
            continue  # no digest to compare with
        rows = np.unique(np.concatenate([delta.rows.astype(np.int64) for _, delta, _ in layers]))
        values = checkpoint.read_rows(name, rows)
        for entry, delta, record in reversed(layers):
            where = np.searchsorted(rows, delta.rows)
            (data,) = record.residuals(name, iter([delta.neurons * info.row_bytes]))
            lacking = np.frombuffer(data, f"<u{values.dtype.itemsize}").reshape(delta.neurons, -1)
            values[where] = restored(values[where], lacking, delta.dense(), entry.strength)
        altered += _compare_whole(name, identity.sha256, _digest_whole(checkpoint, name, rows, values))
    return altered
