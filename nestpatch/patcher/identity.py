"""Whether a model is the base that a pack was made for, tensor by tensor, from the touched rows alone.

Digests decide where rows can be the base's own. Rows that were rounded on the way into a file are compared with the float base
where that is available, else by sketches. A few megabytes are read at a time.
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

_ROW_TOLERANCE = 0.05
"""Largest distance of a row's sketch from that of the pack before a message calls the row changed."""
_COARSE_MATCH = 0.85
"""SKETCH_MATCH for types of under four bits, which round more coarsely."""
_SURE = 3.0
"""Standard deviations from which rounded rows count as patched. In doubt they are the base: a pack whose effect is invisible is
refused when it is made from such rows, and made from the float base it gives the same rows again."""
_WITNESSES = 16
"""Untouched rows that show how a tensor was rounded."""
_ROUNDING = 1.5
"""How much farther from the float base than plain quantization rows may be: other quantizers weigh errors differently."""


class State(Enum):
    """What the touched rows of one tensor are."""

    BASE = "base"
    WIDENED = "the base, stored in another dtype"
    ROUNDED = "the base, by its rounded rows"
    PATCHED = "already patched with this pack"
    CHANGED = "near the base, but changed: fine-tuned, patched otherwise, or damaged"
    FOREIGN = "another model"
    MISSING = "missing"
    SHAPE = "of another shape"


APPLICABLE = (State.BASE, State.WIDENED, State.ROUNDED)


@dataclass(frozen=True)
class Evidence:
    """How much nearer rounded rows are to the base than to the patched base. The evidence of tensors adds up."""

    difference: float
    """Of the squared distances: positive for the base, negative for the patched base."""
    variance: float
    """Of that difference, from the noise of the rounding."""

    @classmethod
    def of(cls, near: float, far: float, pack: float, count: int) -> Evidence:
        """The evidence of the rows of one tensor.

        Args:
            near: Squared distance to the base.
            far: Squared distance to the patched base.
            pack: Squared distance between the base and the patched base.
            count: Numbers that were compared.

        Returns:
            The evidence.
        """
        return cls(far - near, 4 * min(near, far) / max(1, count) * pack)

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.difference + other.difference, self.variance + other.variance)

    @property
    def patched(self) -> bool:
        """Whether the pack is in the rows, beyond doubt."""
        return self.difference < -_SURE * math.sqrt(self.variance)

    @property
    def unpatched(self) -> bool:
        """Whether the pack is not in the rows, beyond doubt."""
        return self.difference > _SURE * math.sqrt(self.variance)


@dataclass(frozen=True)
class Finding:
    """One tensor of the pack, as found in a checkpoint."""

    name: str
    state: State
    detail: str = ""
    rows: tuple[int, ...] = ()
    """The rows whose sketches differ from those of the base."""
    evidence: Evidence | None = None
    """Whether the pack is in rounded rows; None for other rows."""


def examine(pack: Pack, checkpoint: Checkpoint, base: Checkpoint | None = None) -> list[Finding]:
    """Determines what a checkpoint holds where a pack would change it.

    Args:
        pack: The pack.
        checkpoint: The model.
        base: The float model, for rows that were rounded.

    Returns:
        One finding per tensor of the pack, in its order.

    Raises:
        BaseMismatchError: `base` is not the base of the pack.
        QuantizationError: Rows were quantized in a way that cannot be repeated.
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
    """The evidence of all rounded tensors together: the noise of a single one may exceed a small change.

    Args:
        findings: What was found in the tensors of a pack.

    Returns:
        The sum over those that were rounded.
    """
    return sum((f.evidence for f in findings if f.state is State.ROUNDED and f.evidence is not None), Evidence(0, 0))


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
    """(the state by the digests, None where they match nothing; the digest of the stored rows)."""
    info = checkpoint.info(delta.name)
    stored, narrowed = sha256(), sha256()
    # A narrower safetensors copy is not the base: a small delta would be rounded away in it.
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
    """Whether rows in memory are the base of a pack: by digest, or for rounded rows by the float model or a sketch.

    Args:
        delta: The pack's change of the tensor.
        identity: The tensor in the pack's base.
        checkpoint: The model that the rows belong to.
        rows: [neurons, in_features] in the stored dtype, or uint8 [neurons, row_bytes].
        base: The float model; None: sketches decide.

    Returns:
        Whether they are.
    """
    info = checkpoint.info(delta.name)
    if info.plain:
        narrow = rows if info.dtype == identity.dtype else _narrow(rows, identity.dtype)
        if narrow is not None:
            return sha256(np.ascontiguousarray(narrow).view(np.uint8).data).hexdigest() == identity.rows_sha256
    if base is not None:
        return _is_rounded_base(delta, identity, checkpoint, np.ascontiguousarray(rows), base)
    match = _COARSE_MATCH if info.coding.bits < 4 else SKETCH_MATCH
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
    spared = np.setdiff1d(np.arange(info.rows), delta.rows)[:_WITNESSES]
    origin = base.read_rows(delta.name, spared).astype(np.float32)
    stored = checkpoint.read_rows(delta.name, spared).view(np.uint8)
    return len(spared) > 0 and np.array_equal(info.coding.encode(origin), stored)


def _describe_stranger(delta: TensorDelta, identity: TensorIdentity, digest: str, checkpoint: Checkpoint) -> Finding:
    # Only now: sketches take longer than digests.
    found = np.concatenate([sketch(rows) for _, rows in _blocks(delta, checkpoint)])
    likeness = sketch_correlation(delta.sketch, found)
    off = np.flatnonzero(np.abs(delta.sketch.astype(np.float32) - found.astype(np.float32)).max(axis=1) > _ROW_TOLERANCE)
    where = f", first at row {int(delta.rows[off[0]])}, {len(off)} of {delta.neurons} rows differ" if len(off) else ""
    detail = f"rows sha256 {digest[:12]}.. instead of {identity.rows_sha256[:12]}.., likeness {likeness:.2f}{where}"
    rows = tuple(int(row) for row in delta.rows[off])
    return Finding(delta.name, State.CHANGED if likeness >= SKETCH_MATCH else State.FOREIGN, detail, rows)


def _by_sketch(delta: TensorDelta, checkpoint: Checkpoint) -> Finding:
    """Rounded rows without their base: the sketches of the rows, and of the rows with the delta subtracted."""
    info = checkpoint.info(delta.name)
    as_is, without = [], []
    for part, rows in _blocks(delta, checkpoint):
        plain = info.coding.decode(rows.view(np.uint8))
        as_is.append(sketch(plain))
        without.append(sketch(plain - delta.dense(part.start, part.stop)))
    found, reverted = np.concatenate(as_is), np.concatenate(without)
    likenesses = sketch_correlation(delta.sketch, found), sketch_correlation(delta.sketch, reverted)
    detail = f"{info.dtype}, likeness {likenesses[0]:.2f}"
    match = _COARSE_MATCH if info.coding.bits < 4 else SKETCH_MATCH
    if max(likenesses) < match:
        return Finding(delta.name, State.FOREIGN, detail)
    if likenesses[0] < match:
        return Finding(delta.name, State.PATCHED, f"{info.dtype}, likeness {likenesses[1]:.2f} without the pack")
    origin, near, far = (part.astype(np.float64) for part in (delta.sketch, found, reverted))
    to_base, to_patched, between = (float(np.square(gap).sum()) for gap in (near - origin, far - origin, near - far))
    return Finding(delta.name, State.ROUNDED, detail, evidence=Evidence.of(to_base, to_patched, between, origin.size))


def _against_base(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, base: Checkpoint) -> Finding:
    """Rounded rows, compared with the float rows that they were made from."""
    # In the same parts as below: a base on the Hub keeps what it has fetched.
    _require_base(delta, identity, checkpoint.info(delta.name), base)
    info, facts = fitted(checkpoint, delta, base), _Distances()
    for part, rows in _blocks(delta, checkpoint):
        origin = base.read_rows(delta.name, rows_of(delta, part))
        goal = merge(origin, delta.dense(part.start, part.stop))
        facts.add(rows.view(np.uint8), info, origin.astype(np.float32), goal.astype(np.float32))
    return facts.finding(delta.name, info)


def _require_base(delta: TensorDelta, identity: TensorIdentity, info: TensorInfo, base: Checkpoint) -> None:
    """Raises BaseMismatchError when a tensor is not that of the pack's base. `info`: of the rounded tensor."""
    name = delta.name
    if not base.has(name) or (base.info(name).dtype, base.info(name).shape) != (identity.dtype, identity.shape):
        found = f"{base.info(name).dtype} {list(base.info(name).shape)}" if base.has(name) else "missing"
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: {name} is {found}, "
            f"expected {identity.dtype} {list(identity.shape)}"
        )
    state = sha256()
    for part in info.blocks(delta.neurons, working_bytes(info)):
        state.update(base.read_rows(name, rows_of(delta, part)).view(np.uint8).data)
    if (found := state.hexdigest()) != identity.rows_sha256:
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: the rows of {name} have sha256 "
            f"{found[:12]}.., expected {identity.rows_sha256[:12]}.."
        )


class _Distances:
    """Sums over the rows of a tensor: distances to the base and to the patched base, and the error of plain rounding."""

    def __init__(self) -> None:
        self.plain = self.merged = True
        self.base = self.goal = self.cost = self.between = 0.0
        self.count = 0

    def add(self, blocks: Rows, info: TensorInfo, origin: FloatArray, goal: FloatArray) -> None:
        """Adds rows. blocks: uint8 [rows, row_bytes] as stored; origin, goal: float32 [rows, in_features]."""
        codec = info.coding
        ours = codec.encode(origin)
        self.plain = self.plain and np.array_equal(ours, blocks)
        self.merged = self.merged and np.array_equal(codec.encode(goal), blocks)
        found = codec.decode(blocks)
        self.cost += _square(codec.decode(ours) - origin)
        self.base += _square(found - origin)
        self.goal += _square(found - goal)
        self.between += _square(goal - origin)
        self.count += origin.size

    def finding(self, name: str, info: TensorInfo) -> Finding:
        """What the sums show."""
        if self.plain:
            return Finding(name, State.BASE, info.dtype)
        if self.merged:
            return Finding(name, State.PATCHED, info.dtype)
        allowed = _ROUNDING**2 * self.cost
        detail = f"{info.dtype}, {np.sqrt(self.base / self.cost) if self.cost else np.inf:.1f} times the error of rounding"
        if not min(self.base, self.goal) <= allowed:  # also for NaN
            return Finding(name, State.CHANGED, detail)
        if self.base > allowed:
            return Finding(name, State.PATCHED, detail)
        evidence = Evidence.of(self.base, self.goal, self.between, self.count)
        return Finding(name, State.ROUNDED, f"{detail}: not quantized plainly", evidence=evidence)


def _square(values: FloatArray) -> float:
    return float(np.vdot(values, values))
