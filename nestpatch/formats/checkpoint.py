"""The Checkpoint protocol: what patching needs of a format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nestpatch.errors import QuantizationError
from nestpatch.formats.codec import Codec, FloatCodec
from nestpatch.rows import DTYPES, Rows

IntArray = npt.NDArray[np.int64]
CHUNK = 2 << 20
"""Bytes of rows held in memory at a time."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies, and what it is."""

    name: str
    dtype: str
    """Its name in safetensors; for types that only another format has, that format's: "BF16", "F32", "Q4_K", ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte in the file."""
    nbytes: int
    codec: Codec | None = None
    """How rows hold their numbers, where those are not plain ones; None too for types that nobody patches."""
    others: tuple[Path, ...] = ()
    """More files that hold parts of its rows."""
    stretch: int = 1
    """How many times CHUNK bytes of rows to work on at a time: more where every call has to read the whole tensor."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold parts of its rows."""
        return (self.file, *self.others)

    @property
    def plain(self) -> bool:
        """Whether rows are plain numbers, which follow the merge rule."""
        return self.dtype in DTYPES

    @property
    def coding(self) -> Codec:
        """How rows hold their numbers. Raises QuantizationError for types that nobody patches."""
        if self.codec is not None:
            return self.codec
        if not self.plain:
            raise QuantizationError(f"rows of type {self.dtype} cannot be read here")
        return FloatCodec(self.dtype)

    @property
    def rows(self) -> int:
        """Rows of the matrix; the experts of a stacked tensor are flattened into them."""
        count = 1
        for n in self.shape[:-1]:
            count *= n
        return count

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows


def row_blocks(rows: int, row_bytes: int, stretch: int = 1) -> Iterator[slice]:
    """Slices of rows that fit into `stretch` times CHUNK bytes."""
    size = max(1, stretch * CHUNK // max(1, row_bytes))
    yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))


@runtime_checkable
class Extents(Protocol):
    """What a checkpoint may also offer: its bytes where they lie, to be copied without being read."""

    def extent(self, name: str) -> TensorInfo | None:
        """Where the bytes of `read_all` are in a file; None where they come about in reading."""


class Checkpoint(Protocol):
    """A model on disk. Nothing is loaded but what is asked for.

    Rows are 2-D arrays [rows, in_features] in the stored dtype, addressed by sorted indices; those of quantized types are
    uint8 [rows, row_bytes], blocks as they are stored.
    """

    path: Path
    files: tuple[Path, ...]
    """All files with weights, in a fixed order."""
    converted: bool
    """Whether the format rounds weights when a model is brought into it, so that rows may differ from the base's a little."""

    def reopen(self, path: Path) -> Checkpoint:
        """The same format at another place, whatever its name there."""

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, by its own name here or by the name that packs use."""

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointFormatError when there is no such tensor."""

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads some rows. Raises CheckpointFormatError when the dtype is none that can be patched."""

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes some rows in place."""

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks."""

    def metadata(self) -> Mapping[str, Any]:
        """What the files say of themselves."""
