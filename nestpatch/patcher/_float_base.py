"""Rounded rows beside the float model that they were made from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo, float_rows
from nestpatch.pack import TensorIdentity
from nestpatch.patcher._likeness import least_likeness, likeness_of
from nestpatch.patcher.findings import By, Evidence, Finding, State
from nestpatch.patcher.merge import fitted
from nestpatch.patcher.touched import rows_of, touched_blocks, untouched, working_bytes
from nestpatch.rows import Rows, digest, inner, merge

Blocks = Callable[[], Iterable[tuple[slice, Rows]]]
_WITNESSES = 16
"""Untouched rows that show how a tensor was rounded."""
_ROUNDING = 1.5
"""How much farther from the float base than plain quantization rows may be: other quantizers weigh errors differently."""


def against_base(delta: TensorDelta, info: TensorInfo, base: Checkpoint, blocks: Blocks) -> Finding:
    """Compares rounded rows with the float rows that they were made from.

    Args:
        delta: The pack's change of the tensor.
        info: The tensor, as `fitted_to_base` returns it.
        base: The float model.
        blocks: Gives the rows from the start at each call.
    """
    if _is_plain(delta, info, base, blocks()):
        return Finding(delta.name, State.BASE, info.dtype, by=By.FLOAT_BASE)
    # Only now: quantizing the merged rows too takes twice as long.
    codec, merged, count = info.coding, True, 0
    # Squared distances, summed over the rows: of plain rounding from the base; of the rows from the base; of the rows from the
    # patched base; between the base and the patched base.
    sums = np.zeros(4)
    for part, rows in blocks():
        origin = base.read_rows(delta.name, rows_of(delta, part))
        goal = merge(origin, delta.dense(part.start, part.stop)).astype(np.float32)
        origin, stored = origin.astype(np.float32), rows.view(np.uint8)
        rounded, found = codec.decode(codec.encode(origin)), codec.decode(stored)
        merged = merged and np.array_equal(codec.encode(goal), stored)
        sums += [inner(gap, gap) for gap in (rounded - origin, found - origin, found - goal, goal - origin)]
        count += origin.size
    if merged:
        return Finding(delta.name, State.PATCHED, info.dtype, by=By.FLOAT_BASE)
    cost, to_base, to_patched, between = sums.tolist()
    allowed = _ROUNDING**2 * cost
    detail = f"{info.dtype}, {math.sqrt(to_base / cost) if cost else math.inf:.1f} times the error of rounding"
    if not min(to_base, to_patched) <= allowed:  # also for NaN
        return Finding(delta.name, State.CHANGED, detail)
    if to_base > allowed:
        return Finding(delta.name, State.PATCHED, detail, by=By.FLOAT_BASE)
    evidence = Evidence.of(to_base, to_patched, between, count)
    return Finding(delta.name, State.ROUNDED, f"{detail}: not quantized plainly", evidence=evidence, by=By.FLOAT_BASE)


def _is_plain(delta: TensorDelta, info: TensorInfo, base: Checkpoint, blocks: Iterable[tuple[slice, Rows]]) -> bool:
    """Whether rows are what their codec makes of the float rows."""
    for part, rows in blocks:
        origin = base.read_rows(delta.name, rows_of(delta, part)).astype(np.float32)
        if not np.array_equal(info.coding.encode(origin), rows.view(np.uint8)):
            return False
    return True


def fitted_to_base(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, base: Checkpoint) -> TensorInfo:
    """A rounded tensor, with the codec of the quantizer that made it from the base.

    Raises BaseMismatchError where the base is not that of the pack, QuantizationError where no known quantizer fits.
    """
    name, info = delta.name, checkpoint.info(delta.name)
    parts = info.blocks(delta.neurons, working_bytes(info))
    if identity.quantized:
        _require_float_base(delta, identity, base, parts)
        return fitted(checkpoint, delta, base)
    if not base.has(name) or (base.info(name).dtype, base.info(name).shape) != (identity.dtype, identity.shape):
        found = f"{base.info(name).dtype} {list(base.info(name).shape)}" if base.has(name) else "missing"
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: {name} is {found}, "
            f"expected {identity.dtype} {list(identity.shape)}"
        )
    if (found := digest(base.read_rows(name, rows_of(delta, part)) for part in parts)) != identity.rows_sha256:
        raise BaseMismatchError(
            f"{base.path} is not the float base that the pack was made for: the rows of {name} have sha256 "
            f"{found[:12]}.., expected {identity.rows_sha256[:12]}.."
        )
    return fitted(checkpoint, delta, base)


def _require_float_base(delta: TensorDelta, identity: TensorIdentity, base: Checkpoint, parts: Iterable[slice]) -> None:
    """Raises BaseMismatchError unless `base` is the float model of a quantized base, by its sketches, and without the pack."""
    name = delta.name
    if not base.has(name) or not base.info(name).plain or base.info(name).shape != identity.shape:
        found = f"{base.info(name).dtype} {list(base.info(name).shape)}" if base.has(name) else "missing"
        raise BaseMismatchError(
            f"{base.path} is not the float model of the pack's base: {name} is {found}, expected floats {list(identity.shape)}"
        )
    close = likeness_of(delta, ((part, float_rows(base, name, rows_of(delta, part))) for part in parts))
    if close.as_is < least_likeness(base.info(name), identity) or close.evidence.patched:
        holds = "hold the pack already" if close.evidence.patched else f"have likeness {close.as_is:.2f}"
        raise BaseMismatchError(f"{base.path} is not the float model of the pack's base: the rows of {name} {holds}")


def require_origin(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Raises BaseMismatchError unless the base's own blocks were quantized from `base`: rows are about to be made from it."""
    found = against_base(
        delta, fitted_to_base(delta, identity, checkpoint, base), base, partial(touched_blocks, delta, checkpoint)
    )
    if found.state not in (State.BASE, State.ROUNDED):
        raise BaseMismatchError(
            f"{base.path} is not the float model that {checkpoint.path} was quantized from: {delta.name}: {found.detail}",
            advice="Leave out --base: the rows are the pack's base, by their digests.",
        )


def is_rounded_base(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint, rows: Rows, base: Checkpoint) -> bool:
    """Whether some rows, such as those of an undo record, are what the float base becomes when it is quantized.

    Args:
        delta: The pack's change of the tensor.
        identity: The tensor in the pack's base.
        checkpoint: The quantized model.
        rows: The rows in question, uint8 [neurons, row_bytes].
        base: The float model.
    """
    try:
        info = fitted_to_base(delta, identity, checkpoint, base)
    except (BaseMismatchError, QuantizationError):
        return False
    parts = list(info.blocks(delta.neurons, working_bytes(info)))
    found = against_base(delta, info, base, lambda: ((part, rows[part]) for part in parts))
    if found.state is not State.ROUNDED or (found.evidence is not None and found.evidence.patched):
        return found.state is State.BASE
    # Where rows that the pack leaves alone are the base's own rows after plain rounding, so would these be.
    spared = untouched(delta, info.rows)[:_WITNESSES]
    origin = base.read_rows(delta.name, spared).astype(np.float32)
    stored = checkpoint.read_rows(delta.name, spared).view(np.uint8)
    return not (len(spared) and np.array_equal(info.coding.encode(origin), stored))
