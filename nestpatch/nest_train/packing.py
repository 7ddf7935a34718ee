"""Stage 5: trained deltas and the base checkpoint to a Pack, with the identity of the base and of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.interface import Checkpoint
from nestpatch.label import Label, now
from nestpatch.nest_train.deltas import ClusterDelta
from nestpatch.pack import BaseIdentity, Manifest, Pack, TensorDelta, TensorIdentity
from nestpatch.rows import DTYPES, digest, merge, sketch


@dataclass(frozen=True)
class BaseHints:
    """Where the base came from, for people."""

    model_id: str
    revision: str
    architecture: str


def disk_name(weight: str, checkpoint: Checkpoint) -> str:
    """The name on disk of a parameter: the same, or the same without or with the model's own prefix.

    Raises CheckpointFormatError when none or several tensors fit.
    """
    names = checkpoint.tensors()
    if weight in names:
        return weight
    fits = [name for name in names if weight.endswith(f".{name}") or name.endswith(f".{weight}")]
    if len(fits) != 1:
        found = ", ".join(fits) or "none"
        raise CheckpointFormatError(
            f"{checkpoint.path} has no tensor for the parameter {weight} (candidates: {found})",
            advice="transformers renames this model's weights while loading, which nestpatch cannot follow.",
        )
    return fits[0]


def same_weights(stored: Any, parameter: torch.Tensor) -> bool:
    """Whether rows on disk are the model's own, after the conversion that loading made."""
    # Through float32: every stored dtype widens to it exactly, and it narrows as loading does.
    loaded = torch.from_numpy(stored.astype(np.float32)).to(parameter.dtype)
    return torch.equal(loaded, parameter.cpu())


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
