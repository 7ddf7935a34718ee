"""The ledger: which packs were applied to a model, when, by what, and what its rows held before and after.

It is beside the model and travels with it. Every field is checked when it is read, and the seal of this machine shows whether
nestpatch wrote it here, for this very model. A ledger without that seal makes claims: packs and rows have to confirm them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, TypeAlias

from nestpatch.errors import LedgerError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.pack import name_problem, version_problem
from nestpatch.patcher.chain import Link
from nestpatch.patcher.state_dir import PACK_ID, TRANSACTION, StateDir
from nestpatch.signing.machine import is_ours, seal

FORMAT = "nestpatch-ledger/1"
MAX_LEDGER = 64 << 20
"""Bytes. One entry of a model with 1,000 patched tensors has 250 kB."""
MAX_TEXT = 2048
"""Characters of a channel or a tool's name."""
EVENTS = ("applied", "undone", "found missing")
_WHEN = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of one applied pack."""

    rows: int
    before: str
    """SHA-256 of the rows before this pack."""
    after: str
    """SHA-256 of the same rows after it."""
    retention: float | None = None
    """Share of the pack's change that arrived after rounding to another type; None for rows of the type that it is for."""


@dataclass(frozen=True)
class LedgerEntry:
    """One applied pack."""

    pack_id: str
    name: str
    version: str
    strength: float
    when: str
    tool: str
    transaction: str
    """Names the undo record. Empty in the record of an exported file, which has none."""
    tensors: Mapping[str, TensorRecord]
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    base_mismatch_allowed: bool = False
    rounding: str = ""
    """What quantized rows were made of; empty where all rows are plain numbers."""
    signers: Mapping[str, str] = field(default_factory=dict)
    """Name -> key id of the trusted keys whose signatures were checked when the pack was applied."""
    roots: tuple[str, ...] = ()
    """Key ids of the root keys of the channel that it came from, oldest first."""
    foreign: bool = False
    """Whether the entry came along with the model: packs and rows have to confirm it."""

    @property
    def retention(self) -> float | None:
        """The smallest share of the pack's change that arrived in a tensor; None where no rows are quantized."""
        return min((record.retention for record in self.tensors.values() if record.retention is not None), default=None)

    @property
    def publishers(self) -> frozenset[str]:
        """The key ids in whose name the pack was applied; empty: nobody's."""
        return frozenset((*self.signers.values(), *self.roots))

    @property
    def link(self) -> Link:
        """What the chain rules need."""
        return Link(
            self.pack_id, self.name, self.version, self.strength, self.supersedes, self.requires, publishers=self.publishers
        )

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def undo(self) -> str:
        """Name of the undo record."""
        return f"{self.transaction}-{self.pack_id[:16]}"


@dataclass(frozen=True)
class Ledger:
    """All that is applied, bottom first. `history` keeps what was replaced or reverted, oldest first; lines that came along
    with the model are marked "foreign".
    """

    transaction: str = ""
    """The last one that was finished."""
    applied: tuple[LedgerEntry, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    follows: tuple[str, ...] = ()
    """The channels that updates come from."""
    offered: tuple[str, ...] = ()
    """Channels of a ledger that came along with the model: nobody here has agreed to them."""
    sealed: bool = field(default=False, compare=False)
    """Whether this machine's seal is on the file that it was read from."""

    def as_json(self) -> dict[str, Any]:
        """The file's content, without its seal."""
        content = {
            "format": FORMAT,
            "transaction": self.transaction,
            "applied": [asdict(entry) for entry in self.applied],
            "history": [dict(event) for event in self.history],
        }
        for name, channels in (("follows", self.follows), ("offered", self.offered)):
            if channels:
                content[name] = list(channels)
        return {**content, "sha256": _digest(content).hex()}

    def following(self, channel: str) -> Ledger:
        """With one more channel to follow; itself when that is none or known."""
        if not channel or channel in self.follows:
            return self
        offered = tuple(other for other in self.offered if other != channel)
        return replace(self, follows=(*self.follows, channel), offered=offered)

    def with_event(self, what: str, entry: LedgerEntry, when: str) -> Ledger:
        """Adds a line to the history."""
        event = {"what": what, "when": when, "pack_id": entry.pack_id, "name": entry.name, "version": entry.version}
        return replace(self, history=(*self.history, event))


def read_ledger(state_dir: StateDir) -> Ledger:
    """Reads the ledger of a model; a missing one is empty.

    Raises LedgerError when it is broken, of a newer nestpatch, or something else than a file.
    """
    try:
        data = read_bounded(state_dir.ledger, MAX_LEDGER, follow=False, error=LedgerError)
    except FileNotFoundError:
        return Ledger()
    try:
        return _ledger(json.loads(data.decode("utf-8")), state_dir)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise LedgerError(f"the ledger {state_dir.ledger} is broken: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200]


def _ledger(value: Any, state_dir: StateDir) -> Ledger:
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if value["format"] != FORMAT:
        raise LedgerError(
            f"the ledger {state_dir.ledger} has format {str(value['format'])[:80]!r}; this nestpatch reads {FORMAT!r}",
            advice="Upgrade nestpatch: pip install -U nestpatch",
        )
    found = str(value.pop("seal", ""))
    if value.pop("sha256") != _digest(value).hex():
        raise LedgerError(f"the ledger {state_dir.ledger} was changed by something other than nestpatch")
    transaction = _one_of(value["transaction"], "transaction", TRANSACTION, empty=True)
    applied = tuple(_entry(entry) for entry in _list(value["applied"], "applied"))
    if len({entry.pack_id for entry in applied}) != len(applied):
        raise ValueError("a pack is applied twice")
    history = tuple(_event(event) for event in _list(value["history"], "history"))
    follows, offered = (
        tuple(_text(channel, name) for channel in _list(value.get(name, []), name)) for name in ("follows", "offered")
    )
    if is_ours("ledger", state_dir.folder, _digest(value), found):
        return Ledger(transaction, applied, history, follows, offered, sealed=True)
    foreign = tuple(replace(entry, foreign=True) for entry in applied)
    history = tuple(event | {"foreign": True} for event in history)
    return Ledger(transaction, foreign, history, (), tuple(dict.fromkeys((*follows, *offered))))


def _digest(content: Mapping[str, Any]) -> bytes:
    """Finds accidents. Anybody can make it: who wrote a ledger, the seal tells."""
    return sha256(json.dumps(content, sort_keys=True).encode()).digest()


FieldCheck: TypeAlias = Callable[[Any, str], Any]


def _entry(value: Any) -> LedgerEntry:
    if not isinstance(value, dict):
        raise ValueError("an entry is no object")
    if odd := set(value) ^ set(_FIELDS):
        if unknown := odd & set(value):
            raise ValueError(f"an entry has the unknown field {min(unknown)[:80]!r}")
        # Fields that came later may be absent.
        value = {"foreign": False, "roots": [], "signers": {}, "rounding": "", **value}
    return LedgerEntry(**{name: check(value[name], name) for name, check in _FIELDS.items()})


def _event(value: Any) -> dict[str, Any]:
    fields: dict[str, FieldCheck] = {"what": _event_kind, "when": _when, "pack_id": _sha256, "name": _name, "version": _version}
    if not isinstance(value, dict) or set(value) - {"foreign"} != set(fields):
        raise ValueError("a line of the history has other fields than nestpatch writes")
    # Of what came along with the model, that is written down too.
    more = {"foreign": True} if _flag(value.get("foreign", False), "foreign") else {}
    return {name: check(value[name], name) for name, check in fields.items()} | more


def _record(value: Any, what: str) -> TensorRecord:
    if not isinstance(value, dict) or set(value) != {"rows", "before", "after", "retention"}:
        raise ValueError(f"{what} is no record of a tensor")
    rows, retention = value["rows"], value["retention"]
    if type(rows) is not int or not 0 < rows < 1 << 40:
        raise ValueError(f"{what} has {str(rows)[:40]} rows")
    if retention is not None and (type(retention) not in (int, float) or not math.isfinite(retention)):
        raise ValueError(f"{what} has the retention {str(retention)[:40]}")
    return TensorRecord(rows, _sha256(value["before"], what), _sha256(value["after"], what), retention)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"{what} is no text of at most {MAX_TEXT} characters")
    return value


def _one_of(value: Any, what: str, pattern: re.Pattern[str], *, empty: bool = False) -> str:
    if not isinstance(value, str) or not (pattern.fullmatch(value) or (empty and not value)):
        raise ValueError(f"{what} is {str(value)[:80]!r}")
    return value


def _sha256(value: Any, what: str) -> str:
    return _one_of(value, what, PACK_ID)


def _when(value: Any, what: str) -> str:
    return _one_of(value, what, _WHEN)


def _name(value: Any, what: str) -> str:
    if problem := name_problem(_text(value, what)):
        raise ValueError(problem)
    return str(value)


def _version(value: Any, what: str) -> str:
    if problem := version_problem(_text(value, what)):
        raise ValueError(problem)
    return str(value)


def _strength(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= 2:
        raise ValueError(f"{what} is {str(value)[:40]}")
    return float(value)


def _flag(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{what} is neither true nor false")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is no list")
    return value


def _digests(value: Any, what: str) -> tuple[str, ...]:
    return tuple(_sha256(one, what) for one in _list(value, what))


def _mapping(value: Any, what: str, check: FieldCheck) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no object")
    return {_text(name, what): check(one, what) for name, one in value.items()}


def _event_kind(value: Any, what: str) -> str:
    if value not in EVENTS:
        raise ValueError(f"{what} is {str(value)[:80]!r}")
    return str(value)


_FIELDS: dict[str, FieldCheck] = {
    "pack_id": _sha256,
    "name": _name,
    "version": _version,
    "strength": _strength,
    "when": _when,
    "tool": _text,
    "transaction": lambda value, what: _one_of(value, what, TRANSACTION),
    "tensors": lambda value, what: _mapping(value, what, _record),
    "supersedes": _digests,
    "requires": _digests,
    "base_mismatch_allowed": _flag,
    "rounding": _text,
    "signers": lambda value, what: _mapping(value, what, _sha256),
    "roots": _digests,
    "foreign": _flag,
}


def write_ledger(state_dir: StateDir, ledger: Ledger, final: StateDir | None = None) -> None:
    """Replaces the ledger at once, sealed for the model at `final` if that is another place."""
    content = ledger.as_json()
    sealed = content | {"seal": seal("ledger", (final or state_dir).folder, bytes.fromhex(content["sha256"]))}
    data = (json.dumps(sealed, indent=1) + "\n").encode("utf-8")
    write_bytes(state_dir.ledger, data, overwrite=True, owner=state_dir.owner)
