"""Writes safetensors files from a checkpoint, and the whole directory of a model that was a GGUF file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent
from nestpatch.export._stored import append_tensor
from nestpatch.files.atomic import sync_tree
from nestpatch.files.hashing import Sink
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.formats.safetensors import SINGLE

_ALIGNMENT = 8
"""Bytes: the safetensors format pads its header to a multiple of it."""


def write_file(
    checkpoint: Checkpoint, order: Sequence[TensorInfo], target: Path, metadata: Mapping[str, str], on_event: OnEvent
) -> tuple[int, str]:
    """Writes one weight file.

    Args:
        checkpoint: The model.
        order: Its tensors that the file holds, in the order of their data.
        target: The new file.
        metadata: The file's metadata.
        on_event: Receives progress.

    Returns:
        (bytes, SHA-256 in hex).

    Raises:
        CheckpointFormatError: The model's file ends inside a tensor.
    """
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for info in order:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.nbytes]}
        begin += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    with Sink(target) as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for number, info in enumerate(order, start=1):
            end = sink.nbytes + info.nbytes
            append_tensor(info.name, checkpoint, sink)
            if sink.nbytes != end:
                raise CheckpointFormatError(f"{info.file} ends inside tensor {info.name}")
            on_event(Event("export", number, len(order), info.name))
    return sink.nbytes, sink.sha256


def write_float_model(model: FloatModel, folder: Path, metadata: Mapping[str, str], on_event: OnEvent) -> tuple[int, str]:
    """Writes a dequantized GGUF model as a model directory: configuration, tokenizer, and one weight file.

    Args:
        model: The model.
        folder: An empty directory.
        metadata: The metadata of the weight file, besides its format.
        on_event: Receives progress.

    Returns:
        (bytes, SHA-256 in hex) of the weight file, which is SINGLE.

    Raises:
        CheckpointError: The tokenizer cannot be read, or the file ends inside a tensor.
    """
    for name, content in model.companions.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    order = [model.info(name) for name in model.tensors()]
    done = write_file(model, order, folder / SINGLE, {"format": "pt", **metadata}, on_event)
    sync_tree(folder)
    return done
