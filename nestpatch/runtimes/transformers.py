"""The model under training: loading it, its chat format, and where its feed-forward neurons are."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import MAX_JSON, open_regular
from nestpatch.formats.checkpoint import Checkpoint, row_blocks
from nestpatch.formats.gguf.names import expert_of
from nestpatch.formats.safetensors import SINGLE
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.rows import merge
from nestpatch.runtimes.text import IGNORED, pad_left, prompt_ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""What of a Hub repository is needed: no weights of other formats."""
READ_WHOLE = (".json", ".model", ".jinja", ".txt")
"""Endings of the files that transformers reads into memory."""


@dataclass(frozen=True)
class MlpKind:
    """A family of feed-forward blocks by the names of its Linear children.

    `inputs` produce the neurons (a fused one holds `fused` of them stacked, gate first); `output` consumes their activation.
    """

    inputs: tuple[str, ...]
    output: str
    fused: int = 1


MLP_KINDS = (
    MlpKind(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    MlpKind(("gate_up_proj",), "down_proj", fused=2),  # Phi-3, GLM
    MlpKind(("c_fc",), "c_proj"),  # GPT-Neo (GPT-2's Conv1D stores rows and columns swapped: not supported)
    MlpKind(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX, Falcon
    MlpKind(("fc1",), "fc2"),  # OPT, Phi-2
    MlpKind(("fc_in",), "fc_out"),  # GPT-J, CodeGen
)


@dataclass(frozen=True, eq=False)
class Projection:
    """One Linear that makes neurons, and its weight's name in the model."""

    parent: nn.Module
    attribute: str
    weight_name: str
    parts: int
    """How many stacked matrices the weight holds: neuron n has rows n, n + neurons, ..."""

    @property
    def linear(self) -> Any:
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True, eq=False)
class MlpBlock:
    """One layer's feed-forward block."""

    layer: int
    name: str
    neurons: int
    projections: tuple[Projection, ...]
    output: nn.Module


def find_mlps(model: nn.Module) -> tuple[MlpBlock, ...]:
    """The feed-forward blocks in the order of the layers.

    Raises UnsupportedModelError when there is none of MLP_KINDS made of Linear layers.
    """
    from torch import nn

    blocks: list[MlpBlock] = []
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for kind in MLP_KINDS:
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


def pick_device(wanted: str) -> tuple[str, str]:
    """(device, reason)."""
    import torch

    if wanted != "auto":
        return wanted, "asked for"
    if torch.cuda.is_available():
        return "cuda", f"{torch.cuda.get_device_name()} found"
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU found"
    return "cpu", "no GPU found"


def pick_dtype(wanted: str, device: str) -> tuple[str, str]:
    """(torch dtype name, reason)."""
    if wanted != "auto":
        return wanted, "asked for"
    if device == "cpu":
        return "float32", "CPUs compute bfloat16 slowly"
    return "bfloat16", "accelerators compute it natively"


@dataclass(frozen=True)
class ModelLocation:
    """Where a model lies on this machine, and where it came from."""

    path: Path
    model_id: str
    revision: str = ""


def locate(model: str | Path) -> ModelLocation:
    """Finds a model directory, or fetches a Hub id ("user/model" or "user/model@revision") into the Hub cache.

    Raises CheckpointFormatError when it is neither.
    """
    path = Path(model)
    if path.exists():
        return ModelLocation(path, path.resolve().name)
    from huggingface_hub import snapshot_download

    name, _, revision = str(model).partition("@")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=FETCHED))
    except Exception as error:  # the Hub client raises network, validation and HTTP errors of many kinds
        raise CheckpointFormatError(
            f"there is no model directory {model}, and the Hub gave none: {error}", advice="Check the path or the Hub id."
        ) from error
    return ModelLocation(folder, name, folder.name)


@contextmanager
def model_directory(path: Path) -> Iterator[Path]:
    """A directory that transformers can load: the path itself, or for a weight file its config and tokenizer with that file.

    Raises CheckpointFormatError when a weight file has no config.json beside it.
    """
    if path.is_dir():
        yield path
        return
    if not (path.parent / "config.json").is_file():
        raise CheckpointFormatError(
            f"{path} has no config.json beside it", advice="Give the model directory, or put the file beside its config."
        )
    with tempfile.TemporaryDirectory() as folder:
        for file in path.parent.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".nest")):
                _link(file, Path(folder) / file.name)
        _link(path, Path(folder) / SINGLE)
        yield Path(folder)


def _link(file: Path, target: Path) -> None:
    try:
        target.symlink_to(file.resolve())
    except OSError:  # Windows without the right to make links
        shutil.copyfile(file, target)


def require_bounded(folder: Path) -> None:
    """Raises CheckpointFormatError for files beside the weights that are none, or too long: transformers reads them whole."""
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_WHOLE and os.path.lexists(file.resolve()):
            with open_regular(file, error=CheckpointFormatError) as opened:
                size = os.fstat(opened.fileno()).st_size
            if size > MAX_JSON:
                raise CheckpointFormatError(f"{file} has {size} bytes; {MAX_JSON} are allowed")


def load_model(source: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model directory or a weight file beside its config, frozen and in evaluation mode.

    Raises CheckpointFormatError when transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with model_directory(source) as folder:
        require_bounded(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder))
            model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=getattr(torch, dtype))
        except Exception as error:  # transformers raises whatever the file provokes: struct, json, OS, key and value errors
            raise CheckpointFormatError(
                f"transformers cannot load {source}: {' '.join(str(error).split())}",
                advice="A model directory needs config.json, the weights and the tokenizer.",
            ) from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(device=torch.device(device))  # type: ignore[call-arg]
    model.train(mode=False)
    model.requires_grad_(requires_grad=False)
    return model, tokenizer


Generate: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Prompts in, answers out, in the same order."""


def with_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    batch: int = 64,
    on_event: OnEvent = ignore,
) -> Generate:
    """Greedy generation in transformers; every answer ends at the end token or after `max_new_tokens`."""
    import torch
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id if model.generation_config else None
    # A config of our own: a shipped one may ask for sampling, penalties or beams.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
    )

    def generate(prompts: Sequence[str]) -> list[str]:
        rows = prompt_ids(tokenizer, prompts, max_prompt_tokens)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        answers = [""] * len(rows)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            ids, mask = pad_left([rows[i] for i in places], tokenizer.pad_token_id, model.device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
            on_event(Event("generate", min(start + batch, len(order)), len(order)))
        return answers

    return generate


# transformers stacks the matrices of single experts while loading: part of the name on disk -> (stack, which half of it).
_STACKS = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None), "w2": ("down_proj", None),
}  # fmt: skip


def fold(model: PreTrainedModel, checkpoint: Checkpoint, pack: Pack, strength: float = 1.0, *, rounded: bool = True) -> None:
    """Changes the weights of `model`, which was loaded from `checkpoint`: merged in the dtype on disk, then converted as
    loading converts. Without `rounded`, the change is added as an adapter adds it, to float32 values.

    Raises BaseMismatchError when the checkpoint is not the pack's base.
    """
    import torch

    plan = make_plan(pack, checkpoint, strength)
    parameters = _by_name_on_disk(model, checkpoint)
    for tensor in plan.tensors:
        name = tensor.delta.name
        matrix = _matrix(name, parameters)
        for part in row_blocks(tensor.delta.neurons, tensor.info.row_bytes):
            rows = tensor.delta.rows[part].astype(np.int64)
            stored = checkpoint.read_rows(name, rows)
            places = torch.from_numpy(rows).to(matrix.device)
            if not same_weights(stored, matrix[places]):
                raise CheckpointFormatError(f"tensor {name} of {checkpoint.path} is not the weight that transformers loaded")
            change = tensor.delta.dense(part.start, part.stop)
            merged = merge(stored if rounded else stored.astype(np.float32), change, strength)
            with torch.no_grad():
                matrix[places] = torch.from_numpy(merged.astype(np.float32)).to(matrix.device, matrix.dtype)


def _by_name_on_disk(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        try:
            parameters[disk_name(name, checkpoint)] = parameter
        except CheckpointFormatError:  # not on disk under its own name: experts that were stacked while loading
            parameters.setdefault(name, parameter)
    return parameters


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
    import torch

    # Through float32: every stored dtype widens to it exactly, and it narrows as loading does.
    loaded = torch.from_numpy(stored.astype(np.float32)).to(parameter.dtype)
    return torch.equal(loaded, parameter.cpu())


def answer_logits(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
    """Float32 logits [answer tokens, vocabulary] and their labels [answer tokens]."""
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return logits[wanted].float(), labels[:, 1:][wanted]
