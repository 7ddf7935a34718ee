"""The weights of a model that transformers loaded: its feed-forward blocks, and the tensors on disk that they come from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo, row_blocks
from nestpatch.formats.gguf.names import expert_of
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.rows import FloatArray, merge

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

# transformers stacks the matrices of single experts while loading: part of the name on disk -> (stack, which half of it).
_STACKS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None), "w2": ("down_proj", None),
}  # fmt: skip


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

    plan = make_plan(pack, checkpoint, strength)
    parameters: dict[str, torch.Tensor] = {}
    for weight, parameter in model.named_parameters():
        try:
            parameters[disk_name(weight, checkpoint)] = parameter
        except CheckpointFormatError:  # not on disk under its own name: experts that were stacked while loading
            parameters.setdefault(weight, parameter)
    for tensor in plan.tensors:
        name = tensor.delta.name
        matrix = _matrix(name, parameters)
        for part in row_blocks(tensor.delta.neurons, tensor.info.row_bytes):
            rows = tensor.delta.rows[part].astype(np.int64)
            stored = checkpoint.read_rows(name, rows)
            places = torch.from_numpy(rows).to(matrix.device)
            old = matrix[places].detach()
            if not same_weights(stored, old, tensor.info):
                raise CheckpointFormatError(f"tensor {name} of {checkpoint.path} is not the weight that transformers loaded")
            change = tensor.delta.dense(part.start, part.stop)
            plain = tensor.info.plain and rounded
            merged = merge(stored if plain else _numbers(tensor.info, stored), change, strength)
            if rounded and not plain:
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


def _matrix(name: str, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A view [rows, in_features] of what a tensor on disk became."""
    if name in parameters:
        parameter = parameters[name]
        return parameter.view(-1, parameter.shape[-1])
    expert = expert_of(name)
    if expert is not None and expert[2] in _STACKS:
        stack, half = _STACKS[expert[2]]
        layer = re.search(r"\.\d+\.", name)
        ending = f".experts.{stack}"
        fits = [p for other, p in parameters.items() if layer and layer[0] in other and other.endswith(ending)]
        if len(fits) == 1 and fits[0].ndim == 3 and expert[1] < len(fits[0]):
            matrix = fits[0][expert[1]]
            return matrix if half is None else matrix.chunk(2)[half]
    raise CheckpointFormatError(f"the loaded model has no parameter for {name}")


def disk_name(weight: str, checkpoint: Checkpoint) -> str:
    """Finds the name on disk of a parameter: the same name, or the name with or without the model's prefix.

    Args:
        weight: The parameter's name in the loaded model.
        checkpoint: The model on disk.

    Returns:
        The tensor's name.

    Raises:
        CheckpointFormatError: No tensor fits, or several do.
    """
    names = checkpoint.tensors()
    if weight in names or _known(weight, checkpoint):
        return weight
    fits = [name for name in names if weight.endswith(f".{name}") or name.endswith(f".{weight}")]
    if len(fits) != 1:
        found = ", ".join(fits) or "none"
        raise CheckpointFormatError(
            f"{checkpoint.path} has no tensor for the parameter {weight} (candidates: {found})",
            advice="transformers renames this model's weights while loading; nestpatch cannot map them to the file.",
        )
    return fits[0]


def _known(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint finds rows by this name, though it has another for the tensor, as GGUF files do."""
    try:
        return checkpoint.has(name)
    except UnsupportedModelError:  # there, but not as rows that a pack can change
        return False


def _numbers(info: TensorInfo, stored: Any) -> FloatArray:
    """Rows on disk as float32, exactly."""
    if info.plain:
        return np.asarray(stored, np.float32)
    return info.coding.decode(stored.view(np.uint8))


def same_weights(stored: Any, parameter: torch.Tensor, info: TensorInfo | None = None) -> bool:
    """Compares rows on disk with rows of the loaded model, after the conversion that loading made.

    Args:
        stored: Rows as they are on disk, in the dtype of the file.
        parameter: The same rows of the loaded model.
        info: The tensor; None for one of plain numbers.

    Returns:
        True when every element is equal.
    """
    import torch

    # Through float32: every stored dtype widens to it exactly, and it narrows as loading does.
    wide = stored.astype(np.float32) if info is None else _numbers(info, stored)
    loaded = torch.from_numpy(wide).to(parameter.dtype)
    return torch.equal(loaded, parameter.cpu())


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
