"""The `.nest` file format: canonical writer, strict reader. docs/nest-format.md is the normative text; `manifest` has the JSON.

A pack has exactly one encoding. The reader names what is wrong with a bad file; at the end it encodes what it read and compares
the bytes, so that it accepts only what the writer writes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.errors import PackContentError, PackError, PackFormatError, PackTooNewError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import open_regular
from nestpatch.formats.manifest import canonical_json, manifest_json, parse_manifest, strict_json, whole_numbers
from nestpatch.pack import Pack
from nestpatch.rows import DTYPES

MAX_HEADER = 1 << 20
MAX_PACK = 1 << 30
"""Bytes of a file: 65,536 rows of 8,192 16-bit numbers, each with its own delta. Trained packs have megabytes at most."""
ALIGNMENT = 64
_MAX_SIDE = 1 << 31
"""Rows or columns, at most: an empty tensor with a side of 0 could claim any number for the other."""
_PARTS = ("delta", "rows", "cluster", "factors", "sketch")
"""A tensor has all of them but one: clusters or factors."""
_DETECTOR = "detector:weight"
"""No part of a matrix is called weight, so it is no part of a matrix that is named detector."""
_CODES: dict[str, np.dtype[Any]] = {
    **DTYPES,
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
}
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}


def encode(pack: Pack) -> bytes:
    """Encodes a pack. Equal packs give equal bytes.

    Args:
        pack: The pack.

    Returns:
        The bytes of its `.nest` file.

    Raises:
        PackContentError: The header or the file would be too long.
    """
    return b"".join(encoded(pack))


def encoded(pack: Pack) -> Iterator[bytes | memoryview]:
    """Encodes a pack in parts: comparing, hashing and writing it need no copy of the whole.

    Args:
        pack: The pack.

    Yields:
        The bytes of its `.nest` file, in order.

    Raises:
        PackContentError: As `encode`.
    """
    arrays = {f"{d.name}:{part}": np.ascontiguousarray(array) for d in pack for part, array in parts(d).items()}
    if pack.detector_weight is not None:
        arrays[_DETECTOR] = np.ascontiguousarray(pack.detector_weight)
    # Wide types first, so that every array begins at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    codes = {dtype: code for code, dtype in _CODES.items()}
    header: dict[str, Any] = {"__metadata__": {"nest": canonical_json(manifest_json(pack))}}
    offset = 0
    for name in order:
        array = arrays[name]
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    text = canonical_json(header).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise PackContentError(f"the header would have {len(text)} bytes; {MAX_HEADER} are allowed")
    if 8 + len(text) + offset > MAX_PACK:
        raise PackContentError(f"the pack would have {8 + len(text) + offset} bytes; {MAX_PACK} are allowed")
    yield struct.pack("<Q", len(text)) + text
    yield from (arrays[name].reshape(-1).view(np.uint8).data for name in order)


def parts(delta: TensorDelta) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a tensor's change.

    Args:
        delta: The change.

    Returns:
        Part of the name in the file -> array.
    """
    return {part: array for part in _PARTS if (array := getattr(delta, part)) is not None}


def pack_id(pack: Pack) -> str:
    """The id of a pack.

    Args:
        pack: The pack.

    Returns:
        The SHA-256 of its `.nest` file, in hex.
    """
    state = sha256()
    for part in encoded(pack):
        state.update(part)
    return state.hexdigest()


def decode(data: bytes) -> Pack:
    """Decodes a `.nest` file.

    Args:
        data: Its bytes.

    Returns:
        The pack; its arrays are views of the bytes.

    Raises:
        PackFormatError: The file is not a pack, or not in canonical form.
        PackTooNewError: It has a format version, a tensor or a field that this nestpatch does not know.
        PackContentError: Its content contradicts itself.
    """
    data = bytes(data)  # no copy, but of a buffer that may change
    length = _head_length(data[:8], len(data))
    header, body = _parse_head(data[:length], len(data)), memoryview(data)[length:]
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {"nest"} or not isinstance(metadata["nest"], str):
        raise PackFormatError(
            "this safetensors file is not a pack: its metadata must hold the key nest and no other",
            advice="Give the model first and a .nest file second: nestpatch apply MODEL PACK",
        )
    named, manifest = parse_manifest(metadata["nest"])
    arrays = {name: _array(name, entry, body) for name, entry in header.items()}
    detector = arrays.pop(_DETECTOR, None)
    pack = Pack(manifest, _deltas(arrays), detector)
    if pack.additions and pack.format != named:
        raise PackContentError(f"the format {named} of the pack does not have what it holds: {pack.additions[0]}")
    if pack.format != named:
        raise PackContentError(f"the pack holds nothing that needs {named}: its format must be {pack.format}")
    if not _is_encoding(pack, data):
        raise PackFormatError("the file is not in canonical form (order, padding, alignment or manifest)")
    return pack


def _is_encoding(pack: Pack, data: bytes) -> bool:
    found, end = np.frombuffer(data, np.uint8), 0
    for part in encoded(pack):
        start, end = end, end + len(part)
        if not np.array_equal(np.frombuffer(part, np.uint8), found[start:end]):
            return False
    return end == len(data)


def _deltas(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[TensorDelta, ...]:
    """The changes that named arrays are parts of, in the order of their names."""
    found: dict[str, dict[str, npt.NDArray[Any]]] = {}
    for name in sorted(arrays):
        tensor, _, part = name.rpartition(":")
        if part not in _PARTS:
            raise PackTooNewError(f"unknown tensor {name!r}")
        found.setdefault(tensor, {})[part] = arrays[name]
    for tensor, has in found.items():
        needed = {*_PARTS} - {"cluster" if "factors" in has else "factors"}
        if missing := sorted(needed - has.keys()):
            raise PackFormatError(f"tensor {f'{tensor}:{missing[0]}'!r} is missing")
    return tuple(TensorDelta(tensor, **has) for tensor, has in sorted(found.items()))


def read_bytes(path: str | Path) -> bytes:
    """Reads the bytes of a `.nest` file.

    The header says how long the file must be: of another file, such as a model given in place of the pack, no more is read.

    Args:
        path: The file.

    Returns:
        Its bytes, for `decode`.

    Raises:
        PackError: The file cannot be read, or its length is not what its header says.
    """
    try:
        with open_regular(path) as raw, BufferedReader(raw) as file:
            size = os.fstat(raw.fileno()).st_size
            prefix = file.read(8)
            _parse_head(prefix + file.read(_head_length(prefix, size) - 8), size)
            file.seek(0)
            return file.read(size)
    except OSError as error:
        raise PackError(f"cannot read the pack {path}: {error.strerror or error}", advice="Check the path.") from error
    except PackError as error:
        raise type(error)(f"{path}: {error}", advice=error.advice) from error


def read(path: str | Path) -> Pack:
    """Reads a `.nest` file.

    Args:
        path: The file.

    Returns:
        The pack.

    Raises:
        PackError: The file cannot be read, or is not a pack; the message has the path and the reason.
    """
    data = read_bytes(path)
    try:
        return decode(data)
    except PackError as error:
        raise type(error)(f"{path}: {error}", advice=error.advice) from error


def write(pack: Pack, path: str | Path, *, overwrite: bool = False) -> str:
    """Writes a pack, whole or not at all.

    Args:
        pack: The pack.
        path: The file.
        overwrite: Whether a file there is replaced.

    Returns:
        The pack's id.

    Raises:
        OutputError: The path exists already, or cannot be written.
        PackContentError: As `encode`.
    """
    identity = pack_id(pack)
    write_bytes(Path(path), encoded(pack), overwrite=overwrite)
    return identity


def _head_length(prefix: bytes, size: int) -> int:
    """Bytes of the prefix and the header, in a file of `size` bytes."""
    if len(prefix) < 8:
        raise PackFormatError(f"the file has {len(prefix)} bytes: too short for a pack")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER:
        raise PackFormatError(f"the header claims {length} bytes; {MAX_HEADER} are allowed")
    if 8 + length > size:
        raise PackFormatError(f"the file ends inside its header: {size} bytes, {8 + length} needed")
    return 8 + length


def _parse_head(head: bytes, size: int) -> dict[str, Any]:
    """The header of a file of `size` bytes, whose tensors must fill the file exactly."""
    header = strict_json(head[8:], "header")
    if not isinstance(header, dict):
        raise PackFormatError("the header is not a JSON object")
    spans = sorted(_span(name, entry) for name, entry in header.items() if name != "__metadata__")
    end = 0
    for start, stop in spans:
        if start != end:
            raise PackFormatError(f"the tensors {'overlap' if start < end else 'leave a gap'} at byte {min(start, end)}")
        end = stop
    if end != size - len(head):
        raise PackFormatError(f"the header describes {end} bytes of tensors, the file holds {size - len(head)}")
    if size > MAX_PACK:
        raise PackFormatError(f"the file has {size} bytes; {MAX_PACK} are allowed")
    return header


def _span(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict):
        raise PackFormatError(f"tensor {name!r} is not described by an object")
    if unknown := sorted(set(entry) - _ENTRY_FIELDS):
        raise PackTooNewError(f"tensor {name!r} has the unknown field {unknown[0]!r}")
    offsets = entry.get("data_offsets")
    if not (whole_numbers(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise PackFormatError(f"tensor {name!r} has impossible data_offsets")
    return offsets[0], offsets[1]


def _array(name: str, entry: Mapping[str, Any], body: memoryview) -> npt.NDArray[Any]:
    code, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(code, str) or code not in _CODES:
        raise PackFormatError(f"tensor {name!r} has dtype {code!r}; a pack may hold {', '.join(_CODES)}")
    if not whole_numbers(shape) or len(shape) > 2:
        raise PackFormatError(f"tensor {name!r} has an impossible shape")
    start, stop = entry["data_offsets"]
    dtype = _CODES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != stop - start:
        raise PackFormatError(f"tensor {name!r}: shape and dtype need {nbytes} bytes, it has {stop - start}")
    if max(shape, default=0) >= _MAX_SIDE:
        raise PackFormatError(f"tensor {name!r} has an impossible shape")
    return np.frombuffer(body[start:stop], dtype).reshape(shape)
