"""Stage 5: trained deltas and the base checkpoint to a Pack, with the identity of the base and of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.nest_train.tune import ClusterDelta
from nestpatch.pack import BaseIdentity, Label, Manifest, Pack, TensorDelta, TensorIdentity, now
from nestpatch.rows import DTYPES, digest, merge, sketch
from nestpatch.runtimes.weights import disk_name, same_weights


@dataclass(frozen=True)
class BaseHints:
    """Where the base came from, for people."""

    model_id: str
    revision: str
    architecture: str


def make_pack(
    places: Sequence[tuple[str, ClusterDelta]],
    checkpoint: Checkpoint,
    delta_dtype: str,
    label: Label,
    hints: BaseHints,
    method: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> Pack:
    """Builds the pack for trained deltas, given with the names of their weights in the model.

    Raises CheckpointFormatError when the weights on disk are not those that were trained on.
    """
    identities: dict[str, TensorIdentity] = {}
    results: dict[str, str] = {}
    deltas = []
    for weight, module in places:
        name = disk_name(weight, checkpoint)
        info = checkpoint.info(name)
        order = torch.argsort(module.rows).cpu()
        rows = module.rows.cpu()[order].numpy()
        stored = checkpoint.read_rows(name, rows)
        if not same_weights(stored, module.base.weight.detach()[module.rows].cpu()[order]):
            raise CheckpointFormatError(f"tensor {name} of {checkpoint.path} is not the weight that transformers loaded")
        delta = tensor_delta(name, module, order, delta_dtype, stored)
        deltas.append(delta)
        whole = sha256()
        for block in checkpoint.read_all(name):
            whole.update(block)
        identities[name] = TensorIdentity(info.shape, info.dtype, whole.hexdigest(), digest([stored]))
        results[name] = digest([merge(stored, delta.dense())])
    dtype = "/".join(sorted({identity.dtype for identity in identities.values()}))
    manifest = Manifest(
        name=label.name,
        version=label.version,
        description=label.description,
        license=label.license,
        created=now(),
        base=BaseIdentity(hints.model_id, hints.revision, hints.architecture, dtype, identities),
        result=results,
        tags=label.tags,
        supersedes=label.supersedes,
        requires=label.requires,
        method=method,
        evaluation=evaluation,
    )
    return Pack(manifest, tuple(sorted(deltas, key=lambda delta: delta.name)))


def tensor_delta(name: str, module: ClusterDelta, order: torch.Tensor, delta_dtype: str, stored: Any) -> TensorDelta:
    """The storage form of one trained module, in the smallest integer types that fit."""
    rows = module.rows.cpu()[order].numpy()
    clusters = len(module.delta)
    return TensorDelta(
        name=name,
        delta=module.delta.detach().float().cpu().numpy().astype(DTYPES[delta_dtype]),
        rows=rows.astype(np.int32 if module.base.out_features < 2**31 else np.int64),
        cluster=module.cluster.cpu()[order].numpy().astype(np.uint8 if clusters <= 256 else np.uint16),
        sketch=sketch(stored),
    )
