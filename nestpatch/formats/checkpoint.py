"""The Checkpoint protocol: what nestpatch needs of a model on disk, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from nestpatch.errors import OutputError, QuantizationError
from nestpatch.formats._codec import Codec, FloatCodec
from nestpatch.rows import DTYPES, FloatArray, Rows
from nestpatch.values import dataclass

IntArray = npt.NDArray[np.int64]
CHUNK = 2 << 20
"""Bytes of rows held in memory at a time."""


@dataclass(frozen=True)
class TensorInfo:
    """What a tensor is and where it is stored."""

    name: str
    dtype: str
    """As safetensors names it ("BF16", "F32"); types that only another format has, as that format does ("Q4_K")."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte in the file."""
    nbytes: int
    codec: Codec | None = None
    """How rows store their numbers; None for plain numbers and for types that cannot be patched."""
    others: tuple[Path, ...] = ()
    """More files that hold parts of its rows."""
    chunks: int = 1
    """How many CHUNKs of rows to read at a time: more where every read has to pass over the whole tensor."""

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
        """How rows store their numbers.

        Raises:
            QuantizationError: The type cannot be decoded here.
        """
        if self.codec is not None:
            return self.codec
        if not self.plain:
            raise QuantizationError(f"rows of type {self.dtype} cannot be read here")
        return FloatCodec(self.dtype)

    @property
    def rows(self) -> int:
        """Rows of the matrix; the experts of a stacked tensor are flattened into them."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return self.nbytes // self.rows

    def decoded(self, stored: Rows) -> FloatArray:
        """The numbers of rows.

        Args:
            stored: As `Checkpoint.read_rows` returns them.

        Returns:
            float32 [rows, in_features].

        Raises:
            QuantizationError: The type cannot be decoded here.
        """
        if self.plain:
            return stored.astype(np.float32)
        return self.coding.decode(np.ascontiguousarray(stored).view(np.uint8))

    def blocks(self, count: int, row_bytes: int | None = None) -> Iterator[slice]:
        """Cuts a list of its rows into blocks that fit into memory.

        Args:
            count: Length of the list.
            row_bytes: Bytes that the caller holds for each row; as many as are stored when None.

        Yields:
            Consecutive slices of the list.
        """
        return row_blocks(count, self.row_bytes if row_bytes is None else row_bytes, self.chunks)


def row_blocks(count: int, row_bytes: int, chunks: int = 1) -> Iterator[slice]:
    """Cuts a list of rows into blocks that fit into memory.

    Args:
        count: Length of the list.
        row_bytes: Bytes held for each row.
        chunks: How many CHUNKs a block may have.

    Yields:
        Consecutive slices of the list, of at least one row each.
    """
    size = max(1, chunks * CHUNK // max(1, row_bytes))
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def float_rows(checkpoint: Checkpoint, name: str, rows: npt.NDArray[np.integer[Any]]) -> FloatArray:
    """Reads the numbers of some rows, in whatever type they are stored.

    Args:
        checkpoint: The model.
        name: The tensor.
        rows: Sorted row numbers.

    Returns:
        float32 [rows, in_features]: plain numbers widened, blocks dequantized, both exactly.

    Raises:
        CheckpointFormatError: The tensor has no rows that can be patched, or the file ends before them.
        QuantizationError: The type cannot be decoded here.
    """
    return checkpoint.info(name).decoded(checkpoint.read_rows(name, rows.astype(np.int64)))


class Checkpoint(Protocol):
    """A model on disk. Nothing is loaded before it is asked for. Formats inherit from this class.

    Rows are 2-D arrays [rows, in_features] in the stored dtype; those of quantized types are uint8 [rows, row_bytes], blocks as
    they are stored. Row numbers are sorted.
    """

    path: Path
    files: tuple[Path, ...]
    """All files with weights, in a fixed order."""
    converted: bool
    """Whether bringing a model into this format rounds its weights, so that rows may differ slightly from the base's."""

    def reopen(self, path: Path) -> Checkpoint:
        """Opens another path as the same format, whatever its name.

        Args:
            path: The other model.

        Returns:
            The other model.

        Raises:
            CheckpointFormatError: It is not a model of this format.
        """

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Its name in the file, or the name that packs use.
        """

    def info(self, name: str) -> TensorInfo:
        """What a tensor is and where it is stored.

        Args:
            name: Its name in the file, or the name that packs use.

        Returns:
            Its type, shape, place and coding, under the name that was asked for.

        Raises:
            CheckpointFormatError: There is no such tensor.
        """

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads some rows.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features], or uint8 [rows, row_bytes] of quantized types.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched, or the file ends before them.
        """

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes some rows in place.

        Args:
            name: The tensor.
            rows: Sorted row numbers.
            values: In the form that `read_rows` returns.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched.
        """

    def read_all(self, name: str) -> Iterator[bytes]:
        """Reads a tensor whole, in blocks.

        Args:
            name: The tensor.

        Yields:
            Its bytes, in the order in which rows are numbered.

        Raises:
            CheckpointFormatError: There is no such tensor, or the file ends inside it.
        """

    def extent(self, name: str) -> TensorInfo | None:
        """Where the bytes of `read_all` are stored, so that they are copied without being read.

        Args:
            name: The tensor.

        Returns:
            Their place in one file; None where they are computed on reading, as formats do unless they say otherwise.

        Raises:
            CheckpointFormatError: There is no such tensor.
        """
        del name
        return None

    def metadata(self) -> Mapping[str, Any]:
        """The metadata of all files together."""

    def iter_rows(
        self, name: str, rows: npt.NDArray[np.integer[Any]], *, row_bytes: int | None = None
    ) -> Iterator[tuple[slice, Rows]]:
        """Reads many rows, a block at a time.

        Args:
            name: The tensor.
            rows: Sorted row numbers.
            row_bytes: Bytes that the caller holds for each row; as many as are stored when None.

        Yields:
            (slice of `rows`, their content as `read_rows` returns it), until all are read.

        Raises:
            CheckpointFormatError: As `read_rows`.
        """
        for part in self.info(name).blocks(len(rows), row_bytes):
            yield part, self.read_rows(name, rows[part].astype(np.int64))


class ComputedCheckpoint(Checkpoint):
    """A model whose rows are computed from a file on reading. It can only be read."""

    computed: str
    """How, as the end of "is ... in memory only"."""

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Nothing can be written.

        Args:
            name: The tensor.
            rows: Row numbers.
            values: Their content.

        Raises:
            OutputError: Always.
        """
        raise OutputError(
            f"{self.path} is {self.computed} in memory only: {len(rows)} rows {values.dtype} of {name} cannot be written"
        )
