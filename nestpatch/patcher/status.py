"""What is applied to a model, as far as rows and signatures confirm what its ledger says. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import StateError
from nestpatch.formats.provenance import read_packs
from nestpatch.patcher.held import Difference, HeldTensor, Holds, look
from nestpatch.patcher.kept import load_packs, proven_signers
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model
from nestpatch.signing.trust import Policy, load_for_looking


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
    files_say: Sequence[Mapping[str, Any]]
    """What the weight files claim in their metadata to have been written with."""
    problem: str = ""
    """Why the rows could not be compared; empty when they were."""

    @property
    def sound(self) -> bool:
        """Whether the rows hold all that the ledger names."""
        return not self.problem and not any(one.missing_in for one in self.applied)

    def as_json(self) -> dict[str, Any]:
        """For scripts: the ledger's content, each entry with what confirms it."""
        value = self.ledger.as_json()
        entries = zip(value["applied"], self.applied, strict=True)
        applied = [
            entry
            | {"in_rows": not self.problem and not one.missing_in, "signers": dict(one.signers), "claims": list(one.claims)}
            for entry, one in entries
        ]
        known = {"model": str(self.model), **value, "applied": applied, "files_say": list(self.files_say)}
        return {**known, "sound": self.sound, "problem": self.problem}


def status(model: str | Path, policy: Policy | None = None) -> Status:
    """Reads the ledger, the touched rows and the kept signatures.

    Raises CheckpointError, InterruptedChangeError, BusyError; LedgerError when the ledger is broken.
    """
    checkpoint, place = open_model(model)
    ledger, rules = read_ledger(place), load_for_looking() if policy is None else policy
    found: list[HeldTensor] = []
    problem = ""
    try:
        if ledger.applied:
            found = look(checkpoint, place, ledger.applied, load_packs(place, ledger.applied))
    except StateError as error:
        problem = str(error)
    applied = tuple(
        AppliedPack(entry, _lacking(entry, found), proven_signers(place, entry.pack_id, rules, model))
        for entry in ledger.applied
    )
    return Status(checkpoint.path, ledger, applied, read_packs(checkpoint.metadata()), problem)


def _lacking(entry: LedgerEntry, found: Sequence[HeldTensor]) -> tuple[Difference, ...]:
    ours = (one for one in found if one.entry.pack_id == entry.pack_id and one.holds is not Holds.PACK)
    return tuple(one.difference for one in ours if one.difference is not None)
