"""Whether a model is the base that a pack was made for, tensor by tensor, from the touched rows alone.

Digests decide where rows can be the base's own. Rows that were rounded on the way into a file are compared with the float base
where that is available, else by sketches. A few megabytes are read at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from hashlib import sha256

import numpy as np

from nestpatch.errors import BaseMismatchError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.pack import Pack, TensorDelta, TensorIdentity
from nestpatch.patcher.merge import fitted, rows_of, working_bytes
from nestpatch.rows import DTYPES, SKETCH_MATCH, Rows, digest, merge, sketch, sketch_correlation

_ROW_TOLERANCE = 0.05
"""Largest distance of a row's sketch from that of the pack before a message calls the row changed."""
_COARSE_MATCH = 0.85
"""SKETCH_MATCH for types of under four bits, which round more coarsely."""
_SURE = 3.0
"""Standard deviations from which rounded rows count as patched. In doubt they are the base: a pack whose effect cannot be seen
is rejected when it is merged into such rows, and merged from the float base it gives the same rows again."""
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
    findings = [_examine_tensor(pack, delta, checkpoint, base) for delta in pack]
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


def _examine_tensor(pack: Pack, delta: TensorDelta, checkpoint: Checkpoint, base: Checkpoint | None) -> Finding:
    name, identity = delta.name, pack.manifest.base.tensors[delta.name]
    if not checkpoint.has(name):
        return Finding(name, State.MISSING)
    info = checkpoint.info(name)
    if info.shape != identity.shape:
        return Finding(name, State.SHAPE, f"{list(info.shape)} instead of {list(identity.shape)}")
    if info.plain:
        state, found = _by_digest(delta, identity, pack.manifest.result[name], checkpoint)
        if state is not None:
            return Finding(name, state, f"{info.dtype} instead of {identity.dtype}" if state is State.WIDENED else "")
        if info.dtype == identity.dtype or not checkpoint.converted:
            return _describe_stranger(delta, identity, found, checkpoint)
    if base is None:
        return _by_sketch(delta, checkpoint)
    # In parts, as the base was read for the first comparison: a base on the Hub keeps what it has fetched.
    return _against_base(delta, _fitted_to_base(delta, identity, checkpoint, base), base, _blocks(delta, checkpoint))


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
    found = stored.hexdigest()
    if info.dtype == identity.dtype and found == identity.rows_sha256:
        return State.BASE, found
    if other and narrowed.hexdigest() == identity.rows_sha256:
        return State.WIDENED, found
    return (State.PATCHED if found == result else None), found


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
            return digest([narrow]) == identity.rows_sha256
    if base is not None:
        return _is_rounded_base(delta, identity, checkpoint, np.ascontiguousarray(rows), base)
    match = _COARSE_MATCH if info.coding.bits < 4 else SKETCH_MATCH
    return sketch_correlation(delta.sketch, sketch(info.coding.decode(np.ascontiguousarray(rows).view(np.uint8)))) >= match


def _is_rounded_base(
    delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, rows: Rows, base: Checkpoint
) -> bool:
    try:
        info = _fitted_to_base(delta, identity, checkpoint, base)
    except (BaseMismatchError, QuantizationError):
        return False
    blocks = ((part, rows[part]) for part in info.blocks(delta.neurons, working_bytes(info)))
    found = _against_base(delta, info, base, blocks)
    if found.state is not State.ROUNDED or (found.evidence is not None and found.evidence.patched):
        return found.state is State.BASE
    # Where rows that the pack leaves alone are the base's own rows after plain rounding, so would these be.
    spared = np.setdiff1d(np.arange(info.rows), delta.rows)[:_WITNESSES]
    origin = base.read_rows(delta.name, spared).astype(np.float32)
    stored = checkpoint.read_rows(delta.name, spared).view(np.uint8)
    return not (len(spared) and np.array_equal(info.coding.encode(origin), stored))


def _describe_stranger(delta: TensorDelta, identity: TensorIdentity, rows_sha256: str, checkpoint: Checkpoint) -> Finding:
    # Only now: sketches take longer than digests.
    found = np.concatenate([sketch(rows) for _, rows in _blocks(delta, checkpoint)])
    likeness = sketch_correlation(delta.sketch, found)
    off = np.flatnonzero(np.abs(delta.sketch.astype(np.float32) - found.astype(np.float32)).max(axis=1) > _ROW_TOLERANCE)
    where = f", first at row {int(delta.rows[off[0]])}, {len(off)} of {delta.neurons} rows differ" if len(off) else ""
    detail = f"rows sha256 {rows_sha256[:12]}.. instead of {identity.rows_sha256[:12]}.., likeness {likeness:.2f}{where}"
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


def _fitted_to_base(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, base: Checkpoint) -> TensorInfo:
    """A rounded tensor, with the codec of the quantizer that made it from the base.

    Raises BaseMismatchError where the base is not that of the pack, QuantizationError where no known quantizer fits.
    """
    name, info = delta.name, checkpoint.info(delta.name)
    if not base.has(name) or (base.info(name).dtype, base.info(name).shape) != (identity.dtype, identity.shape):
        found = f"{base.info(name).dtype} {list(base.info(name).shape)}" if base.has(name) else "missing"
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: {name} is {found}, "
            f"expected {identity.dtype} {list(identity.shape)}"
        )
    parts = info.blocks(delta.neurons, working_bytes(info))
    if (found := digest(base.read_rows(name, rows_of(delta, part)) for part in parts)) != identity.rows_sha256:
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: the rows of {name} have sha256 "
            f"{found[:12]}.., expected {identity.rows_sha256[:12]}.."
        )
    return fitted(checkpoint, delta, base)


def _against_base(delta: TensorDelta, info: TensorInfo, base: Checkpoint, blocks: Iterable[tuple[slice, Rows]]) -> Finding:
    """Compares rounded rows with the float rows that they were made from. `info`: as `_fitted_to_base` returns it."""
    codec, plain, merged, count = info.coding, True, True, 0
    # Squared distances, summed over the rows: of plain rounding from the base; of the rows from the base; of the rows from the
    # patched base; between the base and the patched base.
    sums = np.zeros(4)
    for part, rows in blocks:
        origin = base.read_rows(delta.name, rows_of(delta, part))
        goal = merge(origin, delta.dense(part.start, part.stop)).astype(np.float32)
        origin, stored = origin.astype(np.float32), rows.view(np.uint8)
        rounded, found = codec.encode(origin), codec.decode(stored)
        plain = plain and np.array_equal(rounded, stored)
        merged = merged and np.array_equal(codec.encode(goal), stored)
        sums += [np.vdot(gap, gap) for gap in (codec.decode(rounded) - origin, found - origin, found - goal, goal - origin)]
        count += origin.size
    if plain:
        return Finding(delta.name, State.BASE, info.dtype)
    if merged:
        return Finding(delta.name, State.PATCHED, info.dtype)
    cost, to_base, to_patched, between = sums.tolist()
    allowed = _ROUNDING**2 * cost
    detail = f"{info.dtype}, {math.sqrt(to_base / cost) if cost else math.inf:.1f} times the error of rounding"
    if not min(to_base, to_patched) <= allowed:  # also for NaN
        return Finding(delta.name, State.CHANGED, detail)
    if to_base > allowed:
        return Finding(delta.name, State.PATCHED, detail)
    evidence = Evidence.of(to_base, to_patched, between, count)
    return Finding(delta.name, State.ROUNDED, f"{detail}: not quantized plainly", evidence=evidence)
