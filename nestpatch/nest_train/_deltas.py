"""Shared deltas attached to the Linears of a frozen model: what the tuning trains and the pack stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from nestpatch.formats.checkpoint import Checkpoint, TensorInfo, float_rows
from nestpatch.nest_train._neurons import Clusters
from nestpatch.rows import FloatArray
from nestpatch.runtimes.quantized import float_weight, is_quantized
from nestpatch.runtimes.weights import MlpBlock, Projection, disk_name


class ClusterDelta(nn.Module):
    """A frozen Linear plus shared deltas on some of its rows. `delta`, float32 [clusters, in], starts at zero.

    Args:
        base: The Linear.
        rows: The rows that change, int64 [rows].
        cluster: Which delta each row gets, int64 [rows].
        clusters: Number of deltas.
    """

    def __init__(self, base: nn.Linear, rows: torch.Tensor, cluster: torch.Tensor, clusters: int) -> None:
        super().__init__()
        self.base = base
        self.membership: torch.Tensor
        self.rows: torch.Tensor
        self.cluster: torch.Tensor
        self.enabled = True
        self.rounding: tuple[FloatArray, TensorInfo] | None = None
        self.residual: torch.Tensor | None = None
        device = base.weight.device
        self.delta = nn.Parameter(torch.zeros(clusters, base.in_features, device=device))
        # [out, clusters], a few columns: spreading by a product is exact for 0/1, fast, and deterministic on a GPU.
        kind = torch.bfloat16 if is_quantized(base) else base.weight.dtype
        membership = torch.zeros(base.out_features, clusters, dtype=kind, device=device)
        membership[rows, cluster] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cluster", cluster, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y: torch.Tensor = self.base(x)
        if not self.enabled:
            return y
        y = y + linear(linear(x, self.delta.to(x.dtype)), self.membership.to(x.dtype))
        if self.residual is None:
            return y
        return y.index_add(-1, self.rows, linear(x, self.residual.to(x.dtype)))

    @torch.no_grad()
    def round_rows(self) -> None:
        """Where the base is quantized: computes what rounding changes in each row of base plus delta.

        The forward pass adds it as a constant, so that the deltas are trained for the rows that a file will hold. The gradient
        passes the rounding unchanged (straight-through estimator, arXiv 1308.3432).
        """
        if self.rounding is None:
            return
        rows, info = self.rounding
        wanted = rows + self.delta.detach()[self.cluster].float().cpu().numpy()
        change = torch.from_numpy(info.coding.decode(info.coding.encode(wanted)) - wanted)
        self.residual = change.to(self.membership)


@contextmanager
def swapped(places: Sequence[tuple[Projection, Any]]) -> Iterator[None]:
    """Inside, each module is in the place of the Linear that it holds as `base`.

    Args:
        places: (projection, module).
    """
    for projection, module in places:
        setattr(projection.parent, projection.attribute, module)
    try:
        yield
    finally:
        for projection, module in places:
            setattr(projection.parent, projection.attribute, module.base)


class DeltaSet:
    """All deltas of a model, attached and detached together.

    Args:
        blocks: The model's feed-forward blocks.
        clusters: The groups of neurons of each block; blocks without a group get no delta.
    """

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters]) -> None:
        self.places: list[tuple[Projection, ClusterDelta]] = []
        self.first_layer = next(place for place, group in enumerate(clusters) if group.k)
        for block, group in zip(blocks, clusters, strict=True):
            if group.k:
                self.places += [(p, _delta(p, block.neurons, group)) for p in block.projections]

    @property
    def modules(self) -> list[ClusterDelta]:
        """The modules that hold the deltas, in the order of `places`."""
        return [delta for _, delta in self.places]

    @property
    def device(self) -> torch.device:
        """Where the deltas are."""
        return self.modules[0].delta.device

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(module.delta.numel() for module in self.modules)

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """One parameter group per delta, whose step is relative to the RMS of the matrix that it changes.

        Args:
            learning_rate: The largest step in units of that RMS.

        Returns:
            Groups for an optimizer; "peak" is the largest step.
        """
        groups = []
        for module in self.modules:
            rms = float_weight(module.base).float().square().mean().sqrt().item()
            groups.append({"params": [module.delta], "peak": learning_rate * rms})
        return groups

    def quantize_like(self, checkpoint: Checkpoint) -> list[str]:
        """Rounds patched rows as the base's file rounds them, from now on; tensors of plain numbers are left alone.

        Args:
            checkpoint: The base.

        Returns:
            The types of the quantized tensors, sorted.

        Raises:
            QuantizationError: Rows of such a type cannot be encoded on this machine.
        """
        kinds = set()
        for projection, module in self.places:
            name = disk_name(projection.weight_name, checkpoint)
            info = checkpoint.info(name)
            if info.plain:
                continue
            kinds.add(info.dtype)
            order = np.argsort(rows := module.rows.cpu().numpy())
            stored = np.empty((len(rows), module.base.in_features), np.float32)
            stored[order] = float_rows(checkpoint, name, rows[order])
            module.rounding = (stored, info)
            module.round_rows()
        return sorted(kinds)

    def round_rows(self) -> None:
        """Rounds the rows of quantized tensors; see `ClusterDelta.round_rows`."""
        for module in self.modules:
            module.round_rows()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the deltas replace their Linears; afterwards the model is as before."""
        with swapped(self.places):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the attached deltas are disabled: the model answers as the base."""
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
        """Sets all deltas to copies that `snapshot` returned."""
        for module, delta in zip(self.modules, deltas, strict=True):
            module.delta.copy_(delta)
            module.round_rows()

    def round_to(self, dtype: str) -> None:
        """Rounds the deltas to their storage dtype ("F32", "BF16" or "F16"), so that what is evaluated is what ships."""
        kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        self.restore([delta.to(kind).float() for delta in self.snapshot()])


def _delta(projection: Projection, neurons: int, group: Clusters) -> ClusterDelta:
    """The module for a projection; each stacked part (gate, up) of a fused projection has its own deltas."""
    base = projection.linear
    rows = np.concatenate([group.neurons + part * neurons for part in range(projection.parts)])
    labels = np.concatenate([group.labels + part * group.k for part in range(projection.parts)])
    device = base.weight.device
    return ClusterDelta(
        base, torch.from_numpy(rows).to(device), torch.from_numpy(labels).to(device), group.k * projection.parts
    )
