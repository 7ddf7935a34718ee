"""The ledger: which packs were applied to a model, when, by what, and what its rows held before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.errors import LedgerError
from nestpatch.formats.atomic import write_bytes
from nestpatch.patcher.chain import Link

FORMAT = "nestpatch-ledger/1"


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of one applied pack."""

    rows: int
    before: str
    """SHA-256 of the rows before this pack."""
    after: str
    """SHA-256 of the same rows after it."""
    gain: float | None = None
    """Share of the pack's change that arrived after rounding to another type; None for rows of the type that it is for."""


@dataclass(frozen=True)
class Entry:
    """One applied pack."""

    pack_id: str
    name: str
    version: str
    strength: float
    when: str
    tool: str
    transaction: str
    """Names the undo record."""
    tensors: Mapping[str, TensorRecord]
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    base_mismatch_allowed: bool = False
    rounding: str = ""
    """What quantized rows were made of; empty where all rows are plain numbers."""
    signers: Mapping[str, str] = field(default_factory=dict)
    """Name -> key id of the trusted keys that had signed the pack when it was applied."""

    @property
    def gain(self) -> float | None:
        """The smallest share of the pack's change that arrived in a tensor; None where no rows are quantized."""
        return min((record.gain for record in self.tensors.values() if record.gain is not None), default=None)

    @property
    def link(self) -> Link:
        """What the chain rules need."""
        return Link(self.pack_id, self.name, self.version, self.strength, self.supersedes, self.requires)

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def undo(self) -> str:
        """Name of the undo record."""
        return f"{self.transaction}-{self.pack_id[:16]}"


@dataclass(frozen=True)
class Ledger:
    """All that is applied, bottom first. `history` keeps what was replaced or reverted, oldest first."""

    transaction: str = ""
    """The last one that was finished."""
    applied: tuple[Entry, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    follows: tuple[str, ...] = ()
    """The channels that updates come from."""

    def as_json(self) -> dict[str, Any]:
        """The file's content."""
        content = {
            "format": FORMAT,
            "transaction": self.transaction,
            "applied": [asdict(entry) for entry in self.applied],
            "history": [dict(event) for event in self.history],
        }
        if self.follows:
            content["follows"] = list(self.follows)
        return {**content, "sha256": _digest(content)}

    def following(self, channel: str) -> Ledger:
        """With one more channel to follow; itself when that is none or known."""
        return self if not channel or channel in self.follows else replace(self, follows=(*self.follows, channel))

    def with_event(self, what: str, entry: Entry, when: str) -> Ledger:
        """Adds a line to the history."""
        event = {"what": what, "when": when, "pack_id": entry.pack_id, "name": entry.name, "version": entry.version}
        return replace(self, history=(*self.history, event))


def read_ledger(path: Path) -> Ledger:
    """Reads a ledger; a missing one is empty. Raises LedgerError when it is broken or of a newer nestpatch."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Ledger()
    except (OSError, UnicodeDecodeError) as error:
        raise LedgerError(f"cannot read the ledger {path}: {error}") from error
    try:
        value = json.loads(text)
        if value["format"] != FORMAT:
            raise LedgerError(
                f"the ledger {path} has format {value['format']!r}; this nestpatch reads {FORMAT!r}",
                advice="Upgrade nestpatch: pip install -U nestpatch",
            )
        if value.pop("sha256") != _digest(value):
            raise LedgerError(f"the ledger {path} was changed by something other than nestpatch")
        applied = tuple(_entry(entry) for entry in value["applied"])
        follows = tuple(str(channel) for channel in value.get("follows", ()))
        return Ledger(str(value["transaction"]), applied, tuple(value["history"]), follows)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerError(f"the ledger {path} is broken: {error!r}") from error


def _digest(content: Mapping[str, Any]) -> str:
    """Finds accidents: a ledger decides what a revert writes."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _entry(value: dict[str, Any]) -> Entry:
    tensors = {name: TensorRecord(**record) for name, record in value["tensors"].items()}
    lists = {key: tuple(value[key]) for key in ("supersedes", "requires")}
    return Entry(**{**value, **lists, "tensors": tensors})


def write_ledger(path: Path, ledger: Ledger) -> None:
    """Replaces the ledger at once."""
    write_bytes(path, (json.dumps(ledger.as_json(), indent=1) + "\n").encode("utf-8"), overwrite=True)
