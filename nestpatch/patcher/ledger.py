"""The ledger of a model: which packs were applied, when and with which tool, and what their rows held before and after.

The file is kept beside the model and travels with it. Every field is checked when the file is read. The seal of this machine
shows that nestpatch wrote the file here, for this model. A ledger without the seal only makes claims: the packs and the rows
have to confirm them.

Public: `Ledger`, `LedgerEntry`, `TensorRecord`, `read_ledger`, `write_ledger`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, replace
from functools import partial
from hashlib import sha256
from typing import Any, TypeAlias

from nestpatch.errors import LedgerError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded
from nestpatch.pack import name_problem, version_problem
from nestpatch.patcher.chain import Link
from nestpatch.patcher.state_dir import PACK_ID, TRANSACTION, StateDir
from nestpatch.signing.machine import is_ours, seal
from nestpatch.values import dataclass

FORMAT = "nestpatch-ledger/1"
_MAX_LEDGER = 64 << 20
"""Bytes. One entry of a model with 1,000 patched tensors takes 250 kB."""
_MAX_TEXT = 2048
"""Characters of a channel or of a tool's name."""


@dataclass(frozen=True)
class TensorRecord:
    """What the ledger records of one tensor of an applied pack."""

    rows: int
    """Number of touched rows."""
    before: str
    """SHA-256 of the touched rows before the pack was applied, hex."""
    after: str
    """SHA-256 of the same rows afterwards, hex."""
    retention: float | None = None
    """Share of the pack's change that remained after rounding to another type; None for rows of the pack's own type."""

    def as_json(self) -> dict[str, Any]:
        """The record for `--json`."""
        return {"rows": self.rows, "sha256_before": self.before, "sha256_after": self.after, "retention": self.retention}


@dataclass(frozen=True)
class LedgerEntry:
    """One applied pack."""

    pack_id: str
    """SHA-256 of the pack's bytes, hex."""
    name: str
    version: str
    strength: float
    when: str
    """Time of application, UTC, as 2026-11-25T08:00:00Z."""
    tool: str
    """Name and version of the program that applied the pack."""
    transaction: str
    """Part of the name of the undo record. Empty in the record of an exported file, which has none."""
    tensors: Mapping[str, TensorRecord]
    supersedes: tuple[str, ...] = ()
    """Pack ids."""
    requires: tuple[str, ...] = ()
    """Pack ids."""
    base_mismatch_allowed: bool = False
    rounding: str = ""
    """What quantized rows were computed from; empty if no rows are quantized."""
    signers: Mapping[str, str] = field(default_factory=dict)
    """Name -> key id of the trusted keys whose signatures were checked when the pack was applied."""
    roots: tuple[str, ...] = ()
    """Key ids of the root keys of the channel that the pack came from, oldest first."""
    foreign: bool = False
    """Whether the entry came with the model, so that packs and rows have to confirm it."""

    @property
    def retention(self) -> float | None:
        """The smallest retention of any tensor; None if no rows are quantized."""
        return min((record.retention for record in self.tensors.values() if record.retention is not None), default=None)

    @property
    def publishers(self) -> frozenset[str]:
        """Key ids of the signers and the channel's root keys; empty for an unsigned pack."""
        return frozenset((*self.signers.values(), *self.roots))

    @property
    def link(self) -> Link:
        """The entry as the version rules see it."""
        return Link(
            self.pack_id, self.name, self.version, self.strength, self.supersedes, self.requires, publishers=self.publishers
        )

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"

    @property
    def undo(self) -> str:
        """Name of the undo record."""
        return f"{self.transaction}-{self.pack_id[:16]}"

    def as_json(self) -> dict[str, Any]:
        """The applied pack for `--json`. The file of the ledger has other names.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "pack": self.label,
            "pack_id": self.pack_id,
            "name": self.name,
            "version": self.version,
            "strength": self.strength,
            "when": self.when,
            "tool": self.tool,
            "tensors": len(self.tensors),
            "retention": self.retention,
            "rounding": self.rounding,
            "supersedes": list(self.supersedes),
            "requires": list(self.requires),
            "base_mismatch_allowed": self.base_mismatch_allowed,
            "signers": dict(self.signers),
            "roots": list(self.roots),
            "foreign": self.foreign,
        }


@dataclass(frozen=True)
class Ledger:
    """Everything that is known to be applied to a model, and its history."""

    transaction: str = ""
    """The last transaction that was committed."""
    applied: tuple[LedgerEntry, ...] = ()
    """Bottom first."""
    history: tuple[Mapping[str, Any], ...] = ()
    """Past events, oldest first. Events that came with the model are marked "foreign"."""
    follows: tuple[str, ...] = ()
    """The channels that updates come from."""
    offered: tuple[str, ...] = ()
    """Channels of a ledger that came with the model. No user of this machine has agreed to them."""
    sealed: bool = field(default=False, compare=False)
    """Whether the file that the ledger was read from has the seal of this machine."""

    def content(self) -> dict[str, Any]:
        """Converts the ledger to the content of its file.

        Returns:
            A JSON object with a checksum, but without the seal.
        """
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
        """Adds a channel to those that the model follows.

        Args:
            channel: Address of the channel; empty for none.

        Returns:
            The new ledger; this one if there is no channel or it is followed already.
        """
        if not channel or channel in self.follows:
            return self
        offered = tuple(other for other in self.offered if other != channel)
        return replace(self, follows=(*self.follows, channel), offered=offered)

    def with_event(self, what: str, entry: LedgerEntry, when: str) -> Ledger:
        """Adds an event to the history.

        Args:
            what: "applied", "undone" or "found missing".
            entry: The pack that it happened to.
            when: Time, UTC, as 2026-11-25T08:00:00Z.

        Returns:
            The new ledger.
        """
        event = {"what": what, "when": when, "pack_id": entry.pack_id, "name": entry.name, "version": entry.version}
        return replace(self, history=(*self.history, event))


def read_ledger(state_dir: StateDir) -> Ledger:
    """Reads the ledger of a model.

    Args:
        state_dir: Where the state of the model is.

    Returns:
        The ledger; an empty one if there is no file. Without the seal of this machine, entries and events are marked foreign,
        and channels are offered instead of followed.

    Raises:
        LedgerError: The file is broken, has a newer format, or is not a regular file.
    """
    try:
        data = read_bounded(state_dir.ledger, _MAX_LEDGER, follow=False, error=LedgerError)
    except FileNotFoundError:
        return Ledger()
    try:
        return _parse(json.loads(data.decode("utf-8")), state_dir)
    except KeyError as error:
        raise LedgerError(f"the ledger {state_dir.ledger} is broken: missing field {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise LedgerError(f"the ledger {state_dir.ledger} is broken: {str(error)[:200]}") from error


def write_ledger(state_dir: StateDir, ledger: Ledger, final: StateDir | None = None) -> None:
    """Replaces the ledger file in one step, with the seal of this machine.

    Args:
        state_dir: Where the file is written.
        ledger: The new content.
        final: Where the state will be in the end, if that is another place: the seal is for there.

    Raises:
        OutputError: The file cannot be written.
    """
    content = ledger.content()
    sealed = content | {"seal": seal("ledger", (final or state_dir).folder, bytes.fromhex(content["sha256"]))}
    data = (json.dumps(sealed, indent=1) + "\n").encode("utf-8")
    write_bytes(state_dir.ledger, data, overwrite=True, owner=state_dir.owner)


def _digest(content: Mapping[str, Any]) -> bytes:
    """Detects accidents. It protects from no forger, unlike the seal."""
    return sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _parse(value: Any, state_dir: StateDir) -> Ledger:
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if value["format"] != FORMAT:
        raise LedgerError(
            f"the ledger {state_dir.ledger} has format {str(value['format'])[:80]!r}; this nestpatch reads {FORMAT!r}",
            advice="Upgrade nestpatch: pip install -U nestpatch",
        )
    found = str(value.pop("seal", ""))
    if value.pop("sha256") != _digest(value).hex():
        raise LedgerError(f"the ledger {state_dir.ledger} was changed by something other than nestpatch")
    transaction = _match(value["transaction"], "transaction", _TRANSACTION_OR_NONE)
    applied = _items(value["applied"], "applied", _entry)
    if len({entry.pack_id for entry in applied}) != len(applied):
        raise ValueError("a pack is applied twice")
    history = _items(value["history"], "history", _event)
    follows, offered = (_items(value.get(name, []), name, _text) for name in ("follows", "offered"))
    if is_ours("ledger", state_dir.folder, _digest(value), found):
        return Ledger(transaction, applied, history, follows, offered, sealed=True)
    foreign = tuple(replace(entry, foreign=True) for entry in applied)
    history = tuple(event | {"foreign": True} for event in history)
    return Ledger(transaction, foreign, history, (), tuple(dict.fromkeys((*follows, *offered))))


def _entry(value: Any, what: str) -> LedgerEntry:
    odd = set(_typed(value, what, dict)) ^ set(_ENTRY_FIELDS)
    if unknown := odd & set(value):
        raise ValueError(f"{what}: unknown field {min(unknown)[:80]!r}")
    # Older ledgers lack these fields.
    value = {"foreign": False, "roots": [], "signers": {}, "rounding": "", **value}
    return LedgerEntry(**{name: check(value[name], name) for name, check in _ENTRY_FIELDS.items()})


def _event(value: Any, what: str) -> dict[str, Any]:
    if set(_typed(value, what, dict)) - {"foreign"} != set(_EVENT_FIELDS):
        raise ValueError(f"{what}: an event has other fields than nestpatch writes")
    # Written down for events that came with the model.
    foreign = {"foreign": True} if _flag(value.get("foreign", False), "foreign") else {}
    return {name: check(value[name], name) for name, check in _EVENT_FIELDS.items()} | foreign


def _record(value: Any, what: str) -> TensorRecord:
    if not isinstance(value, dict) or set(value) != {"rows", "before", "after", "retention"}:
        raise ValueError(f"{what}: expected an object with rows, before, after and retention")
    rows, retention = value["rows"], value["retention"]
    if type(rows) is not int or not 0 < rows < 1 << 40:
        raise ValueError(f"{what}: {str(rows)[:40]} is not a number of rows")
    if retention is not None and (type(retention) not in (int, float) or not math.isfinite(retention)):
        raise ValueError(f"{what}: {str(retention)[:40]} is not a retention")
    return TensorRecord(rows, _sha256(value["before"], what), _sha256(value["after"], what), retention)


def _typed(value: Any, what: str, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{what}: expected {_KINDS[kind]}")
    return value


def _text(value: Any, what: str, problem_of: Callable[[str], str | None] | None = None) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise ValueError(f"{what}: expected text of at most {_MAX_TEXT} characters")
    if problem_of is not None and (problem := problem_of(value)):
        raise ValueError(problem)
    return value


def _match(value: Any, what: str, pattern: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{what}: unexpected value {str(value)[:80]!r}")
    return value


def _strength(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 < value <= 2:
        raise ValueError(f"{what}: {str(value)[:40]} is not over 0 and at most 2")
    return float(value)


def _items(value: Any, what: str, check: _FieldCheck) -> tuple[Any, ...]:
    return tuple(check(item, what) for item in _typed(value, what, list))


def _mapping(value: Any, what: str, check: _FieldCheck) -> dict[str, Any]:
    return {_text(name, what): check(item, what) for name, item in _typed(value, what, dict).items()}


_FieldCheck: TypeAlias = Callable[[Any, str], Any]
"""(value, name of the field) -> the value as a dataclass holds it. Raises ValueError, or KeyError for a missing field."""
_KINDS = {bool: "true or false", list: "a list", dict: "an object"}
_TRANSACTION_OR_NONE = re.compile(rf"(?:{TRANSACTION.pattern})?", re.ASCII)
_sha256 = partial(_match, pattern=PACK_ID)
_when = partial(_match, pattern=re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII))
_name = partial(_text, problem_of=name_problem)
_version = partial(_text, problem_of=version_problem)
_flag = partial(_typed, kind=bool)
_digests = partial(_items, check=_sha256)
_EVENT_FIELDS: dict[str, _FieldCheck] = {
    "what": partial(_match, pattern=re.compile("applied|undone|found missing")),
    "when": _when,
    "pack_id": _sha256,
    "name": _name,
    "version": _version,
}
_ENTRY_FIELDS: dict[str, _FieldCheck] = {
    "pack_id": _sha256,
    "name": _name,
    "version": _version,
    "strength": _strength,
    "when": _when,
    "tool": _text,
    "transaction": partial(_match, pattern=TRANSACTION),
    "tensors": partial(_mapping, check=_record),
    "supersedes": _digests,
    "requires": _digests,
    "base_mismatch_allowed": _flag,
    "rounding": _text,
    "signers": partial(_mapping, check=_sha256),
    "roots": _digests,
    "foreign": _flag,
}
