"""LoRA on the same projections, as the peer that shared deltas are compared with: trained by the same loop on the same data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from nestpatch.nest_train._deltas import swapped
from nestpatch.runtimes.weights import MlpBlock

_RATE = 5e-4
"""The usual step of AdamW for LoRA."""


class LoraLinear(nn.Module):
    """A frozen Linear plus `2 B A x` (PEFT's scale for alpha = 2 r); B starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.strength = base, 1.0
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.base(x) + linear(linear(x, self.a.to(x.dtype)), (2 * self.strength * self.b).to(x.dtype))


class LoraSet:
    """LoRA adapters on the projections that produce neurons, in the layers from `first` on. Takes the place of a `DeltaSet`."""

    def __init__(self, blocks: Sequence[MlpBlock], first: int, rank: int = 8) -> None:
        self.first_layer = first
        self.places = [(p, LoraLinear(p.linear, rank)) for block in blocks if block.layer >= first for p in block.projections]

    @property
    def device(self) -> torch.device:
        """Where the adapters are."""
        return self.places[0][1].a.device

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._parameters())

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for _, module in self.places for parameter in (module.a, module.b)]

    def groups(self, _: float) -> list[dict[str, Any]]:
        """One group, with LoRA's usual step."""
        return [{"params": self._parameters(), "peak": _RATE}]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model has the adapters."""
        with swapped(self.places):
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the attached adapters add nothing."""
        strengths = [module.strength for _, module in self.places]
        self.scale(0.0)
        try:
            yield
        finally:
            for (_, module), strength in zip(self.places, strengths, strict=True):
                module.strength = strength

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all values."""
        return [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Sets all values."""
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.copy_(value)

    def round_rows(self) -> None:
        """Adapters are not rounded."""

    def scale(self, strength: float) -> None:
        """Multiplies what the adapters add."""
        for _, module in self.places:
            module.strength = strength
