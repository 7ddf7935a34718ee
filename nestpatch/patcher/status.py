"""The verb `status`: what is applied to a model, and what rows and signatures confirm of it. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import StateError
from nestpatch.patcher.held import Difference, HeldTensor, Holds, look
from nestpatch.patcher.kept import load_packs, proven_signers
from nestpatch.patcher.ledger import Ledger, LedgerEntry, read_ledger
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.release import ReleasedPack, released_packs
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
        """The ledger's content, each entry with what confirms it, for `--json`."""
        value = self.ledger.as_json()
        entries = zip(value["applied"], self.applied, strict=True)
        applied = [
            entry
            | {"in_rows": not self.problem and not one.missing_in, "signers": dict(one.signers), "claims": list(one.claims)}
            for entry, one in entries
        ]
        released = [asdict(one) | {"consistent": one.consistent} for one in self.released]
        known = {"model": str(self.model), **value, "applied": applied, "released": released}
        return {**known, "sound": self.sound, "problem": self.problem}


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
    ledger, rules = read_ledger(state_dir), load_for_looking() if policy is None else policy
    found: list[HeldTensor] = []
    problem = ""
    try:
        if ledger.applied:
            found = look(checkpoint, state_dir, ledger.applied, load_packs(state_dir, ledger.applied))
    except StateError as error:
        problem = str(error)
    applied = tuple(
        AppliedPack(entry, _lacking(entry, found), proven_signers(state_dir, entry.pack_id, rules, model))
        for entry in ledger.applied
    )
    changed = {name for entry in ledger.applied for name in entry.tensors}
    return Status(checkpoint.path, ledger, applied, released_packs(checkpoint, changed), problem)


def _lacking(entry: LedgerEntry, found: Sequence[HeldTensor]) -> tuple[Difference, ...]:
    ours = (one for one in found if one.entry.pack_id == entry.pack_id and one.holds is not Holds.PACK)
    return tuple(one.difference for one in ours if one.difference is not None)
