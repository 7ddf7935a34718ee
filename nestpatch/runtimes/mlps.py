"""Where the feed-forward neurons of a loaded model are: its blocks by layer, and the matrices that produce the neurons."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nestpatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _MlpKind:
    """A family of feed-forward blocks by the names of its Linear children.

    `inputs` produce the neurons (a fused one holds `fused` of them stacked, gate first); `output` consumes their activation.
    """

    inputs: tuple[str, ...]
    output: str
    fused: int = 1


_KINDS = (
    _MlpKind(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    _MlpKind(("gate_up_proj",), "down_proj", fused=2),  # Phi-3, GLM
    _MlpKind(("c_fc",), "c_proj"),  # GPT-Neo (GPT-2's Conv1D stores rows and columns swapped: not supported)
    _MlpKind(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon
    _MlpKind(("fc1",), "fc2"),  # OPT, Phi-2
    _MlpKind(("fc_in",), "fc_out"),  # GPT-J, CodeGen
)


@dataclass(frozen=True, eq=False)
class Projection:
    """One Linear that produces neurons.

    Attributes:
        parent: The module that holds it.
        attribute: Its name in that module.
        weight_name: The name of its weight in the model.
        parts: How many stacked matrices the weight holds: neuron n has rows n, n + neurons, ...
    """

    parent: nn.Module
    attribute: str
    weight_name: str
    parts: int

    @property
    def linear(self) -> Any:
        """The module itself, which training may have replaced."""
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """The feed-forward block of one layer.

    Attributes:
        layer: Its number, from 0.
        name: The module's name in the model.
        neurons: How many there are.
        projections: The Linears that produce the neurons.
        output: The Linear that consumes their activation.
    """

    layer: int
    name: str
    neurons: int
    projections: tuple[Projection, ...]
    output: nn.Module


def find_mlps(model: nn.Module) -> tuple[MlpBlock, ...]:
    """Finds the feed-forward blocks.

    Args:
        model: A loaded model.

    Returns:
        The blocks in the order of the layers.

    Raises:
        UnsupportedModelError: No block of a known kind is made of Linear layers.
    """
    from torch import nn

    blocks: list[MlpBlock] = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for kind in _KINDS:
            needed = (*kind.inputs, kind.output)
            if not all(isinstance(children.get(child), nn.Linear) for child in needed):
                continue
            output = children[kind.output]
            projections = tuple(
                Projection(module, child, f"{name}.{child}.weight".lstrip("."), kind.fused) for child in kind.inputs
            )
            blocks.append(MlpBlock(len(blocks), name, int(output.in_features), projections, output))
    if not blocks:
        classes = sorted({type(m).__name__ for n, m in model.named_modules() if re.search(r"mlp|feed|ffn|fc", n.lower())})
        found = f"; what looks like one is made of {', '.join(classes)}" if classes else ""
        raise UnsupportedModelError(f"{type(model).__name__} has no feed-forward block that nestpatch knows{found}")
    return tuple(blocks)
