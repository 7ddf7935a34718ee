"""Reads protocol buffers in a file: which fields there are and where their content is. Content is loaded on demand.

https://protobuf.dev/programming-guides/encoding/ read strictly: a length that leaves its message, a varint without end, an
unused wire type or an excessive number of fields is an error, found before memory is spent on it. ONNX models and sentencepiece
models are read with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from typing import NamedTuple

STRETCH = 1 << 20
"""Bytes read at a time."""
MAX_FIELDS = 4_000_000
"""Fields of one file. A model of a hundred layers has some hundred thousand."""
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
    """Of a varint its value, as unsigned; else the offset of the content in the file."""
    size: int
    """Bytes of the content."""

    @property
    def end(self) -> int:
        """Offset of the first byte after the content."""
        return self.value + self.size


class Wire:
    """A file of protocol buffers. All methods raise ValueError for anything that is not a well-formed message."""

    def __init__(self, file: FileIO, size: int) -> None:
        """Wraps an open file.

        Args:
            file: The file.
            size: Its bytes.
        """
        self.file, self.size = file, size
        self._data = b""
        self._base = 0
        self._fields = 0
        self._texts = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of a message, in their order. Nested messages may be read in between.

        Args:
            start: Offset of the message in the file.
            end: Offset of the first byte after it.

        Yields:
            The fields.

        Raises:
            ValueError: The message is not well-formed.
        """
        at = start
        while at < end:
            key, at = self._varint(at, end)
            number, kind = key >> 3, key & 7
            if number == 0 or number >= 1 << 29:
                raise ValueError(f"a field has the impossible number {number}")
            self._count_field()
            if kind == VARINT:
                value, at = self._varint(at, end)
                yield Field(number, kind, value, 0)
                continue
            if kind not in (WIDE, NARROW, BYTES):
                raise ValueError(f"a field has the wire type {kind}")
            size, at = self._varint(at, end) if kind == BYTES else (8 if kind == WIDE else 4, at)
            if size > end - at:
                raise ValueError(f"a field claims {size} bytes where {end - at} are left")
            yield Field(number, kind, at, size)
            at += size

    def nested(self, field: Field) -> Iterator[Field]:
        """The fields of the message that a field holds.

        Args:
            field: The field.

        Returns:
            As `fields`.

        Raises:
            ValueError: It is a number, or the message is not well-formed.
        """
        if field.kind != BYTES:
            raise ValueError(f"field {field.number} is not a message")
        return self.fields(field.value, field.end)

    def content(self, field: Field) -> bytes:
        """Loads the content of a field.

        Args:
            field: A field that is not a varint.

        Returns:
            Its bytes.

        Raises:
            ValueError: It is a varint, or longer than MAX_TEXT, or all content together is longer than MAX_TEXTS.
        """
        if field.kind == VARINT:
            raise ValueError(f"field {field.number} is a number")
        self._texts += field.size
        if field.size > MAX_TEXT or self._texts > MAX_TEXTS:
            raise ValueError(f"a text claims {field.size} bytes")
        start = self._load(field.value, field.size)
        return self._data[start : start + field.size]

    def text(self, field: Field) -> str:
        """Loads the content of a text field.

        Args:
            field: The field.

        Returns:
            The text.

        Raises:
            ValueError: As `content`, or the field is not text, or not UTF-8.
        """
        if field.kind != BYTES:
            raise ValueError(f"field {field.number} is not a text")
        return self.content(field).decode("utf-8")

    def numbers(self, field: Field) -> Iterator[int]:
        """The values of a field of integers, packed or one of several.

        Args:
            field: The field.

        Yields:
            The values, as signed 64-bit numbers.

        Raises:
            ValueError: It holds no integers.
        """
        if field.kind == VARINT:
            yield _signed(field.value)
            return
        if field.kind != BYTES:
            raise ValueError(f"field {field.number} holds no integers")
        at = field.value
        while at < field.end:
            value, at = self._varint(at, field.end)
            self._count_field()
            yield _signed(value)

    def _count_field(self) -> None:
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, offset after it)."""
        start = at - self._base
        if 0 <= start < len(self._data) and at < end and self._data[start] < 0x80:  # nearly all of them
            return self._data[start], at + 1
        start = self._load(at, min(_MAX_VARINT, end - at))
        value = 0
        for count in range(min(_MAX_VARINT, end - at)):
            byte = self._data[start + count]
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at + count + 1
        raise ValueError("a number has no end")

    def _load(self, at: int, size: int) -> int:
        """Brings some bytes of the file into the buffer; returns their position there."""
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


def _signed(value: int) -> int:
    """A varint as int64."""
    return value - (1 << 64) if value >> 63 else value
