"""What exported files record in their metadata: which packs their weights contain, and the nestpatch that wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nestpatch.formats import nest
from nestpatch.pack import Pack

PACKS = "nestpatch.packs"
"""Metadata key of an exported file: JSON, its packs, the first one applied first."""
VERSION = "nestpatch.version"
"""Metadata key: the version of nestpatch that wrote the file."""


def pack_entry(pack: Pack, strength: float) -> dict[str, Any]:
    """Describes a pack for the list under PACKS.

    Args:
        pack: The pack.
        strength: How much of its deltas was added.

    Returns:
        Its name, version, pack_id and strength.
    """
    manifest = pack.manifest
    return {"name": manifest.name, "version": manifest.version, "pack_id": nest.pack_id(pack), "strength": strength}


def packs_json(entries: Sequence[dict[str, Any]]) -> str:
    """Encodes the list under PACKS; equal lists give equal bytes.

    Args:
        entries: As `pack_entry` returns them, the first one applied first.

    Returns:
        Canonical JSON.
    """
    return nest.canonical_json(list(entries))


def read_packs(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the packs that a file claims to contain. Anyone can write such a claim; it proves nothing.

    Args:
        metadata: The file's metadata.

    Returns:
        As `pack_entry` returns them; empty where there is no list, or a broken one.
    """
    try:
        found = json.loads(str(metadata.get(PACKS, "[]")))
        return [{field: entry[field] for field in ("name", "version", "pack_id", "strength")} for entry in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []
