"""Appending tensors to an export: blocks while the next ones are made, and tensors as the model stores them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from nestpatch.files.hashing import Data, Sink
from nestpatch.files.threads import beside
from nestpatch.formats.checkpoint import Checkpoint


def append_blocks(blocks: Iterable[Data], sink: Sink) -> None:
    """Appends blocks, each in another thread while this one makes the next.

    Args:
        blocks: The bytes, in order.
        sink: The file.

    Raises:
        OSError: The disk is full, or another failure of it.
    """
    deque(beside(sink.write, blocks), maxlen=0)


def append_tensor(name: str, checkpoint: Checkpoint, sink: Sink) -> None:
    """Appends the bytes of a tensor of the checkpoint as they are: where they are stored, they are copied without being read.

    Args:
        name: The tensor.
        checkpoint: The model.
        sink: The file.

    Raises:
        CheckpointFormatError: A file ends inside the tensor.
    """
    extent = checkpoint.extent(name)
    if extent is not None:
        sink.copy(extent.file, extent.offset, extent.nbytes)
        return
    append_blocks(checkpoint.read_all(name), sink)
