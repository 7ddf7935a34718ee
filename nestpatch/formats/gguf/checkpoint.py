"""GGUF files as checkpoints: rows are read and written in the type that they are stored in, quantized ones as blocks.

Tensors go by their GGUF names, and also by those that a pack uses (formats/names.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats._rowio import read_all_at, read_rows_at, write_rows_at
from nestpatch.formats.checkpoint import IntArray, TensorInfo
from nestpatch.formats.gguf.header import read_header
from nestpatch.formats.gguf.names import GgufHome, gguf_home
from nestpatch.rows import DTYPES, Rows

COMPANIONS = ("NVFP4",)
"""Types whose blocks mean nothing without scales in another tensor."""


class GgufCheckpoint:
    """Reads the header at once and rows on demand.

    Raises CheckpointFormatError for files whose header lies about their content, and for those that are no whole model.
    """

    converted = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: tuple[Path, ...] = (path,)
        header = read_header(path)
        self._infos, self._metadata = header.tensors, header.metadata
        self._require_model()

    def _require_model(self) -> None:
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
        """A whole number of the header, 0 where there is none. Raises CheckpointFormatError for anything else."""
        value = self._metadata.get(key, 0)
        if type(value) is not int:
            raise CheckpointFormatError(f"{self.path} says that {key} is {str(value)[:40]!r}; a whole number is needed")
        return value

    @cached_property
    def architecture(self) -> str:
        """As GGUF names it: "llama", "qwen3moe"."""
        return str(self._metadata.get("general.architecture", ""))

    def reopen(self, path: Path) -> GgufCheckpoint:
        """The same format at another place, whatever its name there."""
        return GgufCheckpoint(path)

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted; GGUF names."""
        return sorted(self._infos)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor, by its GGUF name or by a pack's."""
        return name in self._infos or self._find(name) is not None

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointFormatError when there is no such tensor, UnsupportedModelError when it is held in other rows."""
        if name in self._infos:
            return self._infos[name]
        found = self._find(name)
        if found is None:
            raise CheckpointFormatError(f"{self.path} has no tensor {name}")
        return found

    def _find(self, name: str) -> TensorInfo | None:
        """A pack's tensor as the rows that it has here."""
        home = self._home(name)
        if home is None or home.tensors[0] not in self._infos:
            return None
        if len(home.tensors) > 1:
            raise UnsupportedModelError(
                f"{name} is held in {len(home.tensors)} tensors of a GGUF file: {', '.join(home.tensors)}",
                advice="Patch the safetensors model and export it anew: nestpatch export MODEL PATCH --to gguf",
            )
        info = self._infos[home.tensors[0]]
        if home.expert is None:
            return replace(info, name=name)
        shape, nbytes = info.shape[1:], info.nbytes // info.shape[0]
        return replace(info, name=name, shape=shape, offset=info.offset + home.expert * nbytes, nbytes=nbytes)

    def _home(self, name: str) -> GgufHome | None:
        return gguf_home(name, self.architecture, self._number(f"{self.architecture}.block_count"))

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads sorted rows: [rows, in_features] of the float types, [rows, row_bytes] as uint8 of the quantized ones."""
        info = self.info(name)
        return read_rows_at(info, rows, _row_dtype(info))

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes sorted rows in place, in the form that `read_rows` gives."""
        info = self.info(name)
        write_rows_at(info, rows, np.ascontiguousarray(values, dtype=_row_dtype(info)))

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks."""
        return read_all_at(self.info(name))

    def metadata(self) -> Mapping[str, Any]:
        """Numbers and strings of the header."""
        return self._metadata


def _row_dtype(info: TensorInfo) -> np.dtype[Any]:
    if len(info.shape) < 2:
        raise CheckpointFormatError(f"tensor {info.name} has shape {list(info.shape)}: it has no rows")
    if info.dtype in COMPANIONS:
        raise CheckpointFormatError(
            f"tensor {info.name} is stored as {info.dtype}, whose scales lie in another tensor: its rows cannot be patched",
            advice="Patch the float model and quantize it anew, or load an adapter: nestpatch export PATCH --to gguf-lora",
        )
    return DTYPES.get(info.dtype, np.dtype(np.uint8))
