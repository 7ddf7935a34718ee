"""What is beside a model: undo records that are missing, and files that interrupted commands left."""

from __future__ import annotations

from nestpatch.errors import StateError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.health.checks import Check, Health
from nestpatch.patcher.held import layers_of
from nestpatch.patcher.kept import load_packs
from nestpatch.patcher.ledger import LedgerEntry
from nestpatch.patcher.recovery import temporary_files
from nestpatch.patcher.state_dir import StateDir


def undo_check(state_dir: StateDir, entry: LedgerEntry) -> Check:
    """Whether an applied pack can be undone: its kept copy and its undo record are there and whole.

    Args:
        state_dir: Where the state of the model is.
        entry: The applied pack.

    Returns:
        The check.
    """
    try:
        layers_of(state_dir, (entry,), load_packs(state_dir, (entry,)))
    except StateError as error:
        detail = f"{entry.label} cannot be reverted here: {error}"
        return Check("undo", Health.WARNING, detail, "Keep a copy of the base: it is the only way back.", entry.label)
    return Check("undo", Health.OK, f"the undo record of {entry.label} is there", pack=entry.label)


def leftovers_check(state_dir: StateDir, checkpoint: Checkpoint) -> Check:
    """Whether interrupted commands left temporary files.

    Args:
        state_dir: Where the state of the model is.
        checkpoint: The model.

    Returns:
        The check.
    """
    try:
        files = temporary_files(state_dir, checkpoint)
    except OSError as error:
        return Check("leftovers", Health.NOT_CHECKED, f"the folder cannot be read: {error.strerror or error}")
    if not files:
        return Check("leftovers", Health.OK, "no temporary files of interrupted commands")
    names = ", ".join(file.name for file in files[:3]) + (", .." if len(files) > 3 else "")
    detail = f"{len(files)} temporary files of interrupted commands: {names}"
    return Check("leftovers", Health.WARNING, detail, "nestpatch recover MODEL removes them.")
