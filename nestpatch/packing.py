"""Builds packs: the digests of the base and of the result, the storage types, the manifest. Needs numpy alone.

Everything that makes a pack (training, extraction) finds the rows and their deltas in its own way and then calls
`pack_tensor` for each weight matrix and `build_pack` once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.detector import Detector
from nestpatch.errors import PackContentError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo, row_blocks
from nestpatch.pack import BaseIdentity, Label, Manifest, Pack, TensorIdentity, creation_time
from nestpatch.rows import BLOCK_TYPES, SKETCHES, FloatArray, Rows, merge, sketch


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """One weight matrix as a pack stores it."""

    delta: TensorDelta
    identity: TensorIdentity
    """The matrix in the base."""
    result: str
    """SHA-256 of the touched rows after the merge at strength 1."""


def require_packable(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """Checks that a tensor can be the base of a pack's tensor on this machine: for trainers, before any work.

    Args:
        checkpoint: The base.
        name: The tensor, by the name that the pack will use.

    Returns:
        What the tensor is.

    Raises:
        CheckpointFormatError: The base has no such tensor.
        QuantizationError: No pack can name its type as that of a base, or its rows cannot be quantized here.
    """
    info = checkpoint.info(name)
    if not info.plain and info.dtype not in BLOCK_TYPES:
        raise QuantizationError(
            f"tensor {name} of {checkpoint.path} is stored as {info.dtype}, which no pack can have as its base",
            advice=f"Make the pack from the float model, or from a GGUF file of the types {', '.join(BLOCK_TYPES)}.",
        )
    info.coding.require()
    return info


def pack_tensor(
    checkpoint: Checkpoint,
    name: str,
    rows: IntArray,
    delta: Rows,
    *,
    cluster: npt.NDArray[Any] | None = None,
    factors: Rows | None = None,
) -> PackedTensor:
    """Packs the change of one weight matrix, with the indices in the smallest integer types that fit.

    Give either `cluster`, where each row gets one of the vectors, or `factors`, where it gets a sum of them.

    The base is read in blocks, so memory does not grow with the matrix.

    Args:
        checkpoint: The base. The rows of quantized tensors are blocks: digests are those of the blocks.
        name: The tensor's name on disk; for a GGUF file that in the safetensors model, by which other files are found too.
        rows: The rows to change, sorted, int64 [neurons].
        delta: The vectors in their storage dtype (F32, BF16 or F16), [clusters or rank, in_features].
        cluster: Which vector each row gets, any integer type [neurons].
        factors: How much of each vector each row gets, in their storage dtype, [neurons, rank].

    Returns:
        The delta, the identity of the base tensor, and the digest of the merged rows.

    Raises:
        CheckpointFormatError: The base has no such tensor, or its rows cannot be read.
        PackContentError: The arrays are not a valid delta, or a merged weight leaves the range of the base's dtype.
        QuantizationError: No pack can have a base of this type, or its rows cannot be quantized here.
    """
    info = require_packable(checkpoint, name)
    packed = TensorDelta(
        name=name,
        delta=delta,
        rows=rows.astype(np.int32 if info.rows < 2**31 else np.int64),
        sketch=np.zeros((len(rows), SKETCHES), np.float16),
        cluster=None if cluster is None else cluster.astype(np.uint8 if len(delta) <= 256 else np.uint16),
        factors=factors,
    )
    before, after, whole, sketches = sha256(), sha256(), sha256(), []
    # The arithmetic of the merge holds several arrays of eight bytes per element.
    for part in row_blocks(len(rows), 16 * max(info.row_bytes, 2 * info.shape[-1])):
        stored = checkpoint.read_rows(name, rows[part])
        merged = as_merged(info, stored, packed.dense(part.start, part.stop))
        before.update(np.ascontiguousarray(stored).view(np.uint8).data)
        after.update(np.ascontiguousarray(merged).view(np.uint8).data)
        sketches.append(sketch(stored if info.plain else info.decoded(stored)))
    for block in checkpoint.read_all(name):
        whole.update(block)
    identity = TensorIdentity(info.shape, info.dtype, whole.hexdigest(), before.hexdigest())
    return PackedTensor(replace(packed, sketch=np.concatenate(sketches)), identity, after.hexdigest())


def as_merged(info: TensorInfo, stored: Rows, change: FloatArray) -> Rows:
    """The merge at strength 1, in the form of the stored rows.

    Args:
        info: The matrix.
        stored: Rows as `Checkpoint.read_rows` returns them.
        change: Their change, float32 [rows, in_features].

    Returns:
        The merged rows, as they are stored.

    Raises:
        PackContentError: A sum leaves the range of the dtype.
        QuantizationError: Rows of this type cannot be quantized here.
    """
    if info.plain:
        return merge(stored, change)
    blocks = info.coding.encode(merge(info.decoded(stored), change))
    if not np.isfinite(info.coding.decode(blocks)).all():
        raise PackContentError(f"the merged weights leave the range of {info.dtype}")
    return blocks


def build_pack(
    tensors: Sequence[PackedTensor],
    label: Label,
    *,
    model_id: str,
    revision: str = "",
    architecture: str = "",
    method: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    detector: Detector | None = None,
) -> Pack:
    """Puts packed tensors and the facts about them together.

    Args:
        tensors: The changed weight matrices, in any order.
        label: Name, version and the other facts that the publisher states.
        model_id: The base's name, a hint for people.
        revision: The base's commit, a hint for people.
        architecture: The base's model class, a hint for people.
        method: How the deltas were made, plain JSON values.
        evaluation: What was measured, plain JSON values.
        detector: Tells harmful prompts from harmless ones; None for a pack without one.

    Returns:
        The pack, its tensors in the order of their names, created now (or at SOURCE_DATE_EPOCH).

    Raises:
        PackContentError: The label is not valid, or the tensors are none or not unique.
        DataError: SOURCE_DATE_EPOCH is not a time.
    """
    identities = {tensor.delta.name: tensor.identity for tensor in tensors}
    dtype = "/".join(sorted({identity.dtype for identity in identities.values()}))
    manifest = Manifest(
        name=label.name,
        version=label.version,
        description=label.description,
        license=label.license,
        created=creation_time(),
        base=BaseIdentity(model_id, revision, architecture, dtype, identities),
        result={tensor.delta.name: tensor.result for tensor in tensors},
        tags=label.tags,
        supersedes=label.supersedes,
        requires=label.requires,
        method=method or {},
        evaluation=evaluation or {},
        detector=None if detector is None else detector.facts,
    )
    deltas = tuple(sorted((tensor.delta for tensor in tensors), key=lambda delta: delta.name))
    return Pack(manifest, deltas, None if detector is None else detector.weight)
