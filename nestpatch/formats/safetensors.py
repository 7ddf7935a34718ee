"""safetensors checkpoints: a single file, or a directory with model.safetensors or model.safetensors.index.json."""

from __future__ import annotations

import json
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
from nestpatch.formats.checkpoint import IntArray, TensorInfo
from nestpatch.rows import DTYPES, Rows

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_HEADER = 16 << 20
"""Bytes. That is room for 100,000 tensors in one file, as many as the largest mixtures of experts have in all their shards
together. The safetensors library allows 100 MB, which take Python more than a gigabyte of memory to read."""
MAX_INDEX = 64 << 20
"""Bytes. The indexes of the largest models have some 15 MB."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16,
    "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Headers:
    """What the headers of a model's files say together, wherever these files are.

    Raises CheckpointFormatError when they contradict each other or the index.
    """

    def __init__(
        self, path: Path, headers: Iterable[tuple[dict[str, TensorInfo], dict[str, str]]], index: Mapping[str, str]
    ) -> None:
        self.path = path
        self._infos, self._metadata = join_headers(headers, index)

    def tensors(self) -> Sequence[str]:
        """The names of all tensors, sorted."""
        return sorted(self._infos)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Raises CheckpointFormatError when there is no such tensor."""
        if name not in self._infos:
            raise CheckpointFormatError(f"{self.path} has no tensor {name}")
        return self._infos[name]

    def metadata(self) -> Mapping[str, Any]:
        """The `__metadata__` of all files together."""
        return self._metadata


class SafetensorsCheckpoint(Headers):
    """Reads headers at once and rows on demand.

    Raises CheckpointFormatError for files whose header lies about their content.
    """

    converted = False

    def __init__(self, path: Path) -> None:
        self.files, self.index = _find_files(path)
        super().__init__(path, map(read_header, self.files), self.index)

    def reopen(self, path: Path) -> SafetensorsCheckpoint:
        """The same format at another place, whatever its name there."""
        return SafetensorsCheckpoint(path)

    def extent(self, name: str) -> TensorInfo | None:
        """Where the tensor's bytes lie."""
        return self.info(name)

    def read_rows(self, name: str, rows: IntArray) -> Rows:
        """Reads sorted rows, [rows, in_features] in the stored dtype; neighbours are read together."""
        info = self.info(name)
        return read_rows_at(info, rows, row_dtype(info))

    def write_rows(self, name: str, rows: IntArray, values: Rows) -> None:
        """Writes sorted rows in place; neighbours are written together."""
        info = self.info(name)
        write_rows_at(info, rows, np.ascontiguousarray(values, dtype=row_dtype(info)))

    def read_all(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, in blocks."""
        return read_all_at(self.info(name))


def join_headers(
    headers: Iterable[tuple[dict[str, TensorInfo], dict[str, str]]], index: Mapping[str, str]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors, metadata) of all files together. Raises CheckpointFormatError when they contradict each other or the index."""
    infos: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for more, facts in headers:
        for name in more.keys() & infos.keys():
            raise CheckpointFormatError(f"tensor {name} is both in {infos[name].file.name} and in {more[name].file.name}")
        infos.update(more)
        metadata.update(facts)
    for name, file in index.items():
        if name not in infos or infos[name].file.name != file:
            raise CheckpointFormatError(f"{INDEX} says that tensor {name} is in {file}, and it is not")
    return infos, metadata


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
    """The only safetensors file of a directory, whatever its name; None where there are others, or none."""
    found = list(folder.glob("*.safetensors"))
    return found[0] if len(found) == 1 else None


def indexed_files(folder: Path) -> frozenset[str]:
    """The names of the files that a directory's index makes one model; empty without an index that can be read."""
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
    """Tensor name -> file name, from the bytes of an index; `path` is for messages."""
    try:
        weight_map = json.loads(data.decode("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{path} has no weight_map")
    for file in weight_map.values():
        # A shard lies beside its index; anything else would let an index reach out of the model.
        if not isinstance(file, str) or os.path.basename(file) != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointFormatError(f"{path} names the shard {file!r}, which is no plain file name")
    return weight_map


def read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors, metadata) of one file. Raises CheckpointFormatError when header and file disagree."""
    try:
        with open_regular(file) as raw, BufferedReader(raw) as handle:
            size = os.fstat(raw.fileno()).st_size
            text = handle.read(header_length(handle.read(8), size, file))
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {file}: {error.strerror or error}") from error
    return parse_header(text, size, file)


def header_length(prefix: bytes, size: int, file: Path) -> int:
    """Bytes of the header that follows the prefix of 8 bytes, in a file of `size` bytes; `file` is for messages."""
    length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if MAX_HEADER < length <= size - 8:
        raise CheckpointFormatError(
            f"the header of {file} has {length} bytes; {MAX_HEADER} are allowed, room for 100,000 tensors",
            advice="Save the model in several files, as transformers does.",
        )
    if not 2 <= length <= size - 8:
        raise CheckpointFormatError(f"{file} is no safetensors file: header of {length} bytes in {size}")
    return length


def parse_header(text: bytes, size: int, file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(tensors, metadata) from the bytes of a header, checked against the size of the whole file."""
    length = len(text)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        infos = {name: _info(name, entry, file, 8 + length) for name, entry in header.items()}
        metadata = {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(f"the header of {file} is broken: {error!r}") from error
    _check_layout(file, size - 8 - length, 8 + length, infos)
    return infos, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _info(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name} has an impossible shape or offset")
    count = 1
    for n in shape:
        count *= n
    if count * BITS[entry["dtype"]] != (stop - start) * 8:
        raise ValueError(f"tensor {name}: shape and dtype disagree with its {stop - start} bytes")
    return TensorInfo(name, entry["dtype"], shape, file, data_start + start, stop - start)


def _check_layout(file: Path, body: int, data_start: int, infos: Mapping[str, TensorInfo]) -> None:
    end = data_start
    for info in sorted(infos.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            wrong = "overlaps the one before" if info.offset < end else "leaves a gap"
            raise CheckpointFormatError(f"{file}: tensor {info.name} {wrong}")
        end += info.nbytes
    if end != data_start + body:
        held, needed = body, end - data_start
        what = "truncated" if held < needed else "longer than its header says"
        raise CheckpointFormatError(f"{file} is {what}: {held} bytes of weights, {needed} expected")


def row_dtype(info: TensorInfo) -> np.dtype[Any]:
    """The dtype of a tensor's rows. Raises CheckpointFormatError when it has none that can be patched."""
    if info.dtype not in DTYPES:
        raise CheckpointFormatError(
            f"tensor {info.name} is stored as {info.dtype}; only {', '.join(DTYPES)} can be patched",
            advice="Patch the model before it is quantized.",
        )
    if len(info.shape) < 2 or info.nbytes == 0:
        raise CheckpointFormatError(f"tensor {info.name} has shape {list(info.shape)}: it has no rows")
    return DTYPES[info.dtype]
