"""The verb `status`: what is applied to a model or named in its files, and what rows and signatures confirm. Writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import StateError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.provenance import RecordedRows, read_packs, read_record
from nestpatch.patcher.held import Difference, HeldTensor, Holds, look
from nestpatch.patcher.kept import load_packs, proven_signers
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.state_dir import PACK_ID
from nestpatch.rows import digest
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy
from nestpatch.values import dataclass


@dataclass(frozen=True)
class AppliedPack:
    """One entry of a ledger, and what confirms it."""

    entry: LedgerEntry
    missing_in: tuple[Difference, ...]
    """The tensors that do not hold it; empty: the pack is in the rows."""
    signers: Mapping[str, str]
    """Name -> key id of the trusted keys whose kept signatures were checked just now."""

    @property
    def claims(self) -> tuple[str, ...]:
        """Signers that the ledger names and no signature here proves."""
        return tuple(name for name, key_id in self.entry.signers.items() if key_id not in self.signers.values())


@dataclass(frozen=True)
class Status:
    """What is known of a model."""

    model: Path
    ledger: Ledger
    applied: tuple[AppliedPack, ...]
    """Bottom first."""
    released: tuple[ReleasedPack, ...]
    """The packs that the metadata of its files names, bottom first: claims, compared with the rows."""
    problem: str = ""
    """Why the rows could not be compared; empty when they were."""

    @property
    def sound(self) -> bool:
        """Whether the rows hold all that the ledger names, and are those that the metadata of the files records."""
        held = not any(one.missing_in for one in self.applied) and not any(one.differences for one in self.released)
        return held and not self.problem

    def as_json(self) -> dict[str, Any]:
        """What is applied, each entry with what confirms it, for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        applied = [
            {
                **one.entry.as_json(),
                "records": {name: record.as_json() for name, record in one.entry.tensors.items()},
                "in_rows": not self.problem and not one.missing_in,
                "signers": dict(one.signers),
                "claims": list(one.claims),
            }
            for one in self.applied
        ]
        return {
            "model": str(self.model),
            "applied": applied,
            "released": [one.as_json() for one in self.released],
            "history": [dict(event) for event in self.ledger.history],
            "follows": list(self.ledger.follows),
            "offered": list(self.ledger.offered),
            "transaction": self.ledger.transaction,
            "sound": self.sound,
            "problem": self.problem,
        }


def status(model: str | Path, policy: Policy | None = None) -> Status:
    """Reads the ledger, the touched rows and the kept signatures of a model.

    Args:
        model: A checkpoint of any format.
        policy: Whose signatures count; None means the policy of this user and this machine.

    Returns:
        What is applied, and what confirms it.

    Raises:
        CheckpointError: The model cannot be read.
        InterruptedChangeError: A change was interrupted.
        BusyError: Another process is writing the model.
        LedgerError: The ledger is broken.
    """
    checkpoint, state_dir = open_model(model)
    ledger, rules = read_ledger(state_dir), load_policy(needs_home=False) if policy is None else policy
    found: list[HeldTensor] = []
    problem = ""
    try:
        if ledger.applied:
            found = look(checkpoint, state_dir, ledger.applied, load_packs(state_dir, ledger.applied))
    except StateError as error:
        problem = str(error)
    applied = []
    for entry in ledger.applied:
        ours = (one for one in found if one.entry.pack_id == entry.pack_id and one.holds is not Holds.PACK)
        lacking = tuple(one.difference for one in ours if one.difference is not None)
        applied.append(AppliedPack(entry, lacking, proven_signers(state_dir, entry.pack_id, rules, model)))
    changed = {name for entry in ledger.applied for name in entry.tensors}
    return Status(checkpoint.path, ledger, tuple(applied), released_packs(checkpoint, changed), problem)


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
        """Name and version, for messages."""
        return f"{self.name} {self.version}"

    @property
    def consistent(self) -> bool:
        """Whether rows were compared and all of them are the recorded ones. It proves nothing about who wrote them."""
        return self.compared > 0 and not self.differences

    def as_json(self) -> dict[str, Any]:
        """The pack for `--json`; id and strength are null where the file names none that can be one."""
        is_number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        return {
            "pack": self.label,
            "pack_id": self.pack_id if PACK_ID.fullmatch(self.pack_id) else None,
            "name": self.name,
            "version": self.version,
            "strength": self.strength if is_number else None,
            "tensors": self.tensors,
            "compared": self.compared,
            "differences": [one.as_json() for one in self.differences],
            "consistent": self.consistent,
        }


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
    rows = np.concatenate([np.arange(*run) for run in recorded.runs])
    rows_sha256 = digest(block for _, block in checkpoint.iter_rows(name, rows))
    if rows_sha256 == recorded.sha256:
        return None
    found = f"rows sha256 {rows_sha256[:12]}.. instead of {recorded.sha256[:12]}.."
    return Difference(name, (), len(rows), f"not what the file's metadata records: {found}")
