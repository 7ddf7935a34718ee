"""What files that nestpatch writes say of themselves: which packs their weights hold."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nestpatch.formats import nest
from nestpatch.pack import Pack

PACKS = "nestpatch.packs"
"""Metadata key of an exported file: JSON, the packs in it, bottom first."""
VERSION = "nestpatch.version"
"""Metadata key: the nestpatch that wrote it."""


def pack_entry(pack: Pack, strength: float) -> dict[str, Any]:
    """One pack, as the list has it."""
    manifest = pack.manifest
    return {"name": manifest.name, "version": manifest.version, "pack_id": nest.pack_id(pack), "strength": strength}


def packs_json(entries: Sequence[dict[str, Any]]) -> str:
    """The list as text; the same entries give the same bytes."""
    return nest.canonical_json(list(entries))


def read_packs(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The packs that a file claims to hold; none where it says nothing that can be understood. A claim is no proof."""
    try:
        found = json.loads(str(metadata.get(PACKS, "[]")))
        return [{field: entry[field] for field in ("name", "version", "pack_id", "strength")} for entry in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
