"""The tensors of an ONNX model: their types and shapes, and where their bytes are.

A tensor's bytes are in the model's own file, or in another file of the same directory ("external data"). What the model claims
is checked against the files. The bytes are never loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.protobuf import BYTES, VARINT, Field, Wire

DTYPES = {
    # Number in the file -> (name, bits per element)
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16), 6: ("I32", 32), 7: ("I64", 64),
    8: ("STRING", 0), 9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64), 12: ("U32", 32), 13: ("U64", 64), 14: ("C64", 64),
    15: ("C128", 128), 16: ("BF16", 16), 17: ("F8_E4M3", 8), 18: ("F8_E4M3FNUZ", 8), 19: ("F8_E5M2", 8),
    20: ("F8_E5M2FNUZ", 8), 21: ("U4", 4), 22: ("I4", 4), 23: ("F4", 4), 24: ("F8_E8M0", 8), 25: ("U2", 2), 26: ("I2", 2),
}  # fmt: skip
MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 62
_DIMS, _TYPE, _SEGMENT, _FLOATS, _NAME, _RAW, _EXTERNAL, _LOCATION = 1, 2, 3, 4, 8, 9, 13, 14
_ELSEWHERE = 1


@dataclass(frozen=True)
class Initializer:
    """A tensor of the model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Of its first byte; -1 where its bytes are not in one piece in a file."""
    nbytes: int
    trouble: str = ""
    """Why its bytes must not be changed where they are; empty where they may be."""


@dataclass
class _Facts:
    """The fields of a tensor's message."""

    name: str = ""
    code: int = 0
    shape: list[int] = field(default_factory=list)
    elsewhere: bool = False
    external: dict[str, str] = field(default_factory=dict)
    raw: list[Field] = field(default_factory=list)
    floats: list[Field] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"tensor {self.name[:80]!r}"

    def nbytes(self) -> int:
        """By type and shape."""
        count = 1
        for n in self.shape:
            count *= n
            if n < 0 or count > _MAX_ELEMENTS:
                raise ValueError(f"{self.title} has the impossible shape {self.shape}")
        return (count * DTYPES[self.code][1] + 7) // 8


def read_tensor(wire: Wire, message: Field, path: Path) -> Initializer:
    """Reads one tensor of a model; its bytes are not loaded.

    Args:
        wire: The model's file.
        message: The field that holds the TensorProto.
        path: The model's path.

    Returns:
        The tensor, and where its bytes are.

    Raises:
        ValueError: It contradicts itself or the file that its bytes are in.
        CheckpointFormatError: The file with its bytes is missing.
    """
    facts = _facts(wire, message)
    if facts.code not in DTYPES:
        raise ValueError(f"{facts.title} has the unknown type {facts.code}")
    dtype, nbytes = DTYPES[facts.code][0], facts.nbytes()
    inside = facts.raw or (facts.floats if facts.code == 1 else [])
    if facts.elsewhere:
        if facts.raw or facts.floats:
            raise ValueError(f"{facts.title} has data both inside the model and in another file")
        return _external(facts, dtype, nbytes, path)
    if len(inside) == 1 and inside[0].kind == BYTES:
        if inside[0].size != nbytes:
            raise ValueError(f"{facts.title} needs {nbytes} bytes and has {inside[0].size}")
        return Initializer(facts.name, dtype, tuple(facts.shape), path, inside[0].value, nbytes)
    if len(facts.raw) > 1:
        raise ValueError(f"{facts.title} has its data twice")
    trouble = "its numbers are stored one by one; save the model with raw or external data"
    return Initializer(facts.name, dtype, tuple(facts.shape), path, -1, 0, trouble)


def _facts(wire: Wire, message: Field) -> _Facts:
    facts = _Facts()
    for found in wire.nested(message):
        if found.number == _DIMS:
            facts.shape += wire.numbers(found)
            if len(facts.shape) > MAX_DIMENSIONS:
                raise ValueError(f"{facts.title} has more than {MAX_DIMENSIONS} dimensions")
        elif found.number == _NAME:
            facts.name = wire.text(found)
        elif found.number == _EXTERNAL:
            parts = {part.number: wire.text(part) for part in wire.nested(found)}
            key = parts.get(1, "")
            if key in facts.external:
                raise ValueError(f"{facts.title} has the duplicate key {key[:80]!r} in its external data")
            facts.external[key] = parts.get(2, "")
        else:
            _add(facts, found)
    return facts


def _add(facts: _Facts, found: Field) -> None:
    """Adds a field that is a number, or content that is not loaded."""
    if found.kind == VARINT:
        if found.number == _TYPE:
            facts.code = found.value
        elif found.number == _LOCATION:
            facts.elsewhere = found.value == _ELSEWHERE
    elif found.number == _SEGMENT:
        raise ValueError(f"{facts.title} is cut into segments")
    # There may be millions of them; two are enough to know.
    elif found.number == _RAW:
        facts.raw = [*facts.raw[:1], found]
    elif found.number == _FLOATS:
        facts.floats = [*facts.floats[:1], found]


def _external(facts: _Facts, dtype: str, nbytes: int, path: Path) -> Initializer:
    """Where external data is. Raises ValueError when it is not in the model's directory, or not of that length."""
    location = facts.external.get("location", "")
    # A plain name: anything else would let a model reach out of its folder.
    if os.path.basename(location) != location or location in ("", ".", "..") or "\\" in location or "\0" in location:
        raise ValueError(
            f"{facts.title} has its data at {location[:200]!r}, which is not a plain name of a file in the model's directory"
        )
    file = path.parent / location
    if location == path.name:
        raise ValueError(f"{facts.title} has its external data inside the model itself")
    # os.path returns False where Path.is_file raises.
    if not os.path.isfile(file):  # noqa: PTH113
        raise CheckpointFormatError(f"{path} has weights in {location}, which is missing")
    offset, length = (_number(facts, key) for key in ("offset", "length"))
    if length is not None and length != nbytes:
        raise ValueError(f"{facts.title} needs {nbytes} bytes and has {length} in {location}")
    start, size = offset or 0, file.stat().st_size
    if start + nbytes > size:
        raise ValueError(f"{facts.title} ends at byte {start + nbytes} of {location}, which has {size}")
    trouble = "the model states a checksum of its data, which a patch would break" if facts.external.get("checksum") else ""
    return Initializer(facts.name, dtype, tuple(facts.shape), file, start, nbytes, trouble)


def _number(facts: _Facts, key: str) -> int | None:
    text = facts.external.get(key, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{facts.title} has the impossible {key} {text[:40]!r}")
    return int(text)


def check_overlaps(path: Path, tensors: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """Checks that tensors do not share bytes.

    Args:
        path: The model's path, for messages.
        tensors: Its tensors by name.

    Returns:
        The same tensors; those that share all of their bytes with another one have that as their trouble.

    Raises:
        CheckpointFormatError: Two tensors share a part of their bytes.
    """
    groups: dict[Path, list[Initializer]] = {}
    for tensor in tensors.values():
        if tensor.offset >= 0 and tensor.nbytes:
            groups.setdefault(tensor.file, []).append(tensor)
    checked = dict(tensors)
    for group in groups.values():
        before, *others = sorted(group, key=lambda tensor: (tensor.offset, tensor.nbytes))
        for tensor in others:
            if (tensor.offset, tensor.nbytes) == (before.offset, before.nbytes):
                for one, other in ((tensor, before), (before, tensor)):
                    checked[one.name] = replace(one, trouble=f"it shares its bytes with {other.name[:80]}")
            elif tensor.offset < before.offset + before.nbytes:
                raise CheckpointFormatError(
                    f"{path}: the data of tensors {before.name[:80]!r} and {tensor.name[:80]!r} overlap in {tensor.file.name}"
                )
            before = tensor
    return checked
