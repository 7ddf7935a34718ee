"""safetensors checkpoints: a single file, or a directory with model.safetensors or model.safetensors.index.json.

`SafetensorsCheckpoint` is a model on disk. `Headers` and the functions on bytes (`parse_index`, `header_length`,
`parse_header`) serve models that are elsewhere, such as on the Hub.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError
from nestpatch.files.reading import open_regular, read_bounded
from nestpatch.formats._rowio import read_all_at, read_rows_at, write_rows_at
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.rows import DTYPES, Rows

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 << 20
"""Bytes: room for 100,000 tensors in one file, as many as the largest mixtures of experts have in all their shards together.
The safetensors library allows 100 MB, which take Python more than a gigabyte of memory to parse."""
MAX_INDEX = 64 << 20
"""Bytes. The indexes of the largest models have some 15 MB."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Headers:
    """The headers of all files of a model, wherever these files are."""

    def __init__(
        self, path: Path, headers: Iterable[tuple[dict[str, TensorInfo], dict[str, str]]], index: Mapping[str, str]
    ) -> None:
        """Joins the headers of all files.

        Args:
            path: The model, for messages.
            headers: (tensors, metadata) of each file.
            index: Tensor name -> file name, as the model's index says; empty without one.

        Raises:
            CheckpointFormatError: The headers contradict each other or the index.
        """
        self.path = path
        self._infos: dict[str, TensorInfo] = {}
        self._metadata: dict[str, str] = {}
        for more, facts in headers:
            for name in more.keys() & self._infos.keys():
                raise CheckpointFormatError(
                    f"tensor {name} is both in {self._infos[name].file.name} and in {more[name].file.name}"
                )
            self._infos.update(more)
            self._metadata.update(facts)
        for name, file in index.items():
            if name not in self._infos or self._infos[name].file.name != file:
                raise CheckpointFormatError(f"{INDEX} says that tensor {name} is in {file}, and it is not")

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""
        return sorted(self._infos)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor.

        Args:
            name: Its name.
        """
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """What a tensor is and where it is stored.

        Args:
            name: Its name.

        Returns:
            Its type, shape and place.

        Raises:
            CheckpointFormatError: There is no such tensor.
        """
        if name not in self._infos:
            raise CheckpointFormatError(f"{self.path} has no tensor {name}")
        return self._infos[name]

    def metadata(self) -> Mapping[str, Any]:
        """The `__metadata__` of all files together."""
        return self._metadata


class SafetensorsCheckpoint(Headers, Checkpoint):
    """A safetensors model on disk. Headers are read when it is opened, rows on demand."""

    converted = False

    def __init__(self, path: Path) -> None:
        """Opens a model.

        Args:
            path: A file, or a directory with one or with an index of several.

        Raises:
            CheckpointFormatError: There is no such model, or its headers contradict its files.
        """
        self.files, self.index = _find_files(path)
        super().__init__(path, map(read_header, self.files), self.index)

    def reopen(self, path: Path) -> SafetensorsCheckpoint:
        """Opens another path as the same format, whatever its name.

        Args:
            path: The other model.

        Returns:
            The other model.

        Raises:
            CheckpointFormatError: It is not a model of this format.
        """
        return SafetensorsCheckpoint(path)

    def extent(self, name: str) -> TensorInfo | None:
        """Where the tensor's bytes are stored.

        Args:
            name: The tensor.

        Returns:
            What `info` returns: every tensor of these files is in one piece.

        Raises:
            CheckpointFormatError: There is no such tensor.
        """
        return self.info(name)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads some rows; consecutive ones are read together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.

        Returns:
            [rows, in_features] in the stored dtype.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched, or the file ends before them.
        """
        info = self.info(name)
        return read_rows_at(info, rows, row_dtype(info))

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes some rows in place; consecutive ones are written together.

        Args:
            name: The tensor.
            rows: Sorted row numbers.
            values: In the form that `read_rows` returns.

        Raises:
            CheckpointFormatError: The tensor has no rows that can be patched.
        """
        info = self.info(name)
        write_rows_at(info, rows, np.ascontiguousarray(values, dtype=row_dtype(info)))

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


def _find_files(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    """(weight files, tensor name -> file name of the index)."""
    if path.is_file():
        return (path,), {}
    if (path / INDEX).is_file():
        weight_map = _read_index(path / INDEX)
        files = tuple(path / name for name in sorted(set(weight_map.values())))
        for file in files:
            if not os.path.isfile(file):  # noqa: PTH113 - Path.is_file raises for names too long
                raise CheckpointFormatError(f"{INDEX} names {file.name}, which is missing")
        return files, weight_map
    if (path / SINGLE).is_file():
        return (path / SINGLE,), {}
    if (found := only_file(path)) is not None:
        return (found,), {}
    count = len(list(path.glob("*.safetensors")))
    raise CheckpointFormatError(
        f"{path} holds {count} .safetensors files and no {INDEX}",
        advice=f"A model directory has {SINGLE}, or shards with {INDEX}.",
    )


def only_file(folder: Path) -> Path | None:
    """The only safetensors file of a directory, whatever its name.

    Args:
        folder: The directory.

    Returns:
        The file; None where there are several, or none.
    """
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def indexed_files(folder: Path) -> frozenset[str]:
    """The file names that a directory's index joins to one model.

    Args:
        folder: The directory.

    Returns:
        The names; empty without an index that can be read.
    """
    if not (folder / INDEX).is_file():
        return frozenset()
    try:
        return frozenset(_read_index(folder / INDEX).values())
    except CheckpointFormatError:
        return frozenset()


def _read_index(path: Path) -> dict[str, str]:
    try:
        data = read_bounded(path, MAX_INDEX)
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror or error}") from error
    return parse_index(data, path)


def parse_index(data: bytes, path: Path) -> dict[str, str]:
    """Parses the index of a model with several files.

    Args:
        data: The bytes of the index.
        path: Its path, for messages.

    Returns:
        Tensor name -> file name.

    Raises:
        CheckpointFormatError: It is not an index, or names a file outside the model's directory.
    """
    try:
        weight_map = json.loads(data.decode("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{path} has no weight_map")
    for file in weight_map.values():
        # In the directory of its index: anything else would let an index reach out of the model.
        if not isinstance(file, str) or os.path.basename(file) != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointFormatError(f"{path} names the shard {file!r}, which is not a plain file name")
    return weight_map


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and checks the header of one file.

    Args:
        file: The file.

    Returns:
        (tensors by name, metadata).

    Raises:
        CheckpointFormatError: The file cannot be read, or its header is broken or contradicts the file.
    """
    try:
        with open_regular(file) as raw, BufferedReader(raw) as handle:
            size = os.fstat(raw.fileno()).st_size
            text = handle.read(header_length(handle.read(8), size, file))
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {file}: {error.strerror or error}") from error
    return parse_header(text, size, file)


def header_length(prefix: bytes, size: int, file: Path) -> int:
    """Reads the length of a header.

    Args:
        prefix: The first 8 bytes of the file.
        size: Bytes of the file.
        file: Its path, for messages.

    Returns:
        Bytes of the header, which follows the prefix.

    Raises:
        CheckpointFormatError: The header would be longer than MAX_HEADER or the file.
    """
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if MAX_HEADER < length <= size - 8:
        raise CheckpointFormatError(
            f"the header of {file} has {length} bytes; {MAX_HEADER} are allowed, room for 100,000 tensors",
            advice="Save the model in several files, as transformers does.",
        )
    if not 2 <= length <= size - 8:
        raise CheckpointFormatError(f"{file} is not a safetensors file: header of {length} bytes in {size}")
    return length


def parse_header(text: bytes, size: int, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Parses and checks the header of one file.

    Args:
        text: The bytes of the header, without the prefix.
        size: Bytes of the file.
        file: Its path, for messages and for the tensors' places.

    Returns:
        (tensors by name, metadata).

    Raises:
        CheckpointFormatError: The header is broken or contradicts the file.
    """
    data = 8 + len(text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        infos = {name: _info(name, entry, file, data) for name, entry in header.items()}
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(f"the header of {file} is broken: {error!r}") from error
    end = data
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            wrong = "overlaps the one before" if info.offset < end else "leaves a gap"
            raise CheckpointFormatError(f"{file}: tensor {info.name} {wrong}")
        end += info.nbytes
    if end != size:
        what = "truncated" if size < end else "longer than its header says"
        raise CheckpointFormatError(f"{file} is {what}: {size - data} bytes of weights, {end - data} expected")
    return infos, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _info(name: str, entry: Any, file: Path, data: int) -> TensorInfo:
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has an impossible shape or offset")
    if math.prod(shape) * BITS[entry["dtype"]] != (stop - start) * 8:
        raise ValueError(f"tensor {name}: shape and dtype disagree with its {stop - start} bytes")
    return TensorInfo(name, entry["dtype"], shape, file, data + start, stop - start)


def row_dtype(info: TensorInfo) -> np.dtype[Any]:
    """The dtype of a tensor's rows.

    Args:
        info: The tensor.

    Returns:
        A numpy dtype.

    Raises:
        CheckpointFormatError: The tensor has no rows, or is stored in a dtype that cannot be patched.
    """
    if info.dtype not in DTYPES:
        raise CheckpointFormatError(
            f"tensor {info.name} is stored as {info.dtype}; only {', '.join(DTYPES)} can be patched",
            advice="Patch the model before it is quantized.",
        )
    if len(info.shape) < 2 or info.nbytes == 0:
        raise CheckpointFormatError(f"tensor {info.name} has shape {list(info.shape)}: it has no rows")
    return DTYPES[info.dtype]
