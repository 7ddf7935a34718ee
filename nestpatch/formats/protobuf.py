"""Protocol buffers in a file: which fields there are and where their bytes lie. Nothing is loaded but what is asked for.

https://protobuf.dev/programming-guides/encoding/ read strictly: a length that leaves its message, a varint without end, a
wire type that nobody writes or a flood of fields is an error, found before memory is spent on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

STRETCH = 1 << 20
"""Bytes read at a time."""
MAX_FIELDS = 4_000_000
"""In one file. A model of a hundred layers has some hundred thousand."""
MAX_TEXT = 1 << 20
"""Bytes of one name or value."""
MAX_TEXTS = 256 << 20
"""Bytes of all of them."""
VARINT, WIDE, BYTES, NARROW = 0, 1, 2, 5
_MAX_VARINT = 10


class Field(NamedTuple):
    """One field of a message."""

    number: int
    kind: int
    """VARINT, WIDE (8 bytes), BYTES or NARROW (4 bytes)."""
    value: int
    """Of a varint, as unsigned; else the place of the content in the file."""
    size: int
    """Bytes of the content."""

    @property
    def end(self) -> int:
        return self.value + self.size


class Wire:
    """The file, read a stretch at a time. Raises ValueError for whatever is no well-formed message."""

    def __init__(self, file: FileIO, size: int) -> None:
        self.file, self.size = file, size
        self._data = b""
        self._base = 0
        self._fields = 0
        self._texts = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message that lies there, in their order. Nested messages may be read meanwhile."""
        at = start
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if number == 0 or number >= 1 << 29:
                raise ValueError(f"a field has the impossible number {number}")
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ValueError(f"it has more than {MAX_FIELDS} fields")
            if kind == VARINT:
                value, at = self._varint(at, end)
                yield Field(number, kind, value, 0)
                continue
            size, at = self._varint(at, end) if kind == BYTES else (_width(kind), at)
            if size > end - at:
                raise ValueError(f"a field claims {size} bytes where {end - at} are left")
            yield Field(number, kind, at, size)
            at += size

    def text(self, field: Field) -> str:
        """The content of a text field."""
        if field.kind != BYTES:
            raise ValueError(f"field {field.number} holds no text")
        self._texts += field.size
        if field.size > MAX_TEXT or self._texts > MAX_TEXTS:
            raise ValueError(f"a text claims {field.size} bytes")
        start = self._load(field.value, field.size)
        return self._data[start : start + field.size].decode("utf-8")

    def numbers(self, field: Field) -> Iterator[int]:
        """The values of a field of integers, packed or one of many, as signed 64-bit numbers."""
        if field.kind == VARINT:
            yield signed(field.value)
            return
        if field.kind != BYTES:
            raise ValueError(f"field {field.number} holds no integers")
        at = field.value
        while at < field.end:
            value, at = self._varint(at, field.end)
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise ValueError(f"it has more than {MAX_FIELDS} fields")
            yield signed(value)

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, place after it)."""
        start = self._load(at, min(_MAX_VARINT, end - at))
        value = 0
        for count in range(min(_MAX_VARINT, end - at)):
            byte = self._data[start + count]
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + count + 1
        raise ValueError("a number has no end")

    def _load(self, at: int, size: int) -> int:
        """Makes some bytes available; gives their place in the buffer."""
        start = at - self._base
        if start >= 0 and start + size <= len(self._data):
            return start
        self.file.seek(at)
        self._data, self._base = b"", at
        while len(self._data) < size:
            block = self.file.read(max(STRETCH, size) - len(self._data))
            if not block:
                raise ValueError("the file ends inside a message")
            self._data += block
        return 0


def signed(value: int) -> int:
    """A varint as int64 means it."""
    return value - (1 << 64) if value >> 63 else value


def _width(kind: int) -> int:
    if kind not in (WIDE, NARROW):
        raise ValueError(f"a field has the wire type {kind}")
    return 8 if kind == WIDE else 4


def require_message(field: Field) -> None:
    """Raises ValueError for a field that cannot be a message."""
    if field.kind != BYTES:
        raise ValueError(f"field {field.number} is no message")
