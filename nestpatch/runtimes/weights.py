"""The weights of a model that transformers loaded: its feed-forward blocks, and packs merged into them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows, row_blocks
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.rows import merge
from nestpatch.runtimes.stored import StoredWeights, same_weights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class PatchedRows:
    """Some rows of a loaded matrix, before and after a merge.

    Attributes:
        matrix: A view [rows, in_features] of the parameter.
        rows: int64 [changed], the rows that change.
        old: [changed, in_features] in the parameter's dtype.
        new: The same after the merge.
    """

    matrix: torch.Tensor
    rows: torch.Tensor
    old: torch.Tensor
    new: torch.Tensor


def fold(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0, *, rounded: bool = True) -> None:
    """Merges a pack into the weights of a loaded model.

    Args:
        model: Loaded from `checkpoint`.
        checkpoint: The model on disk.
        pack: What to merge.
        strength: Factor of the pack's change.
        rounded: Merge in the type on disk and convert as loading converts; else add the change to float32 values, as an
            adapter does.

    Raises:
        BaseMismatchError: The checkpoint is not the pack's base.
        CheckpointFormatError: transformers changed the weights while loading them.
    """
    import torch

    with torch.no_grad():
        for part in merged_parameters(model, checkpoint, pack, strength, rounded=rounded):
            part.matrix[part.rows] = part.new


def merged_parameters(
    model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0, *, rounded: bool = True
) -> Iterator[PatchedRows]:
    """Computes what `fold` would write, block by block.

    Args:
        model: Loaded from `checkpoint`.
        checkpoint: The model on disk.
        pack: What to merge.
        strength: Factor of the pack's change.
        rounded: As for `fold`.

    Yields:
        The rows of one block.

    Raises:
        BaseMismatchError: The checkpoint is not the pack's base.
        CheckpointFormatError: transformers changed the weights while loading them.
    """
    import torch

    stored_weights = StoredWeights(model, checkpoint)
    for tensor in make_plan(pack, checkpoint, strength).tensors:
        name = tensor.delta.name
        matrix = stored_weights.matrix(name)
        for part in row_blocks(tensor.delta.neurons, tensor.info.row_bytes):
            rows = tensor.delta.rows[part].astype(np.int64)
            exact = rounded and tensor.info.plain
            stored = checkpoint.read_rows(name, rows) if exact else float_rows(checkpoint, name, rows)
            places = torch.from_numpy(rows).to(matrix.device)
            old = matrix[places].detach()
            if not same_weights(stored, old):
                raise CheckpointFormatError(f"tensor {name} of {checkpoint.path} is not the weight that transformers loaded")
            change = tensor.delta.dense(part.start, part.stop)
            merged = merge(stored, change, strength)
            if rounded and not tensor.info.plain:
                merged = tensor.info.coding.decode(tensor.info.coding.encode(merged))
            yield PatchedRows(matrix, places, old, torch.from_numpy(merged.astype(np.float32)).to(matrix.device, matrix.dtype))


@contextmanager
def swapped_in(parts: Sequence[PatchedRows]) -> Iterator[None]:
    """Writes the new rows into the model; at the end restores the old ones, bit for bit.

    Args:
        parts: From `merged_parameters`.
    """
    import torch

    with torch.no_grad():
        for part in parts:
            part.matrix[part.rows] = part.new
    try:
        yield
    finally:
        with torch.no_grad():
            for part in parts:
                part.matrix[part.rows] = part.old


@dataclass(frozen=True)
class _MlpKind:
    """A family of feed-forward blocks by the names of its Linear children.

    `inputs` produce the neurons (a fused one holds `fused` of them stacked, gate first); `output` consumes their activation.
    """

    inputs: tuple[str, ...]
    output: str
    fused: int = 1


_KINDS = (
    _MlpKind(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, Granite, shared experts
    _MlpKind(("gate_up_proj",), "down_proj", fused=2),  # Phi-3, GLM
    _MlpKind(("input_linear",), "output_linear", fused=2),  # Granite 4
    _MlpKind(("c_fc",), "c_proj"),  # GPT-Neo (GPT-2's Conv1D stores rows and columns swapped: not supported)
    _MlpKind(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon
    _MlpKind(("fc1",), "fc2"),  # OPT, Phi-2
    _MlpKind(("fc_in",), "fc_out"),  # GPT-J, CodeGen
)


@dataclass(frozen=True, eq=False)
class Projection:
    """One weight whose rows produce neurons: that of a Linear, or of all experts of a layer.

    Attributes:
        parent: The module that holds the Linear or the experts.
        attribute: Its name in that module.
        weight_name: The name of the weight in the model.
        parts: How many stacked matrices the weight holds for each expert: the gate rows, then the up rows.
        neurons: Neurons of the Linear, or of one expert.
        experts: The experts whose neurons are counted, one after the other; a Linear is the only one.
    """

    parent: nn.Module
    attribute: str
    weight_name: str
    parts: int
    neurons: int
    experts: tuple[int, ...] = (0,)

    @property
    def linear(self) -> Any:
        """The Linear, or the module of the experts, which training may have replaced."""
        return getattr(self.parent, self.attribute)

    def rows(self, neurons: IntArray, part: int) -> IntArray:
        """The rows of the weight that produce neurons, experts flattened.

        Args:
            neurons: Numbers of the block's neurons, int64 [neurons].
            part: 0 for the gate of a gated block, 1 for its up projection.

        Returns:
            int64 [neurons].
        """
        expert, place = np.divmod(neurons, self.neurons)
        found: IntArray = (np.asarray(self.experts)[expert] * self.parts + part) * self.neurons + place
        return found


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """The feed-forward block of one layer, or one of them: the experts of a layer are a block, its shared expert is another.

    Attributes:
        layer: The layer's number, from 0.
        name: The module's name in the model.
        neurons: How many there are.
        projections: What produces the neurons.
        output: The Linear that consumes their activation; the module of the experts where `mixture`.
        mixture: Whether its neurons are those of experts, each of which sees the tokens that are routed to it.
    """

    layer: int
    name: str
    neurons: int
    projections: tuple[Projection, ...]
    output: nn.Module
    mixture: bool = False

    @property
    def experts(self) -> tuple[int, ...]:
        """The experts whose neurons are counted."""
        return self.projections[0].experts

    def of_experts(self, experts: Sequence[int]) -> MlpBlock:
        """The same block with the neurons of some experts alone.

        Args:
            experts: Their numbers.
        """
        projections = tuple(replace(projection, experts=tuple(experts)) for projection in self.projections)
        return replace(self, projections=projections, neurons=len(experts) * projections[0].neurons)


def find_mlps(model: nn.Module) -> tuple[MlpBlock, ...]:
    """Finds the feed-forward blocks of a language model; of a vision-language model, those of its text model.

    Args:
        model: A loaded model.

    Returns:
        The blocks in the order of the layers.

    Raises:
        UnsupportedModelError: No block is of a known kind.
    """
    blocks: list[MlpBlock] = []
    layers: dict[str, int] = {}
    for name, module in _text_modules(model):
        found = _experts_block(name, module) or _linear_block(name, module)
        if found is not None:
            layer = re.match(r".*?\.\d+(?=\.|$)", name)  # the first number: experts are numbered further down
            number = layers.setdefault(layer[0] if layer else name, len(layers))
            blocks.append(replace(found, layer=number))
    if not blocks:
        raise _unknown(model)
    return tuple(blocks)


def _text_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the text model, with their names in the whole model."""
    whole: Any = model
    text: nn.Module = whole.get_decoder() if hasattr(model, "get_decoder") else model
    start = next((name for name, module in model.named_modules() if module is text), "")
    yield from text.named_modules(prefix=start)


def _linear_block(name: str, module: nn.Module) -> MlpBlock | None:
    """The block that a module is by the names of its Linear children."""
    from torch import nn

    children = dict(module.named_children())
    for kind in _KINDS:
        if all(isinstance(children.get(child), nn.Linear) for child in (*kind.inputs, kind.output)):
            output: Any = children[kind.output]
            neurons = int(output.in_features)
            weights = ((child, f"{name}.{child}.weight".lstrip(".")) for child in kind.inputs)
            projections = tuple(Projection(module, child, weight, kind.fused, neurons) for child, weight in weights)
            return MlpBlock(0, name, neurons, projections, output)
    return None


def _experts_block(name: str, parent: nn.Module) -> MlpBlock | None:
    """The block that the experts of a module are, where a row of their stacked weight is a row of a neuron."""
    experts: Any = getattr(parent, "experts", None)
    if _stack_of(experts) is None or odd_experts(experts):
        return None
    count, _, neurons = experts.down_proj.shape
    projection = Projection(parent, "experts", f"{name}.experts.gate_up_proj".lstrip("."), 2, neurons, tuple(range(count)))
    return MlpBlock(0, f"{name}.experts".lstrip("."), count * neurons, (projection,), experts, mixture=True)


def _stack_of(module: Any) -> torch.Tensor | None:
    """The stacked weight of experts [experts, .., ..]."""
    stack: Any = getattr(module, "gate_up_proj", None)
    return stack if isinstance(getattr(stack, "ndim", None), int) and stack.ndim == 3 else None


def odd_experts(module: Any) -> str:
    """Why no pack can change the experts of a module that stacks them; empty where one can.

    Args:
        module: It has a stacked weight `gate_up_proj`.
    """
    if getattr(module, "is_transposed", False):
        mixed = " and mixes gate and up" if not getattr(module, "is_concatenated", True) else ""
        return f"{type(module).__name__} stores gate_up_proj transposed{mixed}: a row of the file is an input, not a neuron"
    # What transformers itself needs to compute experts in more ways than one; `each_expert` computes as it does.
    if (
        not hasattr(module, "_apply_gate")
        or getattr(module, "has_bias", False)
        or getattr(module, "has_post_expert_norm", False)
    ):
        return f"{type(module).__name__} computes its experts in a way of its own"
    count, width, neurons = module.down_proj.shape
    if tuple(module.gate_up_proj.shape) != (count, 2 * neurons, width):
        return f"{type(module).__name__} stores gate_up_proj in another shape: a row of the file is no neuron"
    return ""


def experts_left_alone(model: nn.Module) -> tuple[str, ...]:
    """Why some experts of a model are not among its blocks.

    Args:
        model: A loaded model.

    Returns:
        One reason for each kind of experts.
    """
    found = (odd_experts(module) for _, module in _text_modules(model) if _stack_of(module) is not None)
    return tuple(dict.fromkeys(reason for reason in found if reason))


def _unknown(model: nn.Module) -> UnsupportedModelError:
    reasons = experts_left_alone(model)
    if reasons:
        return UnsupportedModelError(
            f"{type(model).__name__} cannot be trained: {'; '.join(reasons)}",
            advice="A pack changes whole rows of the file. docs/training.md lists the families that can be trained.",
        )
    classes = sorted({type(m).__name__ for n, m in model.named_modules() if re.search(r"mlp|feed|ffn|fc", n.lower())})
    found = f"; what looks like one is made of {', '.join(classes)}" if classes else ""
    return UnsupportedModelError(f"{type(model).__name__} has no feed-forward block that nestpatch knows{found}")
