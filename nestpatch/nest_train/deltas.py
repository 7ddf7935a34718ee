"""Stage 4's parameters: one trainable delta per cluster, hung on a frozen Linear.

All rows of a cluster share its delta, so the change of the weight is `membership @ delta`: a LoRA whose B is 0/1.
The dense change [out, in] is never made: the input meets the few deltas first, and the results are spread over the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from nestpatch.nest_train.cluster import Clusters
from nestpatch.nest_train.model import MlpBlock, Projection


class ClusterDelta(nn.Module):
    """A frozen Linear plus shared deltas on some of its rows.

    delta: float32 [clusters, in], starts at zero; rows, cluster: int64 [rows].
    """

    def __init__(self, base: nn.Linear, rows: torch.Tensor, cluster: torch.Tensor, clusters: int) -> None:
        super().__init__()
        self.base = base
        self.membership: torch.Tensor
        self.rows: torch.Tensor
        self.cluster: torch.Tensor
        self.enabled = True
        device = base.weight.device
        self.delta = nn.Parameter(torch.zeros(clusters, base.in_features, device=device))
        # [out, clusters], a few columns: spreading by a product is exact for 0/1, fast, and deterministic on a GPU.
        membership = torch.zeros(base.out_features, clusters, dtype=base.weight.dtype, device=device)
        membership[rows, cluster] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cluster", cluster, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        return y + linear(linear(x, self.delta.to(x.dtype)), self.membership)


class DeltaSet:
    """All deltas of a model, hung on and taken off together."""

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters]) -> None:
        self.places: list[tuple[Projection, ClusterDelta]] = []
        for block, group in zip(blocks, clusters, strict=True):
            if group.k:
                self.places += [(p, _delta(p, block.neurons, group)) for p in block.projections]

    @property
    def modules(self) -> list[ClusterDelta]:
        return [delta for _, delta in self.places]

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(module.delta.numel() for module in self.modules)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hangs the deltas on their Linears; the model is as before afterwards."""
        for projection, module in self.places:
            setattr(projection.parent, projection.attribute, module)
        try:
            yield
        finally:
            for projection, module in self.places:
                setattr(projection.parent, projection.attribute, module.base)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the attached deltas count for nothing: the model answers as the base."""
        for module in self.modules:
            module.enabled = False
        try:
            yield
        finally:
            for module in self.modules:
                module.enabled = True

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all deltas."""
        return [module.delta.detach().clone() for module in self.modules]

    @torch.no_grad()
    def restore(self, deltas: Sequence[torch.Tensor]) -> None:
        """Sets all deltas, as `snapshot` gave them."""
        for module, delta in zip(self.modules, deltas, strict=True):
            module.delta.copy_(delta)

    def round_to(self, dtype: torch.dtype) -> None:
        """Rounds the deltas to their storage type, so that what is evaluated is what ships."""
        self.restore([delta.to(dtype).float() for delta in self.snapshot()])


def _delta(projection: Projection, neurons: int, group: Clusters) -> ClusterDelta:
    """One module for a projection; every stacked part (gate, up) of a fused one has its own deltas."""
    base = projection.linear
    rows = np.concatenate([group.neurons + part * neurons for part in range(projection.parts)])
    labels = np.concatenate([group.labels + part * group.k for part in range(projection.parts)])
    device = base.weight.device
    return ClusterDelta(
        base, torch.from_numpy(rows).to(device), torch.from_numpy(labels).to(device), group.k * projection.parts
    )
