"""The models that this user has patched: one small file beside the user's trusted keys.

It is a convenience and proves nothing: what is applied to a model is read from its own ledger. A change never fails because the
record cannot be written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.errors import NestpatchError, StateError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.files.reading import read_bounded
from nestpatch.patcher.ledger import LedgerEntry, read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.store import user_folder

FORMAT = "nestpatch-models/1"
_MOST_MODELS = 1000
"""Paths that are kept; the oldest are dropped first."""
_MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class PatchedModel:
    """A model that this user has patched, by its own ledger. `status` compares the rows."""

    model: Path
    """Absolute."""
    state: str
    """"patched", "base" (nothing is applied any more), "gone" (nothing is at the path), or "unreadable"."""
    applied: tuple[LedgerEntry, ...] = ()
    """Bottom first."""
    follows: tuple[str, ...] = ()
    """The channels that its updates come from."""
    problem: str = ""
    """Why its ledger cannot be read; empty where it can."""

    def as_json(self) -> dict[str, Any]:
        """The model for `--json`."""
        return {
            "model": str(self.model),
            "state": self.state,
            "applied": [entry.as_json() for entry in self.applied],
            "follows": list(self.follows),
            "problem": self.problem,
        }


def patched_models() -> tuple[PatchedModel, ...]:
    """The models that this user has patched in place or as a copy, the last one first.

    Only their ledgers are read. A model that is gone, or back at its base, is returned once more, then dropped from the record.

    Returns:
        One value per model.

    Raises:
        StateError: The record is broken.
        TrustError: This user has no folder for files of their own.
    """
    found = tuple(_describe(path) for path in _read())
    dropped = {str(one.model) for one in found if one.state in ("gone", "base")}
    if dropped:
        with suppress(NestpatchError, OSError):
            _change(lambda known: [path for path in known if path not in dropped])
    return found


def record(model: str | Path) -> None:
    """Lists a model that was changed, before all others. Does nothing where that fails.

    Args:
        model: Its path.
    """
    path = os.path.abspath(model)
    with suppress(NestpatchError, OSError, ValueError):
        ledger = read_ledger(state_dir_of(path))
        first = [path] if ledger.applied or ledger.follows else []
        if first or _file().exists():
            _change(lambda known: first + [other for other in known if other != path])


def _change(edit: Callable[[list[str]], list[str]]) -> None:
    """Changes the list under its lock."""
    user_folder(existing=True).mkdir(mode=0o700, parents=True, exist_ok=True)
    file = _file()
    with exclusive(file.with_suffix(".lock")):
        sweep_writes(file)
        known = _read()
        models = edit(known)[:_MOST_MODELS]
        if models != known:
            # Escapes represent file names that are not valid text.
            data = json.dumps({"format": FORMAT, "models": models}, indent=1) + "\n"
            # The list before this change would do after a power cut.
            write_bytes(file, data.encode("ascii"), overwrite=True, mode=0o600, sync=False)


def _file() -> Path:
    return user_folder() / "models.json"


def _read() -> list[str]:
    try:
        data = read_bounded(_file(), _MAX_BYTES, follow=False, error=StateError)
    except FileNotFoundError:
        return []
    try:
        value = json.loads(data)
        models = value["models"]
        if value["format"] != FORMAT or not isinstance(models, list) or not all(isinstance(path, str) for path in models):
            raise ValueError(f"expected the format {FORMAT!r} and a list of paths")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        advice = f"Remove {_file()}: models are listed again when they are next changed."
        raise StateError(f"the list of patched models {_file()} is broken: {error}", advice=advice) from error
    return models


def _describe(path: str) -> PatchedModel:
    model = Path(path)
    if not os.path.lexists(model):
        return PatchedModel(model, "gone")
    try:
        ledger = read_ledger(state_dir_of(model))
    except (NestpatchError, OSError, ValueError) as error:
        return PatchedModel(model, "unreadable", problem=str(error))
    state = "patched" if ledger.applied or ledger.follows else "base"
    return PatchedModel(model, state, ledger.applied, ledger.follows)
