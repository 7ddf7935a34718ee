"""Tensors that an export contains as the model stores them."""

from __future__ import annotations

from collections import deque

from nestpatch.files.hashing import Sink
from nestpatch.files.threads import beside
from nestpatch.formats.checkpoint import Checkpoint


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
    deque(beside(sink.write, checkpoint.read_all(name)), maxlen=0)
