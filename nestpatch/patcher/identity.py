"""Is this the base that a pack was made for? Told tensor by tensor from the touched rows, a few megabytes at a time.

Digests decide where rows can be the base's own. Rows that were rounded on the way into a file are compared with the float base
where that is at hand, else by sketches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256

import numpy as np

from nestpatch.errors import BaseMismatchError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.pack import Pack, TensorDelta, TensorIdentity
from nestpatch.patcher.merge import fitted, rows_of, working_bytes
from nestpatch.rows import DTYPES, SKETCH_MATCH, FloatArray, Rows, merge, sketch, sketch_correlation

ROW_TOLERANCE = 0.05
"""How far a row's sketch may lie from the pack's before the message calls the row changed."""
COARSE_MATCH = 0.85
"""The same for types of under four bits, whose rounding is louder."""
SURE = 3.0
"""Standard deviations from which rounded rows count as patched. In doubt they are the base: a patch that cannot be seen is
refused anyway when it is made from such rows, and made from the float base it gives the same rows again."""
WITNESSES = 16
"""Untouched rows that show how a tensor was rounded."""
ROUNDING = 1.5
"""How much farther from the float base than plain quantization rows may be: other quantizers weigh errors otherwise."""


class State(Enum):
    """What the touched rows of one tensor turned out to be."""

    BASE = "base"
    WIDENED = "the base, stored in another dtype"
    ROUNDED = "the base, as far as rounded rows tell"
    PATCHED = "already patched with this pack"
    CHANGED = "near the base, but changed: fine-tuned, patched otherwise, or damaged"
    FOREIGN = "another model"
    MISSING = "missing"
    SHAPE = "of another shape"


APPLICABLE = (State.BASE, State.WIDENED, State.ROUNDED)


@dataclass(frozen=True)
class Evidence:
    """How much nearer rounded rows are to the base than to what the pack makes of it. Tensors add up."""

    difference: float
    """Of squared distances: positive for the base, negative for the patched base."""
    variance: float
    """Of that difference, by the noise of the rounding."""

    @classmethod
    def of(cls, near: float, far: float, pack: float, count: int) -> Evidence:
        """From the squared distances to the base and to the patched base, that between the two, and the numbers compared."""
        return cls(far - near, 4 * min(near, far) / max(1, count) * pack)

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.difference + other.difference, self.variance + other.variance)

    @property
    def patched(self) -> bool:
        """Whether the pack is in the rows, beyond doubt."""
        return self.difference < -SURE * math.sqrt(self.variance)

    @property
    def unpatched(self) -> bool:
        """Whether the pack is not in the rows, beyond doubt."""
        return self.difference > SURE * math.sqrt(self.variance)


NO_EVIDENCE = Evidence(0, 0)


@dataclass(frozen=True)
class Finding:
    """One tensor of the pack, as found in a checkpoint."""

    name: str
    state: State
    detail: str = ""
    rows: tuple[int, ...] = ()
    """The rows that differ from the base, as far as sketches tell."""
    evidence: Evidence | None = None
    """Of rounded rows: whether the pack is in them."""


def examine(pack: Pack, checkpoint: Checkpoint, base: Checkpoint | None = None) -> list[Finding]:
    """Finds out, tensor by tensor, what a checkpoint holds where the pack would change it.

    `base`: the float model, for rows that were rounded.

    Raises BaseMismatchError when `base` is not the base of the pack, QuantizationError when rows were quantized in a way that
    cannot be repeated.
    """

    def look(delta: TensorDelta) -> Finding:
        identity = pack.manifest.base.tensors[delta.name]
        if not checkpoint.has(delta.name):
            return Finding(delta.name, State.MISSING)
        info = checkpoint.info(delta.name)
        if info.shape != identity.shape:
            return Finding(delta.name, State.SHAPE, f"{list(info.shape)} instead of {list(identity.shape)}")
        return _examine_rows(delta, identity, pack.manifest.result[delta.name], checkpoint, base)

    findings = [look(delta) for delta in pack]
    if evidence_of(findings).patched:
        return [replace(f, state=State.PATCHED) if f.state is State.ROUNDED else f for f in findings]
    return findings


def evidence_of(findings: Sequence[Finding]) -> Evidence:
    """Of all rounded tensors together: a single one's noise may be louder than a small patch."""
    return sum((f.evidence for f in findings if f.state is State.ROUNDED and f.evidence is not None), NO_EVIDENCE)


def _examine_rows(
    delta: TensorDelta, identity: TensorIdentity, result: str, checkpoint: Checkpoint, base: Checkpoint | None
) -> Finding:
    info = checkpoint.info(delta.name)
    digest = ""
    if info.plain:
        state, digest = _by_digest(delta, identity, result, checkpoint)
        if state is not None:
            detail = f"{info.dtype} instead of {identity.dtype}" if state is State.WIDENED else ""
            return Finding(delta.name, state, detail)
    if info.plain and (info.dtype == identity.dtype or not checkpoint.converted):
        return _describe_stranger(delta, identity, digest, checkpoint)
    return _by_sketch(delta, checkpoint) if base is None else _against_base(delta, identity, checkpoint, base)


def _blocks(delta: TensorDelta, checkpoint: Checkpoint) -> Iterator[tuple[slice, Rows]]:
    """The touched rows as they are stored."""
    return checkpoint.iter_rows(delta.name, delta.rows, row_bytes=working_bytes(checkpoint.info(delta.name)))


def _by_digest(delta: TensorDelta, identity: TensorIdentity, result: str, checkpoint: Checkpoint) -> tuple[State | None, str]:
    """(what the digests tell, the digest of the stored rows)."""
    info = checkpoint.info(delta.name)
    stored, narrowed = sha256(), sha256()
    # A narrower safetensors copy is none: a small delta would be rounded away in it.
    narrower = DTYPES[info.dtype].itemsize < DTYPES[identity.dtype].itemsize
    other = info.dtype != identity.dtype and (checkpoint.converted or not narrower)
    for _, rows in _blocks(delta, checkpoint):
        stored.update(rows.view(np.uint8).data)
        narrow = _narrow(rows, identity.dtype) if other else None
        other = narrow is not None
        if narrow is not None:
            narrowed.update(narrow.view(np.uint8).data)
    digest = stored.hexdigest()
    if info.dtype == identity.dtype and digest == identity.rows_sha256:
        return State.BASE, digest
    if other and narrowed.hexdigest() == identity.rows_sha256:
        return State.WIDENED, digest
    return (State.PATCHED if digest == result else None), digest


def _narrow(rows: Rows, dtype: str) -> Rows | None:
    """The rows in another dtype, or None when that would lose something."""
    with np.errstate(over="ignore"):
        narrow = rows.astype(DTYPES[dtype])
        return narrow if np.array_equal(narrow.astype(rows.dtype), rows) else None


def is_base(
    delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, rows: Rows, base: Checkpoint | None = None
) -> bool:
    """Whether rows in memory, in the form in which a file holds them, are the base of a pack.

    By digest; where they were rounded by `base`, the float model, or without it by their sketch.

    rows: [neurons, in_features] in the stored dtype, or uint8 [neurons, row_bytes].
    """
    info = checkpoint.info(delta.name)
    if info.plain:
        narrow = rows if info.dtype == identity.dtype else _narrow(rows, identity.dtype)
        if narrow is not None:
            return sha256(np.ascontiguousarray(narrow).view(np.uint8).data).hexdigest() == identity.rows_sha256
    if base is not None:
        return _is_rounded_base(delta, identity, checkpoint, np.ascontiguousarray(rows), base)
    match = COARSE_MATCH if info.coding.bits < 4 else SKETCH_MATCH
    return sketch_correlation(delta.sketch, sketch(info.coding.decode(np.ascontiguousarray(rows).view(np.uint8)))) >= match


def _is_rounded_base(
    delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, rows: Rows, base: Checkpoint
) -> bool:
    try:
        _require_base(delta, identity, checkpoint.info(delta.name), base)
        info, facts = fitted(checkpoint, delta, base), _Distances()
    except (BaseMismatchError, QuantizationError):
        return False
    for part in info.blocks(delta.neurons, working_bytes(info)):
        origin = base.read_rows(delta.name, rows_of(delta, part))
        goal = merge(origin, delta.dense(part.start, part.stop))
        facts.add(rows[part].view(np.uint8), info, origin.astype(np.float32), goal.astype(np.float32))
    found = facts.finding(delta.name, info)
    if found.state is State.BASE or _rounds_plainly(delta, info, checkpoint, base):
        return found.state is State.BASE
    return found.state is State.ROUNDED and not (found.evidence is not None and found.evidence.patched)


def _rounds_plainly(delta: TensorDelta, info: TensorInfo, checkpoint: Checkpoint, base: Checkpoint) -> bool:
    """Whether rows that the pack leaves alone are, bit for bit, the base's own rows after plain rounding."""
    spared = np.setdiff1d(np.arange(info.rows), delta.rows)[:WITNESSES]
    origin = base.read_rows(delta.name, spared).astype(np.float32)
    stored = checkpoint.read_rows(delta.name, spared).view(np.uint8)
    return len(spared) > 0 and np.array_equal(info.coding.encode(origin), stored)


def _describe_stranger(delta: TensorDelta, identity: TensorIdentity, digest: str, checkpoint: Checkpoint) -> Finding:
    # Only now: sketches take longer than digests.
    found = np.concatenate([sketch(rows) for _, rows in _blocks(delta, checkpoint)])
    likeness = sketch_correlation(delta.sketch, found)
    off = np.flatnonzero(np.abs(delta.sketch.astype(np.float32) - found.astype(np.float32)).max(axis=1) > ROW_TOLERANCE)
    where = f", first at row {int(delta.rows[off[0]])}, {len(off)} of {delta.neurons} rows differ" if len(off) else ""
    detail = f"rows sha256 {digest[:12]}.. instead of {identity.rows_sha256[:12]}.., likeness {likeness:.2f}{where}"
    rows = tuple(int(row) for row in delta.rows[off])
    return Finding(delta.name, State.CHANGED if likeness >= SKETCH_MATCH else State.FOREIGN, detail, rows)


def _by_sketch(delta: TensorDelta, checkpoint: Checkpoint) -> Finding:
    """Rounded rows without their base: the sketches of the rows, and of the rows with the patch taken away."""
    info = checkpoint.info(delta.name)
    as_is, without = [], []
    for part, rows in _blocks(delta, checkpoint):
        plain = info.coding.decode(rows.view(np.uint8))
        as_is.append(sketch(plain))
        without.append(sketch(plain - delta.dense(part.start, part.stop)))
    found, reverted = np.concatenate(as_is), np.concatenate(without)
    likenesses = sketch_correlation(delta.sketch, found), sketch_correlation(delta.sketch, reverted)
    detail = f"{info.dtype}, likeness {likenesses[0]:.2f}"
    match = COARSE_MATCH if info.coding.bits < 4 else SKETCH_MATCH
    if max(likenesses) < match:
        return Finding(delta.name, State.FOREIGN, detail)
    if likenesses[0] < match:
        return Finding(delta.name, State.PATCHED, f"{info.dtype}, likeness {likenesses[1]:.2f} without the patch")
    origin, near, far = (part.astype(np.float64) for part in (delta.sketch, found, reverted))
    to_base, to_patched, patch = (float(np.square(gap).sum()) for gap in (near - origin, far - origin, near - far))
    return Finding(delta.name, State.ROUNDED, detail, evidence=Evidence.of(to_base, to_patched, patch, origin.size))


def _against_base(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, base: Checkpoint) -> Finding:
    """Rounded rows beside the float rows that they were made of."""
    # In the same parts as below: a base on the Hub keeps what it has fetched.
    _require_base(delta, identity, checkpoint.info(delta.name), base)
    info, facts = fitted(checkpoint, delta, base), _Distances()
    for part, rows in _blocks(delta, checkpoint):
        origin = base.read_rows(delta.name, rows_of(delta, part))
        goal = merge(origin, delta.dense(part.start, part.stop))
        facts.add(rows.view(np.uint8), info, origin.astype(np.float32), goal.astype(np.float32))
    return facts.finding(delta.name, info)


def _require_base(delta: TensorDelta, identity: TensorIdentity, info: TensorInfo, base: Checkpoint) -> None:
    """Raises BaseMismatchError when a tensor is not that of the pack's base. `info` is that of the rounded one."""
    name = delta.name
    if not base.has(name) or (base.info(name).dtype, base.info(name).shape) != (identity.dtype, identity.shape):
        found = f"{base.info(name).dtype} {list(base.info(name).shape)}" if base.has(name) else "nothing"
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: it has {found} as {name}, "
            f"the base {identity.dtype} {list(identity.shape)}"
        )
    state = sha256()
    for part in info.blocks(delta.neurons, working_bytes(info)):
        state.update(base.read_rows(name, rows_of(delta, part)).view(np.uint8).data)
    if (found := state.hexdigest()) != identity.rows_sha256:
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: the rows of {name} have sha256 "
            f"{found[:12]}.. instead of {identity.rows_sha256[:12]}.."
        )


class _Distances:
    """Sums over the rows of a tensor: how far from the base, from the patched base, and what rounding costs anyway."""

    def __init__(self) -> None:
        self.plain = self.merged = True
        self.base = self.goal = self.cost = self.patch = 0.0
        self.count = 0

    def add(self, blocks: Rows, info: TensorInfo, origin: FloatArray, goal: FloatArray) -> None:
        """blocks: uint8 [rows, row_bytes] as stored; origin, goal: float32 [rows, in_features]."""
        codec = info.coding
        ours = codec.encode(origin)
        self.plain = self.plain and np.array_equal(ours, blocks)
        self.merged = self.merged and np.array_equal(codec.encode(goal), blocks)
        found = codec.decode(blocks)
        self.cost += _square(codec.decode(ours) - origin)
        self.base += _square(found - origin)
        self.goal += _square(found - goal)
        self.patch += _square(goal - origin)
        self.count += origin.size

    def finding(self, name: str, info: TensorInfo) -> Finding:
        """What the sums tell."""
        if self.plain:
            return Finding(name, State.BASE, info.dtype)
        if self.merged:
            return Finding(name, State.PATCHED, info.dtype)
        allowed = ROUNDING**2 * self.cost
        detail = f"{info.dtype}, {np.sqrt(self.base / self.cost) if self.cost else np.inf:.1f} times the error of rounding"
        if not min(self.base, self.goal) <= allowed:  # or no number
            return Finding(name, State.CHANGED, detail)
        if self.base > allowed:
            return Finding(name, State.PATCHED, detail)
        evidence = Evidence.of(self.base, self.goal, self.patch, self.count)
        return Finding(name, State.ROUNDED, f"{detail}: quantized in another way than plainly", evidence=evidence)


def _square(values: FloatArray) -> float:
    return float(np.vdot(values, values))
