"""The header of a GGUF file: the only reader, and the writer. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

`read_header` is strict: everything that a header claims is checked against the file. Arrays are skipped: they hold the
vocabulary, which patches have no use for; `read_arrays` reads it. `encode_header` writes the header of an exported model.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nestpatch.errors import CheckpointFormatError, NestpatchError, QuantizationError
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf.package import gguf_module

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
ALIGNMENT = 32
"""Tensors begin at multiples of it, unless general.alignment names another number."""
MAX_HEADER = 128 << 20
"""Bytes. The largest vocabularies take some twenty megabytes."""
_MAX_STRING = 16 << 20
_MAX_NAMES = 1 << 16
"""Tensors, metadata keys, and arrays inside arrays. Models have some thousand tensors and some dozen keys."""
MAX_DIMENSIONS = 4
_MAX_ITEMS = 1 << 22
"""Values of an array that is read. The largest vocabularies have some 300,000 tokens, and somewhat more merges."""
STRETCH = 1 << 20
"""Bytes read at a time."""
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_LARGEST = float(np.finfo(np.float32).max)

Fact: TypeAlias = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""A metadata value. Whole numbers become UINT32 alone and INT32 in arrays, others FLOAT32."""
Facts: TypeAlias = dict[str, Fact]
_TensorEntry: TypeAlias = tuple[str, tuple[int, ...], str, int]
"""(name, shape with the outermost dimension first, type, bytes) of a tensor."""
_Described: TypeAlias = tuple[str, tuple[int, ...], int, int]
"""(name, shape with the outermost dimension first, type number, offset) as a header has them."""


@dataclass(frozen=True)
class Header:
    """The content of a GGUF header."""

    metadata: Mapping[str, Any]
    """Numbers, strings and booleans; no arrays."""
    keys: frozenset[str]
    """All keys, those of arrays included."""
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of their data."""
    entries: tuple[int, int]
    """(first byte, end) of the list of tensors in the file."""
    data: int
    """First byte of the tensors' data."""
    alignment: int


class _Cursor:
    """The beginning of the file, read as far as it is needed; what has been passed is dropped, as vocabularies are long."""

    def __init__(self, file: FileIO, size: int) -> None:
        self.file, self.size = file, size
        self.data = bytearray()
        self.begin = 0
        """Where `data` begins in the file."""
        self.at = 0
        """Position in the file."""
        self.arrays = 0

    def need(self, count: int) -> int:
        """Loads the next `count` bytes and moves past them; returns where they are in `data`."""
        start, end = self.at, self.at + count
        if end > self.size:
            raise ValueError("the file ends inside its header")
        if end > MAX_HEADER:
            raise ValueError(f"the header is longer than {MAX_HEADER} bytes")
        if end > self.begin + len(self.data):
            self._load(end)
        self.at = end
        return start - self.begin

    def _load(self, end: int) -> None:
        """Keeps the file from the position to `end` at least."""
        del self.data[: self.at - self.begin]
        self.begin = self.at
        self.file.seek(self.begin + len(self.data))
        while end > self.begin + len(self.data):
            block = self.file.read(max(STRETCH, end - self.begin - len(self.data)))
            if not block:
                raise ValueError("the file ends inside its header")
            self.data += block

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.need(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > _MAX_STRING:
            raise ValueError(f"a string claims {length} bytes")
        start = self.need(length)
        return self.data[start : start + length].decode("utf-8")

    def skip_strings(self, count: int) -> None:
        """Moves past strings, of which there may be hundreds of thousands."""
        unpack, position = struct.Struct("<Q").unpack_from, self.at - self.begin
        for _ in range(count):
            if position + 8 > len(self.data):
                self.at = self.begin + position
                position = self.need(8)
            length: int = unpack(self.data, position)[0]
            if length > _MAX_STRING:
                raise ValueError(f"a string claims {length} bytes")
            position += 8 + length
        self.at = self.begin + position
        self.need(0)


def read_header(path: Path) -> Header:
    """Reads and checks the header of a GGUF file.

    Args:
        path: The file.

    Returns:
        Its metadata and where its tensors are.

    Raises:
        CheckpointFormatError: The file cannot be read, is not a GGUF file, or its header contradicts itself or the file.
    """
    with _opened(path) as cursor:
        return _parse(cursor, path)


def read_arrays(path: Path, keys: Collection[str]) -> dict[str, list[Any]]:
    """Reads arrays of the metadata, which `read_header` skips.

    Args:
        path: The file.
        keys: Their keys.

    Returns:
        Those that are in the file; arrays inside arrays are empty.

    Raises:
        CheckpointFormatError: The file cannot be read, is not a GGUF file, or its header is broken.
    """
    with _opened(path) as cursor:
        entries = _counts(cursor, path)[1]
        return _metadata(cursor, entries, keys)[2]


@contextmanager
def _opened(path: Path) -> Iterator[_Cursor]:
    """The beginning of a file; what goes wrong while it is read becomes a CheckpointFormatError."""
    try:
        with open_regular(path) as file:
            yield _Cursor(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except NestpatchError:
        raise
    except (ValueError, struct.error, MemoryError) as error:
        raise CheckpointFormatError(f"the header of {path} is broken: {error}") from error


def _counts(cursor: _Cursor, path: Path) -> tuple[int, int]:
    """(tensors, entries of the metadata), after the checks that need nothing else."""
    if cursor.size < 4 or cursor.data[cursor.need(4) :][:4] != MAGIC:
        raise CheckpointFormatError(f"{path} is not a GGUF file")
    version = cursor.number("<I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is a GGUF file for big-endian machines" if swapped in _VERSIONS else f"has GGUF version {version}"
        raise CheckpointFormatError(f"{path} {what}; nestpatch reads versions 2 and 3, little-endian")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    # Each takes some bytes: a count that the file cannot hold must not become a loop.
    if tensors * 24 > cursor.size or entries * 13 > cursor.size:
        raise ValueError(f"{tensors} tensors and {entries} entries do not fit into {cursor.size} bytes")
    if max(tensors, entries) > _MAX_NAMES:
        raise ValueError(f"{tensors} tensors and {entries} entries; {_MAX_NAMES} of each are allowed")
    return tensors, entries


def _parse(cursor: _Cursor, path: Path) -> Header:
    tensors, entries = _counts(cursor, path)
    metadata, keys, _ = _metadata(cursor, entries)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    first = cursor.at
    described: list[_Described] = []
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
        described.append((name, shape, cursor.number("<I"), cursor.number("<Q")))
    end = cursor.at
    data = end + -end % alignment
    return Header(metadata, keys, _locate(described, path, data, cursor.size, alignment), (first, end), data, alignment)


def _metadata(
    cursor: _Cursor, entries: int, wanted: Collection[str] = ()
) -> tuple[dict[str, Any], frozenset[str], dict[str, list[Any]]]:
    """(values without arrays, all keys, the wanted arrays)."""
    metadata: dict[str, Any] = {}
    arrays: dict[str, list[Any]] = {}
    keys: set[str] = set()
    for _ in range(entries):
        key = cursor.string()
        if key in keys:
            raise ValueError(f"duplicate key {key[:80]!r}")
        keys.add(key)
        kind = cursor.number("<I")
        if kind == _ARRAY and key in wanted:
            arrays[key] = _read_array(cursor)
        elif kind == _ARRAY:
            _skip_array(cursor)
        else:
            metadata[key] = cursor.string() if kind == _STRING else cursor.number(_scalar(kind))
    return metadata, frozenset(keys), arrays


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value has the unknown type {kind}")
    return _SCALARS[kind]


def _skip_array(cursor: _Cursor, depth: int = 0) -> None:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    cursor.arrays += 1
    if count > cursor.size or depth > MAX_DIMENSIONS or cursor.arrays > _MAX_NAMES:
        raise ValueError(f"an array claims {count} values")
    if kind == _STRING:
        cursor.skip_strings(count)
    elif kind == _ARRAY:
        for _ in range(count):
            _skip_array(cursor, depth + 1)
    else:
        cursor.need(count * struct.calcsize(_scalar(kind)))


def _read_array(cursor: _Cursor) -> list[Any]:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    if count > min(cursor.size, _MAX_ITEMS):
        raise ValueError(f"an array claims {count} values")
    if kind == _STRING:
        return [cursor.string() for _ in range(count)]
    if kind == _ARRAY:
        for _ in range(count):
            _skip_array(cursor, 1)
        return []
    code = _scalar(kind)
    start = cursor.need(count * struct.calcsize(code))
    return list(struct.unpack_from(f"<{count}{code[1]}", cursor.data, start))


def _locate(described: list[_Described], path: Path, data: int, size: int, alignment: int) -> dict[str, TensorInfo]:
    """Where the tensors are. They must follow each other without gaps, as llama.cpp demands too."""
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, shape, code, offset in sorted(described, key=lambda entry: entry[3]):
        if name in infos:
            raise ValueError(f"duplicate tensor {name[:80]!r}")
        dtype, nbytes = _size(name, shape, code)
        if offset != end:
            raise ValueError(f"tensor {name[:80]!r} {'overlaps the one before' if offset < end else 'leaves a gap'}")
        codec = quants.GgmlCodec(dtype) if quants.block(dtype)[0] > 1 else None
        infos[name] = TensorInfo(name, dtype, shape, path, data + offset, nbytes, codec)
        end = offset + nbytes + -(offset + nbytes) % alignment
        # The last tensor's padding may be missing.
        if data + offset + nbytes > size:
            raise ValueError(f"the file is truncated inside tensor {name[:80]!r}")
    if size > data + end:
        raise ValueError(f"the file is longer than its header says: {size} bytes, {data + end} expected")
    return infos


def _size(name: str, shape: tuple[int, ...], code: int) -> tuple[str, int]:
    """(type name, bytes) of a tensor."""
    try:
        dtype: str = gguf_module("constants").GGMLQuantizationType(code).name
    except ValueError:
        raise ValueError(f"tensor {name[:80]!r} has the unknown type {code}: upgrade gguf, or the file is broken") from None
    count = math.prod(shape)
    if count == 0 or count > 1 << 62:
        raise ValueError(f"tensor {name[:80]!r} has the impossible shape {list(shape)}")
    try:
        return dtype, count // shape[-1] * quants.row_bytes(dtype, shape[-1])
    except QuantizationError as error:
        raise ValueError(f"tensor {name[:80]!r}: {error}") from error


def padding(nbytes: int) -> int:
    """How many zeros follow a tensor in the files that nestpatch writes.

    Args:
        nbytes: Bytes of the tensor, or of a header.

    Returns:
        Bytes up to the next multiple of ALIGNMENT.
    """
    return -nbytes % ALIGNMENT


def encode_header(facts: Mapping[str, Fact], tensors: Sequence[_TensorEntry]) -> bytes:
    """Encodes the header of a GGUF file, version 3.

    Args:
        facts: The metadata.
        tensors: The tensors in the order of their data.

    Returns:
        All bytes before the first tensor's data.

    Raises:
        CheckpointFormatError: A text is not valid Unicode, or a number does not fit into 32 bits.
    """
    types = gguf_module("constants").GGMLQuantizationType
    parts, offset = [MAGIC + struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(facts)), encode_facts(facts)], 0
    for name, shape, kind, nbytes in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dimensions, struct.pack("<IQ", int(types[kind]), offset)]
        offset += nbytes + padding(nbytes)
    data = b"".join(parts)
    return data + bytes(padding(len(data)))


def encode_facts(facts: Mapping[str, Fact]) -> bytes:
    """Encodes metadata: keys, types and values.

    Args:
        facts: The metadata.

    Returns:
        The bytes of its entries, without their count.

    Raises:
        CheckpointFormatError: A text is not valid Unicode, or a number does not fit into 32 bits.
    """
    return b"".join(part for key, value in facts.items() for part in (_string(key), _value(value)))


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointFormatError(f"the tokenizer or config holds text that is not valid Unicode: {text!r}") from error
    return struct.pack("<Q", len(data)) + data


def _value(value: Fact) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise CheckpointFormatError(f"the config holds {value}, and GGUF files hold whole numbers of 32 bits")
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        if not abs(value) <= _LARGEST:
            raise CheckpointFormatError(f"the config holds {value}, and GGUF files hold finite numbers of 32 bits")
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    # An array: the type of its elements, their count, and the elements.
    items: list[str | int | float] = list(value)
    if all(isinstance(item, str) for item in items):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(items)) + b"".join(_string(str(item)) for item in items)
    whole = all(isinstance(item, int) for item in items)
    kind, dtype = (_INT32, "<i4") if whole else (_FLOAT32, "<f4")
    return struct.pack("<IIQ", _ARRAY, kind, len(items)) + np.asarray(items, dtype).tobytes()
