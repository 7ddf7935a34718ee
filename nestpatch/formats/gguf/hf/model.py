"""A GGUF file as a model directory of transformers: configuration, tokenizer files, and float weights under their names there.

Nothing is loaded: weights are dequantized as they are read, a few megabytes of rows at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, DataError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, ComputedCheckpoint, IntArray, TensorInfo
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.header import read_arrays
from nestpatch.formats.gguf.hf._config import ROPE_TENSORS, read_config, require_known, stated
from nestpatch.formats.gguf.hf._facts import FileFacts
from nestpatch.formats.gguf.hf._tensors import FloatSource, elements, forced, matrix_types, plan_floats
from nestpatch.formats.gguf.hf._tokenizer import read_tokenizer
from nestpatch.rows import DTYPES, FloatArray, Rows

AUTO = "AUTO"
"""Float tensors keep their type; quantized ones become F32, which holds their values exactly."""
TYPES = (AUTO, "BF16", "F32")
_EMBEDDINGS = "token_embd.weight"
_LONGEST_VECTOR = 64 << 20
"""Bytes. The vectors of a model are as long as its widest matrix."""
_TORCH = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def float_type(name: str) -> str:
    """Parses the name of a type of float weights.

    Args:
        name: "auto", "bf16" or "f32", in upper or lower case.

    Returns:
        One of TYPES.

    Raises:
        DataError: There is no such type.
    """
    if name.upper() not in TYPES:
        raise DataError(f"{name!r} is not a type of float weights here", advice="Known types: auto, bf16, f32.")
    return name.upper()


class FloatModel(ComputedCheckpoint):
    """A read-only Checkpoint of the dequantized model; the file stays as it is."""

    converted = False
    computed = "dequantized"

    def __init__(self, stored: GgufCheckpoint, kind: str = AUTO) -> None:
        """Reads the configuration and plans every tensor.

        Args:
            stored: The GGUF file.
            kind: One of TYPES.

        Raises:
            UnsupportedModelError: transformers has no such model, or the file has tensors of unknown purpose.
            CheckpointFormatError: A fact or a tensor is missing, or contradicts the others.
            QuantizationError: A type cannot be dequantized here.
        """
        self.path: Path = stored.path
        self.files: tuple[Path, ...] = stored.files
        self._stored, self._facts = stored, FileFacts(stored.metadata(), str(stored.path))
        require_known(self._facts)
        self.config = self._read_config()
        infos = {name: stored.info(name) for name in stored.tensors()}
        sources = plan_floats(self.config, infos, self._facts.architecture, str(stored.path))
        for dtype in {source.stored.dtype for source in sources}:
            _require_readable(dtype)
        self._sources = {source.name: source for source in sources}
        self._dtypes = self._choose(kind)
        self.config["dtype"] = _TORCH[self.type]

    @property
    def type(self) -> str:
        """The type of most weights."""
        sizes: dict[str, int] = {}
        for name, source in self._sources.items():
            sizes[self._dtypes[name]] = sizes.get(self._dtypes[name], 0) + elements(source)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @cached_property
    def companions(self) -> Mapping[str, bytes]:
        """The files beside the weights, by their names in the directory: configuration, tokenizer, chat templates.

        Raises:
            UnsupportedModelError: The tokenizer is of a kind that cannot be read back.
            CheckpointFormatError: There is no tokenizer, or it is broken.
        """
        tokenizer = read_tokenizer(self._facts, self.path, self.config["vocab_size"])
        config = {**stated(self.config), **tokenizer.ids}
        generation: dict[str, Any] = dict(tokenizer.ids)
        if tokenizer.ends:
            generation["eos_token_id"] = tokenizer.ends if len(tokenizer.ends) > 1 else tokenizer.ends[0]
        return {"config.json": _json(config), "generation_config.json": _json(generation), **tokenizer.files}

    def _read_config(self) -> dict[str, Any]:
        names = self._stored.tensors()
        if _EMBEDDINGS not in names:
            raise CheckpointFormatError(f"{self.path} has no embeddings ({_EMBEDDINGS})")
        tables = {name: self._vector(name) for name in ROPE_TENSORS if name in names}
        key = f"{self._facts.architecture}.attention.sliding_window_pattern"
        pattern = read_arrays(self.path, (key,)).get(key, [])
        return read_config(self._facts, names, self._stored.info(_EMBEDDINGS).shape[0], tables, pattern)

    def _vector(self, name: str) -> FloatArray:
        info = self._stored.info(name)
        if len(info.shape) > 1 or not info.plain or info.nbytes > _LONGEST_VECTOR:
            raise CheckpointFormatError(
                f"tensor {name} of {self.path} is stored as {info.dtype} {list(info.shape)}: not a vector"
            )
        return np.frombuffer(b"".join(self._stored.read_all(name)), DTYPES[info.dtype]).astype(np.float32)

    def _choose(self, kind: str) -> dict[str, str]:
        """The dtype of every tensor."""
        if kind != AUTO:
            return dict.fromkeys(self._sources, kind)
        types = matrix_types(self._sources.values())
        common = next(iter(types)) if len(types) == 1 else "F32"
        return {name: self._kept(source, common) for name, source in self._sources.items()}

    def _kept(self, source: FloatSource, common: str) -> str:
        """The dtype that loses nothing. llama.cpp widens vectors and routers to F32, and these get back what they had."""
        stored = source.stored
        if not stored.plain:
            return "F32"
        if stored.dtype != "F32" or common not in DTYPES or not forced(source):
            return stored.dtype
        wide = self._floats(source, np.arange(source.shape[0]))
        with np.errstate(over="ignore"):
            again = wide.astype(DTYPES[common]).astype(np.float32)
        shift = np.float32(source.shift)
        return common if np.array_equal(again + shift, wide + shift, equal_nan=True) else "F32"

    def _floats(self, source: FloatSource, rows: IntArray) -> FloatArray:
        """Rows of a tensor, elements of a vector: float32, in the order that was asked for."""
        places, stored = source.places(rows), source.stored
        if len(source.shape) < 2:
            found = self._vector(stored.name)[places]
        else:
            order = np.argsort(places, kind="stable")
            raw = self._stored.read_rows(stored.name, places[order])
            found = np.empty((len(rows), source.shape[-1]), np.float32)
            found[order] = quants.codec(stored.dtype).decode(raw.view(np.uint8))
        return found - np.float32(source.shift) if source.shift else found

    def reopen(self, path: Path) -> Checkpoint:
        """Opens another GGUF file in the same way.

        Args:
            path: The other file.

        Returns:
            Its dequantized model, floats as stored.

        Raises:
            CheckpointError: It cannot be read like this.
        """
        return FloatModel(self._stored.reopen(path))

    def tensors(self) -> Sequence[str]:
        """The names of all tensors in transformers, sorted."""
        return sorted(self._sources)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Its name in transformers.
        """
        return name in self._sources

    def info(self, name: str) -> TensorInfo:
        """What a tensor is. It has no place in any file: `file` is the GGUF file.

        Args:
            name: Its name in transformers.

        Returns:
            Its dtype and shape.

        Raises:
            CheckpointFormatError: There is no such tensor.
        """
        if name not in self._sources:
            raise CheckpointFormatError(f"{self.path} has no tensor {name}")
        source, dtype = self._sources[name], self._dtypes[name]
        return TensorInfo(name, dtype, source.shape, self.path, 0, elements(source) * DTYPES[dtype].itemsize)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Dequantizes some rows.

        Args:
            name: The tensor.
            rows: Sorted row numbers; of a vector, numbers of elements.

        Returns:
            [rows, in_features] in the tensor's dtype; of a vector [rows].

        Raises:
            CheckpointFormatError: There is no such tensor, or the file ends before them.
            QuantizationError: Values leave the range of the dtype.
        """
        info = self.info(name)
        wide = self._floats(self._sources[name], rows)
        with np.errstate(over="ignore"):
            found = wide.astype(DTYPES[info.dtype])
        if info.dtype != "F32" and np.isfinite(wide).all() and not np.isfinite(found.astype(np.float32)).all():
            raise QuantizationError(f"{name} has values outside the range of {info.dtype}", advice="Export with --type f32.")
        return found

    def read_all(self, name: str) -> Iterator[bytes]:
        """Dequantizes a tensor, in blocks.

        Args:
            name: The tensor.

        Yields:
            Its bytes in its dtype.

        Raises:
            CheckpointError: As `read_rows`.
        """
        info = self.info(name)
        if len(info.shape) < 2:
            yield self.read_rows(name, np.arange(info.shape[0])).tobytes()
            return
        for part in info.blocks(info.rows, 2 * info.shape[-1] * np.dtype(np.float32).itemsize):
            yield self.read_rows(name, np.arange(part.start, part.stop)).tobytes()

    def metadata(self) -> Mapping[str, Any]:
        """The metadata of the GGUF file."""
        return self._stored.metadata()


def _require_readable(dtype: str) -> None:
    """Before anything is written. Raises QuantizationError."""
    if dtype not in DTYPES:
        quants.codec(dtype).decode(np.zeros((1, quants.block(dtype)[1]), np.uint8))


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
