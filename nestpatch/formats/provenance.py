"""The metadata that nestpatch writes into exported files: the packs in their weights, and the digests of the patched rows.

Anyone can write such metadata. It is a claim: `patcher/release.py` compares it with the rows, and only a pack proves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nestpatch.formats import nest
from nestpatch.formats.checkpoint import IntArray
from nestpatch.formats.manifest import canonical_json
from nestpatch.pack import Pack
from nestpatch.values import dataclass

PACKS = "nestpatch.packs"
"""Metadata key of an exported file: JSON, the packs in it, bottom first."""
RECORD = "nestpatch.record"
"""Metadata key of exported safetensors files: JSON, the ledger's entries with the digests of rows before and after."""
VERSION = "nestpatch.version"
"""Metadata key: the nestpatch that wrote it."""
_RANGES = re.compile(r"\d{1,10}(?:-\d{1,10})?(?:,\d{1,10}(?:-\d{1,10})?)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def packs_json(pack: Pack, strength: float) -> str:
    """The list under PACKS for a file that contains a single pack.

    Args:
        pack: The pack.
        strength: How much of its deltas the file contains.

    Returns:
        Canonical JSON: equal packs give equal bytes.
    """
    name, version = pack.manifest.name, pack.manifest.version
    return canonical_json([{"name": name, "version": version, "pack_id": nest.pack_id(pack), "strength": strength}])


def read_packs(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the packs that a file claims to contain. A claim is not a proof.

    Args:
        metadata: The file's metadata.

    Returns:
        For each pack its name, version, pack_id and strength, bottom first; empty where the metadata has none or is broken.
    """
    try:
        found = json.loads(str(metadata.get(PACKS, "[]")))
        return [{field: entry[field] for field in ("name", "version", "pack_id", "strength")} for entry in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def row_ranges(rows: IntArray) -> str:
    """Writes row numbers as ranges.

    Args:
        rows: Ascending row numbers.

    Returns:
        Text such as "0-3,7,12-13".
    """
    runs = np.split(rows, np.flatnonzero(np.diff(rows.astype(np.int64)) != 1) + 1)
    return ",".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class RecordedRows:
    """The rows of one tensor that a file claims to have been patched."""

    runs: tuple[tuple[int, int], ...]
    """(first row, row after the last) of each run, ascending."""
    sha256: str
    """Of the rows as they were written."""


def read_record(metadata: Mapping[str, Any]) -> dict[str, dict[str, RecordedRows]]:
    """Reads which rows a file claims that each of its packs changed.

    Args:
        metadata: The file's metadata.

    Returns:
        Pack id -> tensor name -> the rows; empty where the metadata has no record or a broken one.
    """
    try:
        found = json.loads(str(metadata.get(RECORD, "[]")))
        return {str(entry["pack_id"]): {str(name): _recorded(t) for name, t in entry["tensors"].items()} for entry in found}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _recorded(tensor: Mapping[str, Any]) -> RecordedRows:
    text, digest = tensor["row_numbers"], tensor["after"]
    if not _RANGES.fullmatch(text) or not _SHA256.fullmatch(digest):
        raise ValueError("no ranges of rows with a SHA-256")
    parts = (part.partition("-") for part in text.split(","))
    runs = tuple((int(first), int(last or first) + 1) for first, _, last in parts)
    flat = [number for run in runs for number in run]
    if flat != sorted(flat):
        raise ValueError("the ranges of rows do not ascend")
    return RecordedRows(runs, digest)
