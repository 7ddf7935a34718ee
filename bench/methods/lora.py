"""LoRA (arXiv 2106.09685) by PEFT, trained by the same loop on the same data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from bench.methods._scene import Attempt, Method, Scene

_RATE = 5e-4
"""The usual step of AdamW for adapters of rank 8 on small models."""
_RATE_ALL = 2e-4
"""That of QLoRA (arXiv 2305.14314) for adapters on all projections."""


class LoraSet:
    """Adapters on some Linears of a frozen model, in float32; the model has them only while they are attached.

    Args:
        model: The base.
        names: The names of the Linears.
        first_layer: The lowest layer among them.
        rank: Of each adapter.
        alpha: What an adapter adds is scaled by alpha / rank.
        rate: The largest step of AdamW.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], first_layer: int, *, rank: int, alpha: int, rate: float) -> None:
        self.first_layer, self._rate = first_layer, rate
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(names)), model)
        del model.peft_config  # the next adapters are not a second one beside these
        self._places: list[tuple[nn.Module, str, Any]] = []
        for name in names:
            parent, _, attribute = name.rpartition(".")
            layer = model.get_submodule(name)
            layer.lora_A.float()
            layer.lora_B.float()
            self._places.append((model.get_submodule(parent), attribute, layer))
        self._put(attached=False)

    def _put(self, *, attached: bool) -> None:
        for parent, attribute, layer in self._places:
            setattr(parent, attribute, layer if attached else layer.base_layer)

    def _parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter in turn."""
        return [adapter.default.weight for _, _, layer in self._places for adapter in (layer.lora_A, layer.lora_B)]

    @property
    def device(self) -> torch.device:
        """Where the adapters are."""
        return self._parameters()[0].device

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self._parameters())

    def groups(self, _: float) -> list[dict[str, Any]]:
        """One group, with a step of its own."""
        return [{"params": self._parameters(), "peak": self._rate}]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model has the adapters."""
        self._put(attached=True)
        try:
            yield
        finally:
            self._put(attached=False)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the attached adapters add nothing."""
        self._enable(enabled=False)
        try:
            yield
        finally:
            self._enable(enabled=True)

    def _enable(self, *, enabled: bool) -> None:
        for _, _, layer in self._places:
            layer.enable_adapters(enabled)

    def snapshot(self) -> list[torch.Tensor]:
        """Copies of all values."""
        return [parameter.detach().clone() for parameter in self._parameters()]

    @torch.no_grad()
    def restore(self, values: Sequence[torch.Tensor]) -> None:
        """Sets all values."""
        for parameter, value in zip(self._parameters(), values, strict=True):
            parameter.copy_(value)

    def scaled(self, values: Sequence[torch.Tensor], strength: float) -> list[torch.Tensor]:
        """The adapters with B times the strength."""
        return [value * strength if place % 2 else value for place, value in enumerate(values)]

    def round_rows(self) -> None:
        """Adapters are not rounded."""


def linears(scene: Scene, layers: Iterable[nn.Module]) -> list[str]:
    """The names of all Linears of some layers: of a Llama the projections q, k, v, o, gate, up and down."""
    inside = {id(module) for layer in layers for module in layer.modules() if isinstance(module, nn.Linear)}
    return [name for name, module in scene.run.model.named_modules() if id(module) in inside]


def _gate_up(scene: Scene, first: int) -> LoraSet:
    names = [p.weight_name.removesuffix(".weight") for b in scene.blocks if b.layer >= first for p in b.projections]
    return LoraSet(scene.run.model, names, first, rank=8, alpha=16, rate=_RATE)


def _same_layers(scene: Scene) -> Attempt:
    return Attempt(_gate_up(scene, scene.first_layer), scene.examples)


def _all_layers(scene: Scene) -> Attempt:
    return Attempt(_gate_up(scene, 0), scene.examples)


def _all_projections(scene: Scene) -> Attempt:
    names = linears(scene, scene.decoder)
    return Attempt(LoraSet(scene.run.model, names, 0, rank=16, alpha=32, rate=_RATE_ALL), scene.examples)


METHODS = (
    Method("lora", "LoRA, r = 8, on gate and up of the layers that nest patches", _same_layers),
    Method("lora-gate-up", "LoRA, r = 8, on gate and up of all layers", _all_layers),
    Method("lora-all", "LoRA, r = 16, on the seven projections of all layers", _all_projections),
)
