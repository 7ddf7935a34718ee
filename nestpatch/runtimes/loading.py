"""Models of transformers: finding them on this machine or the Hub, and loading them, from directories and from GGUF files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, NestpatchError
from nestpatch.files.reading import MAX_JSON, open_regular, read_text
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.formats.safetensors import SINGLE
from nestpatch.hub.client import Reference
from nestpatch.rows import DTYPES
from nestpatch.runtimes.quantized import keep_gradients, loading_options
from nestpatch.runtimes.sharded import free_after_use, sharding_options
from nestpatch.runtimes.threads import wait_passively

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""The files of a Hub repository that are needed: no weights of other formats."""
READ_WHOLE = (".json", ".model", ".jinja", ".txt")
"""Endings of the files that transformers reads into memory."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".nest")


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is on this machine, and where it came from.

    Attributes:
        path: A directory or file.
        model_id: The Hub id, or the name of the directory.
        revision: The commit of the Hub; empty for a local model.
    """

    path: Path
    model_id: str
    revision: str = ""


def locate(model: str | Path) -> ModelLocation:
    """Finds a model, or downloads it from the Hub into the Hub's cache.

    Args:
        model: A directory or file, or a Hub id: "owner/name", "owner/name@revision".

    Returns:
        Its location on this machine.

    Raises:
        CheckpointFormatError: It is neither.
    """
    # os.path answers no where Path.exists raises.
    if os.path.exists(model):  # noqa: PTH110
        return ModelLocation(Path(model), Path(model).resolve().name)
    reference = Reference.parse(str(model))
    if reference is None or Path(model).suffix in (".gguf", ".onnx", ".safetensors"):
        raise CheckpointFormatError(
            f"there is no model at {model}", advice="Check the path. A model of the Hub is named owner/name[@revision]."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(reference.repo_id, revision=reference.revision, allow_patterns=_FETCHED))
    except Exception as error:  # the Hub client raises network, validation and HTTP errors of many kinds
        raise CheckpointFormatError(
            f"there is no model directory {model}, and the Hub gave none: {error}", advice="Check the path or the Hub id."
        ) from error
    return ModelLocation(folder, reference.repo_id, folder.name)


@contextmanager
def _model_directory(path: Path) -> Iterator[Path]:
    """A directory that transformers can load: the path itself, or for a weight file its config and tokenizer with that file."""
    if path.is_dir():
        yield path
        return
    if not (path.parent / "config.json").is_file():
        raise CheckpointFormatError(
            f"{path} has no config.json beside it", advice="Give the model directory, or put the file beside its config."
        )
    with tempfile.TemporaryDirectory() as folder:
        for file in path.parent.iterdir():
            if file == path or (file.is_file() and not file.name.endswith(_WEIGHTS)):
                target = Path(folder) / (SINGLE if file == path else file.name)
                try:
                    target.symlink_to(file.resolve())
                except OSError:  # Windows without the right to make links
                    shutil.copyfile(file, target)
        yield Path(folder)


def _require_bounded(folder: Path) -> None:
    """Raises CheckpointFormatError where a file that transformers reads whole is too long, or not a regular file."""
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_WHOLE and os.path.lexists(file.resolve()):
            with open_regular(file, error=CheckpointFormatError) as opened:
                size = os.fstat(opened.fileno()).st_size
            if size > MAX_JSON:
                raise CheckpointFormatError(f"{file} has {size} bytes; {MAX_JSON} are allowed")


def load_model(
    source: Path, device: str, dtype: str, load_in: str = "none", shares: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, frozen and in evaluation mode.

    Args:
        source: A model directory, a weight file beside its config, or a GGUF file, whose weights are dequantized.
        device: Where it computes.
        dtype: Name of a torch dtype.
        load_in: "8bit" or "4bit" keeps the matrices of the layers in so few bits; "none" in `dtype`.
        shares: Processes that divide the weights, all of which call this; 1 loads the whole model. Not in few bits.

    Returns:
        (model, tokenizer); the tokenizer pads at the left.

    Raises:
        CheckpointError: transformers cannot load it, or a GGUF file cannot be read as one of its models.
        MissingExtraError: bitsandbytes is needed for few bits, and is not installed.
    """
    wait_passively()
    import torch

    options = loading_options(load_in, device, getattr(torch, dtype)) | sharding_options(shares)
    if source.suffix == ".gguf" and source.is_file():
        model, tokenizer = _load_gguf(FloatModel(GgufCheckpoint(source)), getattr(torch, dtype), options)
    else:
        model, tokenizer = _load_directory(source, getattr(torch, dtype), options)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.train(mode=False)
    if shares > 1:
        free_after_use(model)
    elif options:  # quantized matrices were made on the device, and stay there
        keep_gradients(model)
    else:
        model.to(device=torch.device(device))  # type: ignore[call-arg]
    model.requires_grad_(requires_grad=False)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_in_one_piece)
    return model, tokenizer


def load_classifier(source: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a sequence classifier in float32, frozen and in evaluation mode.

    Args:
        source: A model directory.
        device: Where it computes.

    Returns:
        (model, tokenizer).

    Raises:
        CheckpointFormatError: transformers cannot load it, or it has no trained head of a classifier.
    """
    wait_passively()
    import torch
    import transformers

    if not source.is_dir():
        raise CheckpointFormatError(f"{source} is not the directory of a classifier")
    with _naming(source):
        _require_bounded(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(source), dtype=torch.float32, output_loading_info=True
        )
    if missing := report["missing_keys"]:  # transformers would start them at random
        raise CheckpointFormatError(f"{source} has no weights {min(missing)}", advice="Give a model trained as a classifier.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # decoders find the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    model.train(mode=False)
    model.to(device=torch.device(device))
    return model.requires_grad_(requires_grad=False), tokenizer


def _in_one_piece(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copies the last positions that `generate` cuts out, a few numbers: on the cut itself PyTorch multiplies by batches, and
    copies the whole vocabulary for every prompt (5 of 10 seconds for 64 short answers of a model of 135 million parameters).
    """
    return args[0].contiguous(), *args[1:]


def _load_directory(
    source: Path, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers

    with _model_directory(source) as folder, _naming(source):
        _require_bounded(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        config = transformers.AutoConfig.from_pretrained(str(folder))
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options), tokenizer
        # Vision-language models are loaded whole: the text model alone would have other names of weights than the files.
        if tokenizer.chat_template is None and (file := folder / "chat_template.json").is_file():
            tokenizer.chat_template = json.loads(read_text(file, MAX_JSON))["chat_template"]
        return transformers.AutoModelForImageTextToText.from_pretrained(str(folder), dtype=dtype, **options), tokenizer


def _load_gguf(
    floats: FloatModel, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds the model from its configuration, and gives it the dequantized weights tensor by tensor."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        for file, content in floats.companions.items():
            (Path(name) / file).parent.mkdir(exist_ok=True)
            (Path(name) / file).write_bytes(content)
        with _naming(floats.path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            config = transformers.AutoConfig.from_pretrained(name)
            generation = transformers.GenerationConfig.from_pretrained(name)
    weights = {}
    for name in floats.tensors():
        info = floats.info(name)
        # Through a writable buffer, which the tensor keeps: no second copy is made where the dtype is the wanted one.
        values = np.frombuffer(bytearray(b"".join(floats.read_all(name))), DTYPES[info.dtype]).astype(np.float32, copy=False)
        weights[name] = torch.from_numpy(values).reshape(info.shape).to(dtype)
    with _naming(floats.path):
        model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **options
        )
    if wrong := [f"{what} {min(map(str, found))}" for what, found in report.items() if found]:
        raise CheckpointFormatError(f"transformers does not take all weights of {floats.path}: {'; '.join(wrong)}")
    model.generation_config = generation
    return model, tokenizer


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Turns what transformers raises into a CheckpointFormatError."""
    try:
        yield
    except NestpatchError:
        raise
    except Exception as error:  # transformers raises whatever the file provokes: struct, json, OS, key and value errors
        raise CheckpointFormatError(
            f"transformers cannot load {source}: {' '.join(str(error).split())}",
            advice="A model directory needs config.json, the weights and the tokenizer.",
        ) from error
