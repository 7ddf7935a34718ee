"""Full fine-tuning of the layers, trained by the same loop on the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.methods._scene import Attempt, Method, Scene

_RATE = 2e-5
"""That of Llama 2's fine-tuning (arXiv 2307.09288), and of most after it."""


class FullSet:
    """All weights of some layers, trained as float32 copies; the model has them only while they are attached.

    Args:
        layers: From the first one on.
    """

    first_layer = 0

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._weights = [weight for layer in layers for weight in layer.parameters()]
        self._base = [weight.detach().clone() for weight in self._weights]
        self._master = [nn.Parameter(weight.detach().float().clone()) for weight in self._weights]
        self._is_attached = False

    @torch.no_grad()
    def _put(self, values: Sequence[torch.Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._master[0].device

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(master.numel() for master in self._master)

    def groups(self, _: float) -> list[dict[str, Any]]:
        """One group, with a step of its own."""
        return [{"params": self._master, "peak": _RATE}]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model has the trained weights, whose gradients go to the copies."""
        self._put(self._master)
        self._is_attached = True
        handles = []
        for weight, master in zip(self._weights, self._master, strict=True):
            weight.requires_grad_(requires_grad=True)
            handles.append(weight.register_post_accumulate_grad_hook(partial(_hand_over, master)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for weight in self._weights:
                weight.requires_grad_(requires_grad=False)
            self._is_attached = False
            self._put(self._base)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model has its own weights."""
        self._put(self._base)
        try:
            yield
        finally:
            self._put(self._master)

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all values."""
        return [master.detach().clone() for master in self._master]

    @torch.no_grad()
    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Sets all values."""
        for master, value in zip(self._master, values, strict=True):
            master.copy_(value)
        self.round_rows()

    def scaled(self, values: Sequence[torch.Tensor], strength: float) -> list[torch.Tensor]:
        """The weights on the line from the base through the trained ones."""
        return [torch.lerp(base.float(), value, strength) for base, value in zip(self._base, values, strict=True)]

    def round_rows(self) -> None:
        """Gives the copies to the model, in its own type."""
        if self._is_attached:
            self._put(self._master)


def _hand_over(master: nn.Parameter, weight: torch.Tensor) -> None:
    """Moves a gradient to the float32 copy, which adds up those of several batches."""
    gradient = weight.grad.float()
    master.grad = gradient if master.grad is None else master.grad + gradient
    weight.grad = None


def _full(scene: Scene) -> Attempt:
    return Attempt(FullSet(scene.decoder), scene.examples)


METHODS = (Method("full", "full fine-tuning of all weights of all layers", _full),)
