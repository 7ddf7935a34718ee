"""Reads tokenizer.model, a sentencepiece model: a protocol buffer of which four fields are needed.

ModelProto:        1 pieces (repeated), 2 trainer_spec, 3 normalizer_spec
SentencePiece:     1 piece (text), 2 score (float), 3 type
TrainerSpec:       3 model_type (1 unigram, 2 BPE)
NormalizerSpec:    3 add_dummy_prefix
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.files import MAX_JSON, read_bounded

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
BPE = 2


class Kind(IntEnum):
    """Kinds of pieces; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class SentencePieceModel:
    """What an exporter needs of tokenizer.model."""

    pieces: tuple[Piece, ...]
    model_type: int
    add_dummy_prefix: bool


def read_model(path: Path) -> SentencePieceModel:
    """Raises CheckpointFormatError when the file is no sentencepiece model."""
    try:
        return _model(read_bounded(path, MAX_JSON, error=CheckpointFormatError))
    except (ValueError, LookupError, TypeError, struct.error) as error:
        raise CheckpointFormatError(f"{path} is no sentencepiece model: {error}") from error


def _model(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    model_type, prefix = 1, True  # the defaults of sentencepiece
    for field, value in _fields(data):
        if field == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif field == 2 and isinstance(value, bytes):
            model_type = int(dict(_fields(value)).get(3, 1))
        elif field == 3 and isinstance(value, bytes):
            prefix = bool(dict(_fields(value)).get(3, 1))
    if not pieces:
        raise ValueError("it has no pieces")
    return SentencePieceModel(tuple(pieces), model_type, prefix)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text, score = fields[1], fields.get(2, 0.0)
    if not isinstance(text, bytes) or isinstance(score, bytes):
        raise ValueError("a piece has fields of the wrong type")
    return Piece(text.decode("utf-8"), float(score), Kind(int(fields.get(3, 1))))


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of a message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
        elif key & 7 == _FIXED32:
            yield key >> 3, struct.unpack_from("<f", data, at)[0]
            at += 4
        elif key & 7 == _FIXED64:
            yield key >> 3, struct.unpack_from("<d", data, at)[0]
            at += 8
        elif key & 7 == _BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends inside a field")
            yield key >> 3, data[at : at + length]
            at += length
        else:
            raise ValueError(f"wire type {key & 7} at byte {at}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends)."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError(f"an endless number at byte {at}")
