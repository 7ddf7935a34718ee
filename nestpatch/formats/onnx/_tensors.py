"""The tensors of an ONNX model: what they say of themselves, and where their bytes lie.

A tensor's bytes are in the model's own file, or in a file beside it ("external data"). What the model says of them is checked
against the files before it is believed. They are never loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nestpatch.errors import CheckpointFormatError
from nestpatch.formats.protobuf import BYTES, VARINT, Field, Wire, require_message

DTYPES = {
    # Number in the file -> (name, bits per element)
    1: ("F32", 32), 2: ("U8", 8), 3: ("I8", 8), 4: ("U16", 16), 5: ("I16", 16), 6: ("I32", 32), 7: ("I64", 64),
    8: ("STRING", 0), 9: ("BOOL", 8), 10: ("F16", 16), 11: ("F64", 64), 12: ("U32", 32), 13: ("U64", 64), 14: ("C64", 64),
    15: ("C128", 128), 16: ("BF16", 16), 17: ("F8_E4M3", 8), 18: ("F8_E4M3FNUZ", 8), 19: ("F8_E5M2", 8),
    20: ("F8_E5M2FNUZ", 8), 21: ("U4", 4), 22: ("I4", 4), 23: ("F4", 4), 24: ("F8_E8M0", 8), 25: ("U2", 2), 26: ("I2", 2),
}  # fmt: skip
MAX_DIMENSIONS = 16
MAX_ELEMENTS = 1 << 62
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
    """Of its first byte; -1 where its numbers have no bytes of their own size."""
    nbytes: int
    trouble: str = ""
    """Why its bytes must not be changed where they are; empty where they may be."""

    @property
    def placed(self) -> bool:
        """Whether its bytes lie together in a file."""
        return self.offset >= 0


@dataclass
class _Facts:
    """What a tensor says of itself."""

    name: str = ""
    code: int = 0
    shape: list[int] = field(default_factory=list)
    elsewhere: bool = False
    external: dict[str, str] = field(default_factory=dict)
    raw: list[Field] = field(default_factory=list)
    floats: list[Field] = field(default_factory=list)

    @property
    def told(self) -> str:
        return f"tensor {self.name[:80]!r}"

    def add_dimensions(self, values: Iterable[int]) -> None:
        self.shape += values
        if len(self.shape) > MAX_DIMENSIONS:
            raise ValueError(f"{self.told} has more than {MAX_DIMENSIONS} dimensions")

    def add_number(self, found: Field) -> None:
        if found.number == _TYPE:
            self.code = found.value
        elif found.number == _LOCATION:
            self.elsewhere = found.value == _ELSEWHERE

    def add_content(self, found: Field) -> None:
        if found.number == _SEGMENT:
            raise ValueError(f"{self.told} is cut into segments")
        # There may be millions of them; two are enough to know.
        if found.number == _RAW:
            self.raw = [*self.raw[:1], found]
        elif found.number == _FLOATS:
            self.floats = [*self.floats[:1], found]

    def nbytes(self) -> int:
        """By type and shape."""
        count = 1
        for n in self.shape:
            count *= n
            if n < 0 or count > MAX_ELEMENTS:
                raise ValueError(f"{self.told} has the impossible shape {self.shape}")
        return (count * DTYPES[self.code][1] + 7) // 8


def read_tensor(wire: Wire, message: Field, path: Path) -> Initializer:
    """Reads one tensor of the model at `path`.

    Raises ValueError or CheckpointFormatError when it contradicts itself or the file that it is in.
    """
    facts = _facts(wire, message)
    if facts.code not in DTYPES:
        raise ValueError(f"{facts.told} has the unknown type {facts.code}")
    dtype, nbytes = DTYPES[facts.code][0], facts.nbytes()
    inside = facts.raw or (facts.floats if facts.code == 1 else [])
    if facts.elsewhere:
        if facts.raw or facts.floats:
            raise ValueError(f"{facts.told} has data both inside the model and beside it")
        return _external(facts, dtype, nbytes, path)
    if len(inside) == 1 and inside[0].kind == BYTES:
        if inside[0].size != nbytes:
            raise ValueError(f"{facts.told} needs {nbytes} bytes and has {inside[0].size}")
        return Initializer(facts.name, dtype, tuple(facts.shape), path, inside[0].value, nbytes)
    if len(facts.raw) > 1:
        raise ValueError(f"{facts.told} has its data twice")
    trouble = "its numbers are held one by one; save the model with raw or external data"
    return Initializer(facts.name, dtype, tuple(facts.shape), path, -1, 0, trouble)


def _facts(wire: Wire, message: Field) -> _Facts:
    require_message(message)
    facts = _Facts()
    for found in wire.fields(message.value, message.end):
        if found.number == _DIMS:
            facts.add_dimensions(wire.numbers(found))
        elif found.number == _NAME:
            facts.name = wire.text(found)
        elif found.number == _EXTERNAL:
            _add_external(facts, wire, found)
        elif found.kind == VARINT:
            facts.add_number(found)
        else:
            facts.add_content(found)
    return facts


def _add_external(facts: _Facts, wire: Wire, message: Field) -> None:
    require_message(message)
    parts = {found.number: wire.text(found) for found in wire.fields(message.value, message.end)}
    key = parts.get(1, "")
    if key in facts.external:
        raise ValueError(f"{facts.told} says twice what the {key[:80]!r} of its external data is")
    facts.external[key] = parts.get(2, "")


def _external(facts: _Facts, dtype: str, nbytes: int, path: Path) -> Initializer:
    """The place of external data. Raises ValueError when it is not beside the model, or not so long."""
    location = facts.external.get("location", "")
    # A plain name: anything else would let a model reach out of its folder.
    if os.path.basename(location) != location or location in ("", ".", "..") or "\\" in location or "\0" in location:
        raise ValueError(f"{facts.told} has its data at {location[:200]!r}, which is no plain name of a file beside the model")
    file = path.parent / location
    if location == path.name:
        raise ValueError(f"{facts.told} has its external data inside the model itself")
    # os.path answers no where Path.is_file raises.
    if not os.path.isfile(file):  # noqa: PTH113
        raise CheckpointFormatError(f"{path} has weights in {location}, which is missing")
    offset, length = (_number(facts, key) for key in ("offset", "length"))
    if length is not None and length != nbytes:
        raise ValueError(f"{facts.told} needs {nbytes} bytes and has {length} in {location}")
    start, size = offset or 0, file.stat().st_size
    if start + nbytes > size:
        raise ValueError(f"{facts.told} ends at byte {start + nbytes} of {location}, which has {size}")
    trouble = "the model states a checksum of its data, which a patch would break" if facts.external.get("checksum") else ""
    return Initializer(facts.name, dtype, tuple(facts.shape), file, start, nbytes, trouble)


def _number(facts: _Facts, key: str) -> int | None:
    text = facts.external.get(key, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{facts.told} has the impossible {key} {text[:40]!r}")
    return int(text)


def check_overlaps(path: Path, tensors: Mapping[str, Initializer]) -> dict[str, Initializer]:
    """The same tensors; those that share all of their bytes with another one have that as their trouble.

    Raises CheckpointFormatError when two tensors share a part of their bytes.
    """
    checked = dict(tensors)
    for group in _by_file(tensors.values()):
        before = group[0]
        for tensor in group[1:]:
            if (tensor.offset, tensor.nbytes) == (before.offset, before.nbytes):
                for one, other in ((tensor, before), (before, tensor)):
                    checked[one.name] = replace(one, trouble=f"it shares its bytes with {other.name[:80]}")
            elif tensor.offset < before.offset + before.nbytes:
                raise CheckpointFormatError(
                    f"{path}: the data of tensors {before.name[:80]!r} and {tensor.name[:80]!r} overlap in {tensor.file.name}"
                )
            before = tensor
    return checked


def _by_file(tensors: Iterable[Initializer]) -> list[list[Initializer]]:
    """The placed tensors with bytes, by file and place."""
    groups: dict[Path, list[Initializer]] = {}
    for tensor in tensors:
        if tensor.placed and tensor.nbytes:
            groups.setdefault(tensor.file, []).append(tensor)
    return [sorted(group, key=lambda tensor: (tensor.offset, tensor.nbytes)) for group in groups.values()]
