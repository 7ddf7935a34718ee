"""All that stands before the tensors' bytes in a GGUF file, version 3: metadata, then what each tensor is and where.

Integers are little endian. A string is its length as u64 and UTF-8; a value is preceded by its type.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from nestpatch.errors import CheckpointFormatError

Fact: TypeAlias = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""Whole numbers become UINT32 alone and INT32 in arrays, others FLOAT32."""
Facts: TypeAlias = dict[str, Fact]
Entry: TypeAlias = tuple[str, tuple[int, ...], str, int]
"""(name, shape with the outermost dimension first, type, bytes) of a tensor."""

ALIGNMENT = 32
"""Tensors begin at multiples of it."""
_LARGEST = float(np.finfo(np.float32).max)
_MAGIC, _VERSION = b"GGUF", 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


def padding(nbytes: int) -> int:
    """Zeros that follow so many bytes."""
    return -nbytes % ALIGNMENT


def encode_header(facts: Mapping[str, Fact], tensors: Sequence[Entry]) -> bytes:
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


def _tensors(tensors: Iterable[Entry]) -> bytes:
    from gguf import GGMLQuantizationType

    parts, offset = [], 0
    for name, shape, kind, nbytes in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), dimensions, struct.pack("<IQ", int(GGMLQuantizationType[kind]), offset)]
        offset += nbytes + padding(nbytes)
    return b"".join(parts)
