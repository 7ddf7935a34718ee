"""GGUF files as checkpoints: rows are read and written in the type that they are stored in, quantized ones as blocks.

Tensors have their GGUF names, and can also be asked for by the names that packs use (formats/gguf/names.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats._rowio import read_all_at, read_rows_at, write_rows_at
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.formats.gguf.header import read_header
from nestpatch.formats.gguf.names import gguf_home
from nestpatch.rows import DTYPES, Rows

_COMPANIONS = ("NVFP4",)
"""Types whose blocks have their scales in another tensor."""


class GgufCheckpoint(Checkpoint):
    """A GGUF model. The header is read when it is opened, rows on demand."""

    converted = True

    def __init__(self, path: Path) -> None:
        """Opens a model.

        Args:
            path: A .gguf file.

        Raises:
            CheckpointFormatError: The header contradicts the file, or the file is not a whole model.
        """
        self.path = path
        self.files: tuple[Path, ...] = (path,)
        header = read_header(path)
        self._infos, self._metadata = header.tensors, header.metadata
        self._architecture = str(self._metadata.get("general.architecture", ""))
        if self._metadata.get("general.type", "model") != "model":
            raise CheckpointFormatError(
                f"{self.path} is a GGUF file of type {str(self._metadata['general.type'])[:40]!r}, not a model",
                advice="Give the model's own GGUF file.",
            )
        if (parts := self._number("split.count")) > 1:
            raise CheckpointFormatError(
                f"{self.path} is one part of a GGUF file that was split into {parts}",
                advice="Join the parts first: llama-gguf-split --merge FIRST_PART OUT.gguf",
            )

    def _number(self, key: str) -> int:
        """An integer of the header, 0 where there is none."""
        value = self._metadata.get(key, 0)
        if type(value) is not int:
            raise CheckpointFormatError(f"{self.path} has {str(value)[:40]!r} for {key}; expected an integer")
        return value

    def reopen(self, path: Path) -> GgufCheckpoint:
        """Opens another path as the same format, whatever its name.

        Args:
            path: The other model.

        Returns:
            The other model.

        Raises:
            CheckpointFormatError: It is not a model of this format.
        """
        return GgufCheckpoint(path)

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted; GGUF names."""
        return sorted(self._infos)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Its name in the file, or the name that packs use.
        """
        return name in self._infos or self._find(name) is not None

    def info(self, name: str) -> TensorInfo:
        """What a tensor is and where it is stored.

        Args:
            name: Its GGUF name, or the name that packs use.

        Returns:
            Its type, shape, place and coding, under the name that was asked for.

        Raises:
            CheckpointFormatError: There is no such tensor.
            UnsupportedModelError: A GGUF file stores it in several tensors, or in another order.
        """
        if name in self._infos:
            return self._infos[name]
        found = self._find(name)
        if found is None:
            raise CheckpointFormatError(f"{self.path} has no tensor {name}")
        return found

    def _find(self, name: str) -> TensorInfo | None:
        """The rows of a tensor that packs name."""
        home = gguf_home(name, self._architecture, self._number(f"{self._architecture}.block_count"))
        if home is None or home.tensors[0] not in self._infos:
            return None
        if len(home.tensors) > 1:
            raise UnsupportedModelError(
                f"{name} is stored in {len(home.tensors)} tensors of a GGUF file: {', '.join(home.tensors)}",
                advice="Patch the safetensors model and export it anew: nestpatch export MODEL PACK --to gguf",
            )
        info = self._infos[home.tensors[0]]
        if home.expert is None:
            return replace(info, name=name)
        shape, nbytes = info.shape[1:], info.nbytes // info.shape[0]
        return replace(info, name=name, shape=shape, offset=info.offset + home.expert * nbytes, nbytes=nbytes)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads some rows; consecutive ones are read together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features] of the float types, uint8 [rows, row_bytes] of the quantized ones.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched, or the file ends before them.
            UnsupportedModelError: A GGUF file stores it in several tensors, or in another order.
        """
        info = self.info(name)
        return read_rows_at(info, rows, _row_dtype(info))

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes some rows in place; consecutive ones are written together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.
            values: In the form that `read_rows` returns.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched.
            UnsupportedModelError: A GGUF file stores it in several tensors, or in another order.
        """
        info = self.info(name)
        write_rows_at(info, rows, np.ascontiguousarray(values, dtype=_row_dtype(info)))

    def read_all(self, name: str) -> Iterator[bytes]:
        """Reads a tensor whole, in blocks.

        Args:
            name: The tensor.

        Returns:
            An iterator over its bytes.

        Raises:
            CheckpointFormatError: There is no such tensor, or the file ends inside it.
        """
        return read_all_at(self.info(name))

    def metadata(self) -> Mapping[str, Any]:
        """Numbers, strings and booleans of the header."""
        return self._metadata


def _row_dtype(info: TensorInfo) -> np.dtype[Any]:
    if len(info.shape) < 2:
        raise CheckpointFormatError(f"tensor {info.name} has shape {list(info.shape)}: it has no rows")
    if info.dtype in _COMPANIONS:
        raise CheckpointFormatError(
            f"tensor {info.name} is stored as {info.dtype}, whose scales are in another tensor: its rows cannot be patched",
            advice="Patch the float model and quantize it anew, or load an adapter: nestpatch export PACK --to gguf-lora",
        )
    return DTYPES.get(info.dtype, np.dtype(np.uint8))
