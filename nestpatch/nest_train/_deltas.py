"""Shared deltas attached to the Linears and experts of a frozen model: what the tuning trains and the pack stores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from nestpatch.formats.checkpoint import TensorInfo, float_rows
from nestpatch.nest_train._neurons import Clusters
from nestpatch.rows import FloatArray
from nestpatch.runtimes.experts import each_expert
from nestpatch.runtimes.quantized import float_weight
from nestpatch.runtimes.sharded import whole
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.weights import MlpBlock, Projection


class RowDeltas(nn.Module, ABC):
    """A frozen module plus shared deltas on some rows of its weight. `delta`, float32 [clusters, in], starts at zero.

    Args:
        base: The module.
        rows: The rows that change, sorted, int64 [rows].
        cluster: Which delta each row gets, int64 [rows].
        clusters: Number of deltas.

    Attributes:
        numbers: `rows` as a NumPy array.
        labels: `cluster` as a NumPy array.
    """

    base: Any

    def __init__(self, base: nn.Module, rows: torch.Tensor, cluster: torch.Tensor, clusters: int) -> None:
        super().__init__()
        self.base = base
        self.membership: torch.Tensor
        self.rows: torch.Tensor
        self.cluster: torch.Tensor
        self.enabled = True
        self.rounding: list[tuple[slice, FloatArray, TensorInfo]] = []
        self.residual: torch.Tensor | None = None
        weight = self.matrix
        self.delta = nn.Parameter(torch.zeros(clusters, weight.shape[-1], device=weight.device))
        # [out, clusters], a few columns: spreading by a product is exact for 0/1, fast, and deterministic on a GPU.
        membership = torch.zeros(len(weight), clusters, dtype=weight.dtype, device=weight.device)
        membership[rows, cluster] = 1
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("cluster", cluster, persistent=False)
        # On the CPU too: a look at them on an accelerator waits for all that is computed.
        self.numbers, self.labels = rows.cpu().numpy(), cluster.cpu().numpy()

    @property
    @abstractmethod
    def matrix(self) -> torch.Tensor:
        """The rows of the base, [rows, in]."""

    def change(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """What the deltas add to the products with some rows of the base.

        Args:
            x: [..., in].
            start: The first of these rows.
            stop: The one after the last.

        Returns:
            [..., stop - start].
        """
        added = linear(linear(x, self.delta.to(x.dtype)), self.membership[start:stop].to(x.dtype))
        if self.residual is None:
            return added
        here = slice(*np.searchsorted(self.numbers, (start, stop)))
        return added.index_add(-1, self.rows[here] - start, linear(x, self.residual[here].to(x.dtype)))

    def rounding_error(self, delta: torch.Tensor) -> torch.Tensor:
        """What rounding changes in each row of base plus delta, of a quantized base.

        Args:
            delta: The values of `delta`, on the CPU.

        Returns:
            float32 [rows, in], on the CPU.
        """
        error = torch.zeros(len(self.numbers), delta.shape[-1])
        for part, rows, info in self.rounding:
            wanted = rows + delta.numpy()[self.labels[part]]
            error[part] = torch.from_numpy(info.coding.decode(info.coding.encode(wanted)) - wanted)
        return error


class ClusterDelta(RowDeltas):
    """A frozen Linear plus shared deltas on some of its rows."""

    @property
    def matrix(self) -> torch.Tensor:
        """The weight, [out, in]."""
        return float_weight(self.base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] -> [..., out]."""
        y: torch.Tensor = self.base(x)
        return y + self.change(x, 0, len(self.membership)) if self.enabled else y


class ExpertsDelta(RowDeltas):
    """The frozen experts of a layer plus shared deltas on some rows of their stacked weight, experts flattened."""

    @property
    def matrix(self) -> torch.Tensor:
        """The rows of all experts, [rows, in]."""
        weight = whole(self.base.gate_up_proj.detach())
        return weight.flatten(0, 1)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, width], int64 [tokens, k], [tokens, k] -> [tokens, width]."""
        if not self.enabled:
            out: torch.Tensor = self.base(hidden_states, top_k_index, top_k_weights)
            return out
        return each_expert(self.base, hidden_states, top_k_index, top_k_weights, change=self._of_expert)

    def _of_expert(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        rows = self.base.gate_up_proj.shape[1]
        return self.change(x, expert * rows, (expert + 1) * rows)


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


def _as_stored(info: TensorInfo) -> TensorInfo:
    return info


class DeltaSet:
    """All deltas of a model, attached and detached together.

    Args:
        blocks: The model's feed-forward blocks.
        clusters: The groups of neurons of each block; blocks without a group get no delta.
    """

    def __init__(self, blocks: Sequence[MlpBlock], clusters: Sequence[Clusters]) -> None:
        self.places: list[tuple[Projection, RowDeltas]] = []
        self.first_layer = min(block.layer for block, group in zip(blocks, clusters, strict=True) if group.k)
        for block, group in zip(blocks, clusters, strict=True):
            if group.k:
                self.places += [(p, _delta(p, group)) for p in block.projections]

    @property
    def modules(self) -> list[RowDeltas]:
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
            rms = module.matrix.float().square().mean().sqrt().item()
            groups.append({"params": [module.delta], "peak": learning_rate * rms})
        return groups

    def quantize_like(self, stored: StoredWeights, as_type: Callable[[TensorInfo], TensorInfo] = _as_stored) -> list[str]:
        """Rounds patched rows as the base's file rounds them, from now on; tensors of plain numbers are left alone.

        Args:
            stored: The base on disk.
            as_type: Gives a tensor another type to be rounded to, and plain numbers to those that are left alone.

        Returns:
            The types of the quantized tensors, sorted.

        Raises:
            QuantizationError: Rows of such a type cannot be encoded on this machine.
        """
        kinds = set()
        for projection, module in self.places:
            module.rounding = []
            for some in stored.split(projection.weight_name, module.numbers):
                info = as_type(stored.checkpoint.info(some.tensor))
                if not info.plain:
                    kinds.add(info.dtype)
                    module.rounding.append((some.part, float_rows(stored.checkpoint, some.tensor, some.rows), info))
        self._round()
        return sorted(kinds)

    def round_rows(self) -> None:
        """Where the base is quantized: computes what rounding changes in each row of base plus delta, after every step.

        The forward pass adds it as a constant, so that the deltas are trained for the rows that a file will hold. The gradient
        passes the rounding unchanged (straight-through estimator, arXiv 1308.3432).
        """
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        for module in self.modules:
            module.residual = None
        modules = [module for module in self.modules if module.rounding]
        if not modules:
            return
        # One copy from the accelerator and one back, not two for each matrix: every copy waits for all that is computed.
        deltas = torch.cat([module.delta.flatten() for module in modules]).float().cpu()
        parts = deltas.split([module.delta.numel() for module in modules])
        errors = [m.rounding_error(part.view(m.delta.shape)) for m, part in zip(modules, parts, strict=True)]
        moved = torch.cat([error.flatten() for error in errors]).to(modules[0].membership)
        for module, error, part in zip(modules, errors, moved.split([e.numel() for e in errors]), strict=True):
            module.residual = part.view(error.shape)

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

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Inside, all deltas are multiplied: the model is the base with the pack at that strength.

        Args:
            strength: The factor.
        """
        whole = self.snapshot()
        self.restore([strength * delta for delta in whole])
        try:
            yield
        finally:
            self.restore(whole)

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all deltas."""
        return [module.delta.detach().clone() for module in self.modules]

    @torch.no_grad()
    def restore(self, deltas: Sequence[torch.Tensor]) -> None:
        """Sets all deltas to copies that `snapshot` returned."""
        for module, delta in zip(self.modules, deltas, strict=True):
            module.delta.copy_(delta)
        self._round()

    def round_to(self, dtype: str) -> None:
        """Rounds the deltas to their storage dtype ("F32", "BF16" or "F16"), so that what is evaluated is what ships."""
        kind = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[dtype]
        self.restore([delta.to(kind).float() for delta in self.snapshot()])


def _delta(projection: Projection, group: Clusters) -> RowDeltas:
    """The module for a projection; each stacked part (gate, up) of a fused projection has its own deltas."""
    base = projection.linear
    rows = np.concatenate([projection.rows(group.neurons, part) for part in range(projection.parts)])
    labels = np.concatenate([group.labels + part * group.k for part in range(projection.parts)])
    order = np.argsort(rows)
    kind = ClusterDelta if isinstance(base, nn.Linear) else ExpertsDelta
    device = next(base.parameters()).device
    chosen, cluster = (torch.from_numpy(part[order]).to(device) for part in (rows, labels))
    return kind(base, chosen, cluster, group.k * projection.parts)
