"""Packs that a released model names in the metadata of its files, compared with its rows.

A release (`nestpatch export --to safetensors`) has no ledger beside it. Its files say which packs they hold, and the digests of
the rows that these changed. Anyone can write that, so it is reported as a claim, together with what the rows show.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.provenance import RecordedRows, read_packs, read_record
from nestpatch.patcher.held import Difference


@dataclass(frozen=True)
class ReleasedPack:
    """A pack that the metadata of a model's files names."""

    name: str
    version: str
    pack_id: str
    strength: Any
    """As the file says; a number where nestpatch wrote it."""
    tensors: int
    """Tensors that the metadata records digests of; 0 where the format has no room for them."""
    compared: int
    """Of these, the tensors whose rows were compared. Rows that another pack changed later cannot be."""
    differences: tuple[Difference, ...]
    """The compared tensors whose rows are not the recorded ones."""

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def consistent(self) -> bool:
        """Whether rows were compared and all of them are the recorded ones. It proves nothing about who wrote them."""
        return self.compared > 0 and not self.differences


def released_packs(checkpoint: Checkpoint, changed: Collection[str] = ()) -> tuple[ReleasedPack, ...]:
    """The packs that the metadata of a model names, each compared with the rows.

    Args:
        checkpoint: The model.
        changed: Names of tensors that packs of the ledger have changed since; their rows are not compared.

    Returns:
        One value per pack, bottom first; empty where the metadata names none.

    Raises:
        CheckpointError: Rows cannot be read.
    """
    claims, record = read_packs(checkpoint.metadata()), read_record(checkpoint.metadata())
    found = []
    for number, claim in enumerate(claims):
        rows = record.get(str(claim["pack_id"]), {})
        later = [record.get(str(above["pack_id"]), {}) for above in claims[number + 1 :]]
        compared = {
            name: one for name, one in rows.items() if name not in changed and not any(name in above for above in later)
        }
        differences = [difference for name in compared if (difference := _difference(checkpoint, name, compared[name]))]
        one = ReleasedPack(
            name=str(claim["name"]),
            version=str(claim["version"]),
            pack_id=str(claim["pack_id"]),
            strength=claim["strength"],
            tensors=len(rows),
            compared=len(compared),
            differences=tuple(differences),
        )
        found.append(one)
    return tuple(found)


def _difference(checkpoint: Checkpoint, name: str, recorded: RecordedRows) -> Difference | None:
    """How the rows of a tensor differ from the recorded ones; None where they do not."""
    if not checkpoint.has(name) or recorded.runs[-1][1] > checkpoint.info(name).rows:
        return Difference(name, (), 0, "the metadata names rows that the model does not have")
    state = sha256()
    rows = np.concatenate([np.arange(*run) for run in recorded.runs])
    for _, block in checkpoint.iter_rows(name, rows):
        state.update(block.view(np.uint8).data)
    if state.hexdigest() == recorded.sha256:
        return None
    found = f"rows sha256 {state.hexdigest()[:12]}.. instead of {recorded.sha256[:12]}.."
    return Difference(name, (), len(rows), f"not what the file's metadata records: {found}")
