"""Writes the safetensors files of a checkpoint anew, tensor by tensor, with more metadata than it had."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.export.sink import Sink
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.safetensors import read_header

ALIGNMENT = 8


def write_file(
    checkpoint: Checkpoint, file: Path, target: Path, metadata: Mapping[str, str], on_event: OnEvent = ignore
) -> tuple[int, str]:
    """Writes one weight file of a checkpoint, its tensors in their old order: (bytes, SHA-256).

    `metadata` is added to what the file says of itself. Raises CheckpointFormatError, OSError.
    """
    infos, own = read_header(file)
    order = sorted(infos.values(), key=lambda info: info.offset)
    header: dict[str, object] = {"__metadata__": dict(sorted({**own, **metadata}.items()))}
    begin = 0
    for info in order:
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.nbytes]}
        begin += info.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    with Sink(target) as sink:
        sink.write(struct.pack("<Q", len(text)) + text)
        for number, info in enumerate(order, start=1):
            end = sink.nbytes + info.nbytes
            for block in checkpoint.read_all(info.name):
                sink.write(block)
            if sink.nbytes != end:
                raise CheckpointFormatError(f"{file} ends inside tensor {info.name}")
            on_event(Event("export", number, len(order), info.name))
    return sink.nbytes, sink.sha256
