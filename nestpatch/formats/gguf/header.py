"""The header of a GGUF file, read strictly: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Everything a header says is checked against the file before anything is believed. Arrays are passed over: they hold the
vocabulary, which patching does not need.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from nestpatch.errors import CheckpointFormatError, NestpatchError, QuantizationError
from nestpatch.files.reading import open_regular
from nestpatch.formats.checkpoint import TensorInfo
from nestpatch.formats.gguf import quants

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER = 128 << 20
"""Bytes. The largest vocabularies take some twenty megabytes."""
MAX_STRING = 16 << 20
MAX_NAMES = 1 << 16
"""Of tensors, of metadata keys, and of arrays in arrays. Models have some thousand tensors and some dozen keys."""
ALIGNMENT = 32
MAX_DIMENSIONS = 4
STRETCH = 4 << 20
"""Bytes read at a time."""
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: Mapping[str, Any]
    """Numbers, strings and truth values; no arrays."""
    tensors: Mapping[str, TensorInfo]


class _Cursor:
    """The file's beginning, read as far as it is needed."""

    def __init__(self, file: FileIO, size: int) -> None:
        self.file, self.size = file, size
        self.data = bytearray()
        self.at = 0
        self.arrays = 0

    def need(self, count: int) -> int:
        """Makes the next `count` bytes available; gives their position and passes over them."""
        start, end = self.at, self.at + count
        if end > self.size:
            raise ValueError("the file ends inside its header")
        if end > MAX_HEADER:
            raise ValueError(f"the header is longer than {MAX_HEADER} bytes")
        while end > len(self.data):
            block = self.file.read(max(STRETCH, end - len(self.data)))
            if not block:
                raise ValueError("the file ends inside its header")
            self.data += block
        self.at = end
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from(code, self.data, self.need(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > MAX_STRING:
            raise ValueError(f"a string claims {length} bytes")
        start = self.need(length)
        return self.data[start : start + length].decode("utf-8")

    def skip_strings(self, count: int) -> None:
        """Passes over strings; there may be hundreds of thousands."""
        unpack, position = struct.Struct("<Q").unpack_from, self.at
        for _ in range(count):
            if position + 8 > len(self.data):
                self.at = position
                self.need(8)
            length: int = unpack(self.data, position)[0]
            if length > MAX_STRING:
                raise ValueError(f"a string claims {length} bytes")
            position += 8 + length
        self.at = position
        self.need(0)


def read_header(path: Path) -> Header:
    """Reads and checks the header. Raises CheckpointFormatError when it lies about the file, or is no GGUF header at all."""
    try:
        with open_regular(path) as file:
            return _parse(_Cursor(file, os.fstat(file.fileno()).st_size), path)
    except OSError as error:
        raise CheckpointFormatError(f"cannot read {path}: {error.strerror or error}") from error
    except NestpatchError:
        raise
    except (ValueError, struct.error, MemoryError) as error:
        raise CheckpointFormatError(f"the header of {path} is broken: {error}") from error


def _parse(cursor: _Cursor, path: Path) -> Header:
    if cursor.size < 4 or cursor.data[cursor.need(4) :][:4] != MAGIC:
        raise CheckpointFormatError(f"{path} is no GGUF file")
    version = cursor.number("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "is a GGUF file for big-endian machines" if swapped in VERSIONS else f"has GGUF version {version}"
        raise CheckpointFormatError(f"{path} {what}; nestpatch reads versions 2 and 3, little-endian")
    tensors, entries = cursor.number("<Q"), cursor.number("<Q")
    # Each takes some bytes: a count that the file cannot hold is a lie, and must not become a loop.
    if tensors * 24 > cursor.size or entries * 13 > cursor.size:
        raise ValueError(f"{tensors} tensors and {entries} entries do not fit into {cursor.size} bytes")
    if max(tensors, entries) > MAX_NAMES:
        raise ValueError(f"{tensors} tensors and {entries} entries; {MAX_NAMES} of each are allowed")
    metadata = _metadata(cursor, entries)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}")
    described = [_tensor(cursor) for _ in range(tensors)]
    return Header(metadata, _place(described, path, cursor, alignment))


def _metadata(cursor: _Cursor, entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    seen = set()
    for _ in range(entries):
        key = cursor.string()
        if key in seen:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        seen.add(key)
        kind = cursor.number("<I")
        if kind == _ARRAY:
            _skip_array(cursor)
        else:
            metadata[key] = cursor.string() if kind == _STRING else cursor.number(_scalar(kind))
    return metadata


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value has the unknown type {kind}")
    return _SCALARS[kind]


def _skip_array(cursor: _Cursor, depth: int = 0) -> None:
    kind, count = cursor.number("<I"), cursor.number("<Q")
    cursor.arrays += 1
    if count > cursor.size or depth > MAX_DIMENSIONS or cursor.arrays > MAX_NAMES:
        raise ValueError(f"an array claims {count} values")
    if kind == _STRING:
        cursor.skip_strings(count)
    elif kind == _ARRAY:
        for _ in range(count):
            _skip_array(cursor, depth + 1)
    else:
        cursor.need(count * struct.calcsize(_scalar(kind)))


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the innermost dimension last, type, offset)."""
    name, dimensions = cursor.string(), cursor.number("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<I"), cursor.number("<Q")


def _place(
    described: list[tuple[str, tuple[int, ...], int, int]], path: Path, cursor: _Cursor, alignment: int
) -> dict[str, TensorInfo]:
    """Where the tensors lie. They must follow each other without gaps, as llama.cpp demands too."""
    start = _align(cursor.at, alignment)
    infos: dict[str, TensorInfo] = {}
    end = 0
    for name, shape, code, offset in sorted(described, key=lambda entry: entry[3]):
        if name in infos:
            raise ValueError(f"tensor {name[:80]!r} is there twice")
        dtype, nbytes = _size(name, shape, code)
        if offset != end:
            raise ValueError(f"tensor {name[:80]!r} {'overlaps the one before' if offset < end else 'leaves a gap'}")
        codec = quants.GgmlCodec(dtype) if quants.is_quantized(dtype) else None
        infos[name] = TensorInfo(name, dtype, shape, path, start + offset, nbytes, codec)
        end = _align(offset + nbytes, alignment)
        # The last tensor's padding may be missing.
        if start + offset + nbytes > cursor.size:
            raise ValueError(f"the file is truncated inside tensor {name[:80]!r}")
    if cursor.size > start + end:
        raise ValueError(f"the file is longer than its header says: {cursor.size} bytes, {start + end} expected")
    return infos


def _size(name: str, shape: tuple[int, ...], code: int) -> tuple[str, int]:
    """(type name, bytes) of a tensor."""
    dtype = quants.type_name(code)
    if dtype is None:
        raise ValueError(f"tensor {name[:80]!r} has the unknown type {code}: upgrade gguf, or the file is broken")
    count = 1
    for n in shape:
        count *= n
    if count == 0 or count > 1 << 62:
        raise ValueError(f"tensor {name[:80]!r} has the impossible shape {list(shape)}")
    try:
        return dtype, count // shape[-1] * quants.row_bytes(dtype, shape[-1])
    except QuantizationError as error:
        raise ValueError(f"tensor {name[:80]!r}: {error}") from error


def _align(offset: int, alignment: int) -> int:
    return offset + -offset % alignment


Fact: TypeAlias = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""Whole numbers become UINT32 alone and INT32 in arrays, others FLOAT32."""
Facts: TypeAlias = dict[str, Fact]
TensorEntry: TypeAlias = tuple[str, tuple[int, ...], str, int]
"""(name, shape with the outermost dimension first, type, bytes) of a tensor."""

ALIGNMENT = 32
"""Tensors begin at multiples of it."""
_LARGEST = float(np.finfo(np.float32).max)
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def padding(nbytes: int) -> int:
    """Zeros that follow so many bytes."""
    return -nbytes % ALIGNMENT


def encode_header(facts: Mapping[str, Fact], tensors: Sequence[TensorEntry]) -> bytes:
    """The bytes up to the first tensor's. Raises CheckpointFormatError for text that is no Unicode."""
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(facts))
    data = b"".join([head, encode_facts(facts), _tensors(tensors)])
    return data + bytes(padding(len(data)))


def encode_facts(facts: Mapping[str, Fact]) -> bytes:
    """Keys, types and values."""
    return b"".join(part for key, value in facts.items() for part in (_string(key), _value(value)))


def _string(text: str) -> bytes:
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointFormatError(f"the tokenizer or config holds text that is no Unicode: {text!r}") from error
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
    return struct.pack("<I", _ARRAY) + _array(value)


def _array(values: Sequence[str] | Sequence[int] | Sequence[float]) -> bytes:
    """The type of the elements, their count, and the elements."""
    if all(isinstance(value, str) for value in values):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(_string(str(value)) for value in values)
    whole = all(isinstance(value, int) for value in values)
    kind, dtype = (_INT32, "<i4") if whole else (_FLOAT32, "<f4")
    return struct.pack("<IQ", kind, len(values)) + np.asarray(values, dtype).tobytes()


def _tensors(tensors: Iterable[TensorEntry]) -> bytes:
    from gguf import GGMLQuantizationType

    parts, offset = [], 0
    for name, shape, kind, nbytes in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dimensions, struct.pack("<IQ", int(GGMLQuantizationType[kind]), offset)]
        offset += nbytes + padding(nbytes)
    return b"".join(parts)
