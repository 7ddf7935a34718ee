"""The file of a guard: safetensors with arrays for each tensor and matrix and one JSON text, in one encoding only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import GuardFormatError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.formats.manifest import canonical_json
from nestpatch.formats.nest import MAX_PACK
from nestpatch.guarding.guard import Guard, GuardedMatrix, PatchedRows

FORMAT = "nestpatch-guard/1"
_KEY = "nestpatch_guard"
_PARTS = ("rows", "basis", "coordinates")
_INPUTS = "inputs"
_FIELDS: dict[str, type] = {
    "format": str,
    "pack": str,
    "pack_id": str,
    "strength": float,
    "energy": float,
    "prompts": int,
    "tensors": dict,
}
_TENSOR_FIELDS: dict[str, type] = {"shape": list, "change": float}


def encode(guard: Guard) -> bytes:
    """Encodes a guard. Equal guards give equal bytes.

    Args:
        guard: The guard.

    Returns:
        The bytes of its file.
    """
    from safetensors.numpy import save

    facts = {
        "format": FORMAT,
        "pack": guard.pack,
        "pack_id": guard.pack_id,
        "strength": float(guard.strength),
        "energy": float(guard.energy),
        "prompts": guard.prompts,
        "tensors": {one.name: {"shape": list(one.shape), "change": one.change} for one in guard.tensors},
    }
    arrays = {f"{one.name}:{part}": np.ascontiguousarray(getattr(one, part)) for one in guard.tensors for part in _PARTS}
    arrays |= {f"{one.name}:{_INPUTS}": np.ascontiguousarray(one.basis) for one in guard.matrices}
    return save(arrays, {_KEY: canonical_json(facts)})


def decode(data: bytes) -> Guard:
    """Decodes the file of a guard.

    Args:
        data: Its bytes.

    Returns:
        The guard.

    Raises:
        GuardFormatError: The bytes are not what `encode` gives for any guard.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GuardFormatError(f"it is no guard: {' '.join(str(error).split()) or type(error).__name__}") from None
    _require_fields(facts, _FIELDS, "guard")
    if facts["format"] != FORMAT:
        raise GuardFormatError(
            f"it has format {facts['format'][:40]!r}; this nestpatch reads {FORMAT!r}",
            advice="Upgrade nestpatch: pip install -U nestpatch",
        )
    guard = Guard(
        facts["pack"],
        facts["pack_id"],
        facts["strength"],
        facts["energy"],
        facts["prompts"],
        tuple(_tensor(name, entry, arrays) for name, entry in facts["tensors"].items()),
        tuple(_matrices(arrays)),
    )
    if encode(guard) != data:
        raise GuardFormatError("the file is not in canonical form")
    return guard


def read(path: str | Path) -> Guard:
    """Reads a guard.

    Args:
        path: The file that `nestpatch guard` wrote.

    Returns:
        The guard.

    Raises:
        GuardFormatError: The file cannot be read, or is not a guard; the message has the path and the reason.
    """
    try:
        return decode(read_bounded(path, MAX_PACK))
    except OSError as error:
        raise GuardFormatError(f"cannot read the guard {path}: {error.strerror or error}", advice="Check the path.") from error
    except GuardFormatError as error:
        raise GuardFormatError(f"{path}: {error}", advice=error.advice) from error


def write(guard: Guard, path: str | Path) -> int:
    """Writes a guard, whole or not at all.

    Args:
        guard: The guard.
        path: The file.

    Returns:
        Its bytes.

    Raises:
        OutputError: The path exists already, or cannot be written.
    """
    data = encode(guard)
    write_bytes(Path(path), data)
    return len(data)


def _matrices(arrays: dict[str, Any]) -> Iterator[GuardedMatrix]:
    for name in sorted(arrays):
        matrix, _, part = name.rpartition(":")
        if part == _INPUTS:
            yield GuardedMatrix(matrix, arrays[name])


def _tensor(name: str, entry: Any, arrays: dict[str, Any]) -> PatchedRows:
    _require_fields(entry, _TENSOR_FIELDS, f"tensor {name!r}")
    if not all(type(n) is int and 0 < n < 1 << 31 for n in entry["shape"]):
        raise GuardFormatError(f"tensor {name!r} has an impossible shape")
    missing = [part for part in _PARTS if f"{name}:{part}" not in arrays]
    if missing:
        raise GuardFormatError(f"tensor {name!r} lacks its {missing[0]}")
    rows, basis, coordinates = (arrays[f"{name}:{part}"] for part in _PARTS)
    return PatchedRows(name, tuple(entry["shape"]), rows, basis, coordinates, entry["change"])


def _require_fields(value: Any, fields: dict[str, type], what: str) -> None:
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise GuardFormatError(f"the {what} must have the fields {', '.join(fields)}, and no others")
    for name, kind in fields.items():
        if type(value[name]) is not kind:
            raise GuardFormatError(f"the {what} has a {name!r} that is not of type {kind.__name__}")
