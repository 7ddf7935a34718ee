"""Takes a pack's bytes apart and puts them together again, without the library under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

CODES = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
}
NAMES = {dtype: code for code, dtype in CODES.items()}
Json = dict[str, Any]
Arrays = dict[str, np.ndarray]


def compact(value: Any) -> str:
    """JSON in canonical form."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def split(data: bytes) -> tuple[str, bytes]:
    """(header text without its padding, tensor bytes)."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length].decode().rstrip(" "), data[8 + length :]


def join(header: str | bytes, body: bytes, *, padding: bytes | None = None) -> bytes:
    """A file from its header text and its tensor bytes, with the format's padding by default."""
    text = header.encode() if isinstance(header, str) else header
    text += b" " * (-(8 + len(text)) % 64) if padding is None else padding
    return struct.pack("<Q", len(text)) + text + body


def with_header_text(data: bytes, change: Callable[[str], str | bytes]) -> bytes:
    """The file with another header text over the same tensor bytes."""
    text, body = split(data)
    return join(change(text), body)


def with_header(data: bytes, change: Callable[[Json], Any]) -> bytes:
    """The file after an in-place change of the parsed header."""
    text, body = split(data)
    header = json.loads(text)
    change(header)
    return join(compact(header), body)


def with_entry(data: bytes, part: str, **fields: Any) -> bytes:
    """The file with other fields in the header entry of the first tensor's part; None removes a field."""

    def change(header: Json) -> None:
        entry = header[f"{first_tensor(header)}:{part}"]
        entry |= fields
        for name in [name for name, value in fields.items() if value is None]:
            del entry[name]

    return with_header(data, change)


def with_base(data: bytes, **fields: Any) -> bytes:
    """The file with other fields in the base identity of the first tensor."""
    return with_manifest(data, lambda manifest: manifest["base"]["tensors"][min(manifest["base"]["tensors"])].update(fields))


def with_quantized_base(data: bytes, dtype: str, *, others: str | None = None, width: int | None = None) -> bytes:
    """The file as nest/2, the first base tensor having a dtype, and all others another one, where given."""

    def change(manifest: Json) -> None:
        manifest["format"] = "nest/2"
        tensors = manifest["base"]["tensors"]
        for name, tensor in tensors.items():
            tensor["dtype"] = dtype if name == min(tensors) else others or dtype
            tensor["shape"][-1] = width or tensor["shape"][-1]

    return with_manifest(data, change)


def with_manifest_text(data: bytes, change: Callable[[str], str]) -> bytes:
    """The file with another manifest text."""

    def change_header(header: Json) -> None:
        header["__metadata__"]["nest"] = change(header["__metadata__"]["nest"])

    return with_header(data, change_header)


def with_manifest(data: bytes, change: Callable[[Json], Any]) -> bytes:
    """The file after an in-place change of the parsed manifest, written canonically."""

    def change_text(text: str) -> str:
        manifest = json.loads(text)
        change(manifest)
        return compact(manifest)

    return with_manifest_text(data, change_text)


def with_arrays(data: bytes, change: Callable[[Arrays], Any]) -> bytes:
    """The file after an in-place change of the name -> array mapping, laid out canonically."""
    text, body = split(data)
    header = json.loads(text)
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[name] = np.frombuffer(body[start:stop], CODES[entry["dtype"]]).reshape(entry["shape"])
    change(arrays)
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    return lay_out(metadata, arrays, order)


def with_array(data: bytes, part: str, change: Callable[[np.ndarray], Any]) -> bytes:
    """The file with another array as the first tensor's part; the dtype stays."""

    def change_arrays(arrays: Arrays) -> None:
        name = f"{first_tensor(arrays)}:{part}"
        arrays[name] = np.asarray(change(arrays[name].copy()), dtype=arrays[name].dtype)

    return with_arrays(data, change_arrays)


def with_factors(data: bytes, factors: np.ndarray, *, named: str = "nest/2") -> bytes:
    """The file with factors in place of the first tensor's clusters, as a format."""

    def change(arrays: Arrays) -> None:
        name = first_tensor(arrays)
        arrays[f"{name}:factors"] = factors
        del arrays[f"{name}:cluster"]

    return with_manifest(with_arrays(data, change), lambda manifest: manifest.update(format=named))


def lay_out(metadata: Any, arrays: Arrays, order: list[str]) -> bytes:
    """The file with its arrays in a given order, one after the other."""
    header, offset = {"__metadata__": metadata}, 0
    for name in order:
        array = arrays[name]
        span = [offset, offset + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
        offset += array.nbytes
    return join(compact(header), b"".join(arrays[name].tobytes() for name in order))


def first_tensor(names: Any) -> str:
    """The first patched tensor, in the order of the names."""
    return min(name.rpartition(":")[0] for name in names if ":" in name)


def rename_tensor(data: bytes, new: str) -> bytes:
    """The file with the first tensor under another name, in the header and in the manifest."""
    old = first_tensor(json.loads(split(data)[0]))

    def change_manifest(manifest: Json) -> None:
        for section in (manifest["base"], manifest["result"]):
            section["tensors"][new] = section["tensors"].pop(old)

    def change_arrays(arrays: Arrays) -> None:
        for name in [name for name in arrays if name.startswith(f"{old}:")]:
            arrays[new + name.removeprefix(old)] = arrays.pop(name)

    return with_arrays(with_manifest(data, change_manifest), change_arrays)
