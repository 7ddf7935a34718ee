"""What the files that nestpatch writes say about themselves: the packs in their weights, and the digests of the patched rows.

Anyone can write such metadata. It is a claim: `patcher/release.py` compares it with the rows, and only a pack proves it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestpatch.formats import nest
from nestpatch.formats.checkpoint import IntArray
from nestpatch.pack import Pack

PACKS = "nestpatch.packs"
"""Metadata key of an exported file: JSON, the packs in it, bottom first."""
RECORD = "nestpatch.record"
"""Metadata key of exported safetensors files: JSON, the ledger's entries with the digests of rows before and after."""
VERSION = "nestpatch.version"
"""Metadata key: the nestpatch that wrote it."""
_RANGES = re.compile(r"\d{1,10}(?:-\d{1,10})?(?:,\d{1,10}(?:-\d{1,10})?)*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def pack_entry(pack: Pack, strength: float) -> dict[str, Any]:
    """One pack of the list under PACKS."""
    manifest = pack.manifest
    return {"name": manifest.name, "version": manifest.version, "pack_id": nest.pack_id(pack), "strength": strength}


def packs_json(entries: Sequence[dict[str, Any]]) -> str:
    """The list as text; the same entries give the same bytes."""
    return nest.canonical_json(list(entries))


def read_packs(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The packs that a file claims to hold; empty where it says nothing that can be understood. A claim is not a proof."""
    try:
        found = json.loads(str(metadata.get(PACKS, "[]")))
        return [{field: entry[field] for field in ("name", "version", "pack_id", "strength")} for entry in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


def row_ranges(rows: IntArray) -> str:
    """Ascending row numbers as text: "0-3,7,12-13"."""
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
    """Pack id -> tensor name -> the rows that a file claims that this pack changed; empty where nothing can be understood."""
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
