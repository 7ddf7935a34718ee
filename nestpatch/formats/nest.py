"""The `.nest` file format: canonical writer, strict reader. docs/nest-format.md is the normative text.

A pack has exactly one encoding. The reader names what is wrong with a bad file; at the end it encodes what it read and compares
the bytes, so that it accepts only what the writer writes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from hashlib import sha256
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.errors import PackContentError, PackError, PackFormatError, PackTooNewError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import open_regular
from nestpatch.pack import FORMATS, BaseIdentity, Manifest, Pack, TensorIdentity
from nestpatch.rows import DTYPES

MAX_HEADER = 1 << 20
MAX_PACK = 1 << 30
"""Bytes of a file: 65,536 rows of 8,192 16-bit numbers, each with its own delta. Trained packs have megabytes at most."""
ALIGNMENT = 64
_MAX_SIDE = 1 << 31
"""Rows or columns, at most: an empty tensor with a side of 0 could claim any number for the other."""
_PARTS = ("delta", "rows", "cluster", "factors", "sketch")
"""A tensor has all of them but one: clusters or factors."""
_CODES: dict[str, np.dtype[Any]] = {
    **DTYPES,
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
}
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_MANIFEST_FIELDS: dict[str, type] = {
    "format": str,
    "name": str,
    "version": str,
    "description": str,
    "license": str,
    "created": str,
    "tags": list,
    "base": dict,
    "result": dict,
    "supersedes": list,
    "requires": list,
    "method": dict,
    "evaluation": dict,
}
_BASE_FIELDS: dict[str, type] = {
    "model_id": str,
    "revision": str,
    "architecture": str,
    "dtype": str,
    "tensors": dict,
}
_IDENTITY_FIELDS: dict[str, type] = {"shape": list, "dtype": str, "sha256": str, "rows_sha256": str}
_RESULT_FIELDS: dict[str, type] = {"rows_sha256": str}


def canonical_json(value: Any) -> str:
    """Encodes a value as JSON in the one form that packs use: sorted keys, no spaces, no needless escapes.

    Args:
        value: Plain JSON values.

    Returns:
        The text.

    Raises:
        PackContentError: JSON cannot hold the value (NaN, infinity, lone surrogates, other types).
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise PackContentError(f"the manifest cannot be written as JSON: {error}") from error
    return text


def encode(pack: Pack) -> bytes:
    """Encodes a pack. Equal packs give equal bytes.

    Args:
        pack: The pack.

    Returns:
        The bytes of its `.nest` file.

    Raises:
        PackContentError: The header or the file would be too long.
    """
    arrays = {f"{d.name}:{part}": np.ascontiguousarray(array) for d in pack for part, array in parts(d).items()}
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
    return struct.pack("<Q", len(text)) + text + b"".join(arrays[name].tobytes() for name in order)


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
    return sha256(encode(pack)).hexdigest()


def decode(data: bytes) -> Pack:
    """Decodes a `.nest` file.

    Args:
        data: Its bytes.

    Returns:
        The pack; its arrays are copies.

    Raises:
        PackFormatError: The file is not a pack, or not in canonical form.
        PackTooNewError: It has a format version, a tensor or a field that this nestpatch does not know.
        PackContentError: Its content contradicts itself.
    """
    length = _head_length(data[:8], len(data))
    header, body = _parse_head(data[:length], len(data)), memoryview(data)[length:]
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or set(metadata) != {"nest"} or not isinstance(metadata["nest"], str):
        raise PackFormatError(
            "this safetensors file is not a pack: its metadata must hold the key nest and no other",
            advice="Give the model first and a .nest file second: nestpatch apply MODEL PACK",
        )
    named, manifest = parse_manifest(metadata["nest"])
    pack = Pack(manifest, _deltas({name: _array(name, entry, body) for name, entry in header.items()}))
    if pack.additions and pack.format != named:
        raise PackContentError(f"the format {named} of the pack does not have what it holds: {pack.additions[0]}")
    if pack.format != named:
        raise PackContentError(f"the pack holds nothing that needs {named}: its format must be {pack.format}")
    if encode(pack) != data:
        raise PackFormatError("the file is not in canonical form (order, padding, alignment or manifest)")
    return pack


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
            head = prefix + file.read(_head_length(prefix, size) - 8)
            _parse_head(head, size)
            return head + file.read(size - len(head))
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
    data = encode(pack)
    write_bytes(Path(path), data, overwrite=overwrite)
    return sha256(data).hexdigest()


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
    header = _strict_json(head[8:], "header")
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
    if not (_whole_numbers(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise PackFormatError(f"tensor {name!r} has impossible data_offsets")
    return offsets[0], offsets[1]


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _array(name: str, entry: Mapping[str, Any], body: memoryview) -> npt.NDArray[Any]:
    code, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(code, str) or code not in _CODES:
        raise PackFormatError(f"tensor {name!r} has dtype {code!r}; a pack may hold {', '.join(_CODES)}")
    if not _whole_numbers(shape) or len(shape) > 2:
        raise PackFormatError(f"tensor {name!r} has an impossible shape")
    start, stop = entry["data_offsets"]
    dtype = _CODES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != stop - start:
        raise PackFormatError(f"tensor {name!r}: shape and dtype need {nbytes} bytes, it has {stop - start}")
    if max(shape, default=0) >= _MAX_SIDE:
        raise PackFormatError(f"tensor {name!r} has an impossible shape")
    # A copy: aligned, and independent of the file's bytes.
    return np.frombuffer(bytes(body[start:stop]), dtype).reshape(shape)


def _strict_json(text: bytes | str, what: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise PackFormatError(f"the {what} has the duplicate key {twice!r}")
        return result

    def refuse(constant: str) -> Any:
        raise PackFormatError(f"the {what} holds {constant}")

    try:
        # Bytes would let json guess UTF-16.
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PackFormatError(f"the {what} is not valid JSON: {error}") from None


def manifest_json(pack: Pack) -> dict[str, Any]:
    """Converts the manifest of a pack to plain JSON values, in the layout of docs/nest-format.md.

    Args:
        pack: The pack, whose content decides the format.

    Returns:
        A JSON object.
    """
    manifest, base = pack.manifest, pack.manifest.base
    tensors = {
        name: {"shape": list(t.shape), "dtype": t.dtype, "sha256": t.sha256, "rows_sha256": t.rows_sha256}
        for name, t in base.tensors.items()
    }
    return {
        "format": pack.format,
        "name": manifest.name,
        "version": manifest.version,
        "description": manifest.description,
        "license": manifest.license,
        "created": manifest.created,
        "tags": list(manifest.tags),
        "base": {
            "model_id": base.model_id,
            "revision": base.revision,
            "architecture": base.architecture,
            "dtype": base.dtype,
            "tensors": tensors,
        },
        "result": {"tensors": {name: {"rows_sha256": value} for name, value in manifest.result.items()}},
        "supersedes": list(manifest.supersedes),
        "requires": list(manifest.requires),
        "method": dict(manifest.method),
        "evaluation": dict(manifest.evaluation),
    }


def parse_manifest(text: str) -> tuple[str, Manifest]:
    """Parses a manifest.

    Args:
        text: Canonical JSON.

    Returns:
        The format that it names, one of FORMATS, and the manifest.

    Raises:
        PackFormatError: It is not canonical JSON, or a field is missing or of the wrong type.
        PackTooNewError: It has a format version or a field that this nestpatch does not know.
        PackContentError: A value is impossible.
    """
    value = _strict_json(text, "manifest")
    if isinstance(value, dict) and isinstance(value.get("format"), str) and value["format"] not in FORMATS:
        known = " and ".join(map(repr, FORMATS))
        raise PackTooNewError(f"the pack has format {value['format'][:40]!r}; this nestpatch reads {known}")
    _require_fields(value, _MANIFEST_FIELDS, "manifest")
    if canonical_json(value) != text:
        raise PackFormatError("the manifest is not canonical JSON (sorted keys, no spaces)")
    base, result = value["base"], value["result"]
    _require_fields(base, _BASE_FIELDS, "manifest's base")
    _require_fields(result, {"tensors": dict}, "manifest's result")
    for kind in ("tags", "supersedes", "requires"):
        if not all(isinstance(entry, str) for entry in value[kind]):
            raise PackFormatError(f"the manifest's {kind} must be a list of strings")
    for name, entry in result["tensors"].items():
        _require_fields(entry, _RESULT_FIELDS, f"result tensor {name!r}")
    for name, entry in base["tensors"].items():
        _require_fields(entry, _IDENTITY_FIELDS, f"base tensor {name!r}")
        if not _whole_numbers(entry["shape"]):
            raise PackFormatError(f"base tensor {name!r} has an impossible shape")
    identities = {
        name: TensorIdentity(tuple(entry["shape"]), entry["dtype"], entry["sha256"], entry["rows_sha256"])
        for name, entry in base["tensors"].items()
    }
    plain = {k: value[k] for k in ("name", "version", "description", "license", "created", "method", "evaluation")}
    manifest = Manifest(
        **plain,
        tags=tuple(value["tags"]),
        supersedes=tuple(value["supersedes"]),
        requires=tuple(value["requires"]),
        base=BaseIdentity(base["model_id"], base["revision"], base["architecture"], base["dtype"], identities),
        result={name: entry["rows_sha256"] for name, entry in result["tensors"].items()},
    )
    return value["format"], manifest


def _require_fields(value: Any, fields: Mapping[str, type], what: str) -> None:
    if not isinstance(value, dict):
        raise PackFormatError(f"the {what} is not a JSON object")
    if unknown := sorted(set(value) - set(fields)):
        raise PackTooNewError(f"the {what} has the unknown field {unknown[0]!r}")
    for name, kind in fields.items():
        if name not in value:
            raise PackFormatError(f"the {what} lacks the field {name!r}")
        if type(value[name]) is not kind:
            raise PackFormatError(f"the {what} has a {name!r} that is not of type {kind.__name__}")
