"""Whether a model is the base that a pack was made for, tensor by tensor, from the touched rows alone.

Digests decide where rows can be the base's own. Rows that were rounded on the way into a file are compared with the float base
where that is available, else by sketches. Of a pack whose base is quantized, the blocks have digests, and the rows of all other
files are compared by sketches. A few megabytes are read at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.files.threads import spread
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.pack import Pack, TensorIdentity
from nestpatch.patcher._float_base import against_base, fitted_to_base, is_rounded_base, require_origin
from nestpatch.patcher._likeness import is_altered, is_nearest, kept_rows, least_likeness, likeness_of
from nestpatch.patcher.findings import By, Finding, State, evidence_of
from nestpatch.patcher.touched import reads_whole, touched_blocks, touched_digests
from nestpatch.rows import DTYPES, SKETCH_MATCH, Rows, digest, sketch, sketch_correlation

_ROW_TOLERANCE = 0.05
"""Largest distance of a row's sketch from that of the pack before a message calls the row changed."""


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
    digests = touched_digests([delta for delta in pack if _has_digest(pack, delta, checkpoint)], checkpoint)
    # Comparing with a float base is mostly quantizing its rows.
    mapped = map if base is None or reads_whole(pack, checkpoint) else spread
    findings = list(mapped(lambda delta: _examine_tensor(pack, delta, checkpoint, base, digests), pack))
    evidence = evidence_of(findings)
    if evidence.patched:
        return [replace(f, state=State.PATCHED) if f.state is State.ROUNDED else f for f in findings]
    return findings if evidence.unpatched else [_in_doubt(finding, pack, checkpoint) for finding in findings]


def _in_doubt(finding: Finding, pack: Pack, checkpoint: Checkpoint) -> Finding:
    """Rows of a quantized base that are stored as floats, or in its own type but as other blocks: doubt is no base for them.

    Float rows take any change, so that nothing rejects a second merge; and most files of the base's type are the base itself.
    """
    identity = pack.manifest.base.tensors[finding.name]
    if finding.state is not State.ROUNDED or not identity.quantized:
        return finding
    if not checkpoint.info(finding.name).plain and checkpoint.info(finding.name).dtype != identity.dtype:
        return finding
    detail = f"{finding.detail}: the sketches cannot tell whether it holds {pack.label} already"
    return replace(finding, state=State.CHANGED, detail=detail, by=None)


def _has_digest(pack: Pack, delta: TensorDelta, checkpoint: Checkpoint) -> bool:
    """Whether the digest of a tensor's rows can say what they are."""
    identity = pack.manifest.base.tensors[delta.name]
    if _misfit(delta.name, identity, checkpoint) is not None:
        return False
    info = checkpoint.info(delta.name)
    return info.dtype == identity.dtype if identity.quantized else info.plain


def _misfit(name: str, identity: TensorIdentity, checkpoint: Checkpoint) -> Finding | None:
    """What is wrong with a tensor before its rows are read; None where it has the base's shape."""
    if not checkpoint.has(name):
        return Finding(name, State.MISSING)
    shape = checkpoint.info(name).shape
    return None if shape == identity.shape else Finding(name, State.SHAPE, f"{list(shape)} instead of {list(identity.shape)}")


def _examine_tensor(
    pack: Pack, delta: TensorDelta, checkpoint: Checkpoint, base: Checkpoint | None, digests: Mapping[str, str]
) -> Finding:
    name, identity = delta.name, pack.manifest.base.tensors[delta.name]
    if misfit := _misfit(name, identity, checkpoint):
        return misfit
    if name in digests and (known := _by_own_bytes(delta, identity, pack.manifest.result[name], checkpoint, digests[name])):
        if known.state is State.BASE and identity.quantized and base is not None:
            require_origin(delta, identity, checkpoint, base)
        return known
    if base is None or (identity.quantized and checkpoint.info(name).plain):
        return _by_sketch(delta, identity, checkpoint)
    # In parts, as the base was read for the first comparison: a base on the Hub keeps what it has fetched.
    info = fitted_to_base(delta, identity, checkpoint, base)
    return against_base(delta, info, base, partial(touched_blocks, delta, checkpoint))


def _by_own_bytes(
    delta: TensorDelta, identity: TensorIdentity, result: str, checkpoint: Checkpoint, found: str
) -> Finding | None:
    """What the digests in the pack say of rows with the digest `found`; None where they may be the base without its bytes."""
    info = checkpoint.info(delta.name)
    if identity.quantized:
        return _by_blocks(delta, identity, result, checkpoint, found)
    if found == identity.rows_sha256 and info.dtype == identity.dtype:
        return Finding(delta.name, State.BASE, by=By.DIGESTS)
    if _is_widened(delta, identity, checkpoint):
        return Finding(delta.name, State.WIDENED, f"{info.dtype} instead of {identity.dtype}", by=By.DIGESTS)
    if found == result:
        return Finding(delta.name, State.PATCHED, by=By.DIGESTS)
    if info.dtype == identity.dtype or not checkpoint.converted:
        return _describe_stranger(delta, identity, found, checkpoint)
    return None


def _is_widened(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint) -> bool:
    """Whether rows are those of the base in another dtype that lost nothing."""
    stored = checkpoint.info(delta.name).dtype
    # A narrower safetensors copy is not the base: a small delta would be rounded away in it.
    narrower = DTYPES[stored].itemsize < DTYPES[identity.dtype].itemsize
    if stored == identity.dtype or (narrower and not checkpoint.converted):
        return False
    state = sha256()
    for _, rows in touched_blocks(delta, checkpoint):
        narrow = _narrow(rows, identity.dtype)
        if narrow is None:
            return False
        state.update(narrow.view(np.uint8).data)
    return state.hexdigest() == identity.rows_sha256


def _by_blocks(delta: TensorDelta, identity: TensorIdentity, result: str, checkpoint: Checkpoint, found: str) -> Finding | None:
    """Blocks of the base's type, by digest; None where another quantizer made them, or merged the pack into them."""
    if found in (identity.rows_sha256, result):
        return Finding(delta.name, State.BASE if found == identity.rows_sha256 else State.PATCHED, by=By.DIGESTS)
    # Only now: sketches take longer than digests.
    info = checkpoint.info(delta.name)
    kept = kept_rows(delta, np.concatenate([sketch(info.decoded(rows)) for _, rows in touched_blocks(delta, checkpoint)]))
    if not is_altered(delta, kept):
        return None
    rows = delta.rows[~kept]
    first = f", first row {int(rows[0])}" if len(rows) else ""
    where = f"{len(rows)} of {delta.neurons} rows differ by their sketches{first}"
    detail = f"{info.dtype}, rows sha256 {found[:12]}.. instead of {identity.rows_sha256[:12]}.., {where}"
    return Finding(delta.name, State.CHANGED, detail, tuple(rows.tolist()))


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
    if identity.quantized and info.plain:
        return is_nearest(delta, identity, info, rows)
    if identity.quantized and info.dtype == identity.dtype:
        if digest([rows]) == identity.rows_sha256:
            return True
        if is_altered(delta, kept_rows(delta, sketch(info.decoded(rows)))):
            return False
    elif info.plain:
        narrow = rows if info.dtype == identity.dtype else _narrow(rows, identity.dtype)
        if narrow is not None:
            return digest([narrow]) == identity.rows_sha256
    if base is not None:
        return is_rounded_base(delta, identity, checkpoint, np.ascontiguousarray(rows), base)
    return sketch_correlation(delta.sketch, sketch(info.decoded(rows))) >= least_likeness(info, identity)


def _describe_stranger(delta: TensorDelta, identity: TensorIdentity, rows_sha256: str, checkpoint: Checkpoint) -> Finding:
    # Only now: sketches take longer than digests.
    found = np.concatenate([sketch(rows) for _, rows in touched_blocks(delta, checkpoint)])
    likeness = sketch_correlation(delta.sketch, found)
    off = np.flatnonzero(np.abs(delta.sketch.astype(np.float32) - found.astype(np.float32)).max(axis=1) > _ROW_TOLERANCE)
    where = f", first at row {int(delta.rows[off[0]])}, {len(off)} of {delta.neurons} rows differ" if len(off) else ""
    detail = f"rows sha256 {rows_sha256[:12]}.. instead of {identity.rows_sha256[:12]}.., likeness {likeness:.2f}{where}"
    rows = tuple(int(row) for row in delta.rows[off])
    return Finding(delta.name, State.CHANGED if likeness >= SKETCH_MATCH else State.FOREIGN, detail, rows)


def _by_sketch(delta: TensorDelta, identity: TensorIdentity, checkpoint: Checkpoint) -> Finding:
    """Rows whose base is not at hand: the sketches of the rows, and of the rows with the delta subtracted."""
    info = checkpoint.info(delta.name)
    found = likeness_of(delta, ((part, info.decoded(rows)) for part, rows in touched_blocks(delta, checkpoint)))
    match = least_likeness(info, identity)
    if max(found.as_is, found.without) < match:
        return Finding(delta.name, State.FOREIGN, f"{info.dtype}, likeness {found.as_is:.2f}")
    if found.as_is < match:
        detail = f"{info.dtype}, likeness {found.without:.2f} without the pack"
        return Finding(delta.name, State.PATCHED, detail, by=By.SKETCHES)
    detail = f"{info.dtype}, likeness {found.as_is:.2f}"
    return Finding(delta.name, State.ROUNDED, detail, evidence=found.evidence, by=By.SKETCHES)
