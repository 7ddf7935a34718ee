"""Protocol buffers put together by hand, true or not."""

from __future__ import annotations


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, *parts: bytes | str) -> bytes:
    content = b"".join(part.encode() if isinstance(part, str) else part for part in parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def claim(field: int, size: int, content: bytes = b"") -> bytes:
    """A field that says it is so long."""
    return varint(field << 3 | 2) + varint(size) + content


def external(**facts: str) -> bytes:
    facts = {"location": "data"} | facts
    return number(14, 1) + b"".join(message(13, message(1, key), message(2, value)) for key, value in facts.items())


def tensor(*parts: bytes, shape: tuple[int, ...] = (4, 4), kind: int = 1, name: str = "w") -> bytes:
    return message(5, *(number(1, n) for n in shape), number(2, kind), message(8, name), *parts)


def model(*parts: bytes) -> bytes:
    """A model with a graph of these parts."""
    return number(1, 10) + message(7, *parts)
