"""Opening a model, and ending the change of an interrupted process: it is rolled back, or it was committed already.

Read-only commands open a model with `open_model`, which writes nothing and reports an interrupted change. Commands that write,
and `recover`, end the change first, provided that its journal is confirmed: by the seal of this machine, or because the rows
that it would put back are, by their digests, the base or the result of packs that trusted keys signed.

Public: `open_model`, `require_settled`, `recover_model`, `Foreign`, `Recovery`; for commands that hold the lock also
`finish_or_roll_back`, `require_writable`, `remove_undo_records`, `remove_temporary_files`, `temporary_files`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from glob import escape
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import (
    ForeignJournalError,
    InPlaceError,
    InterruptedChangeError,
    JournalError,
    SignatureError,
    StateError,
    TrustError,
)
from nestpatch.formats.checkpoint import Checkpoint, IntArray
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher._journal import Journal, SavedRegion, open_journal, read_journal, remove_journal
from nestpatch.patcher._lock import kept_from_writers, locked
from nestpatch.patcher._rollback import check_fit, files_of, roll_back
from nestpatch.patcher.kept import judge_kept
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import PACK_ID, StateDir, state_dir_of
from nestpatch.rows import digest
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import VerifiedPack
from nestpatch.values import dataclass

_MOST_PACKS = 64
"""Kept packs that are read to confirm a journal, at most."""


class Foreign(str, Enum):
    """What to do with a journal that neither this machine's seal nor a signed pack confirms."""

    REFUSE = "refuse"
    ROLL_BACK = "roll-back"
    REMOVE = "remove"


@dataclass(frozen=True)
class Recovery:
    """How an interrupted change was ended."""

    action: str
    """"none", "rolled back", "finished", "nothing was changed" or "removed"."""
    proof: str = ""
    """Why rows were put back: whose seal, which packs, or that the user asked for it."""

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given."""
        return {"action": self.action, "proof": self.proof}


def open_model(path: str | Path) -> tuple[Checkpoint, StateDir]:
    """Opens a model for a read-only command. Writes nothing.

    Args:
        path: The model.

    Returns:
        The model, and where its state is.

    Raises:
        InterruptedChangeError: A journal of an interrupted change is left.
        BusyError: Another process is writing the model.
        StateError: Something else is in the place of the state.
        CheckpointError: The model cannot be read.
    """
    checkpoint, state_dir = open_checkpoint(path), state_dir_of(path)
    require_settled(state_dir, path)
    return checkpoint, state_dir


def require_settled(state_dir: StateDir, model: str | Path) -> None:
    """Checks that no change of a model was interrupted. Writes nothing.

    Args:
        state_dir: Where the state of the model is.
        model: The model, for messages.

    Raises:
        InterruptedChangeError: A journal is left.
        BusyError: The process that wrote the journal is still at work.
        StateError: Something else is in the place of the state.
    """
    state_dir.check_folder()
    if os.path.lexists(state_dir.journal):
        with kept_from_writers(state_dir):  # else the writer of the journal is still at work
            raise InterruptedChangeError(
                f"a change of {model} was interrupted: its journal {state_dir.journal} is still there",
                advice=f"`nestpatch recover {model}` ends it: rows are put back, unless the change was complete.",
            )


def recover_model(path: str | Path, foreign: Foreign = Foreign.REFUSE, policy: Policy | None = None) -> Recovery:
    """Ends an interrupted change of a model, if there is one.

    Args:
        path: The model.
        foreign: What to do with a journal that neither this machine's seal nor a signed pack confirms.
        policy: Whose signatures count; None means the policy of this user.

    Returns:
        How the change was ended.

    Raises:
        BusyError: Another process is writing the model.
        JournalError: The journal does not fit the model, or the change cannot be ended now.
        ForeignJournalError: The journal is not confirmed.
        InPlaceError: A file that would be written is a link, has other names or is read-only.
    """
    checkpoint, state_dir = open_checkpoint(path), state_dir_of(path)
    state_dir.check_folder()
    if not state_dir.folder.exists():
        return Recovery("none")
    with locked(state_dir):
        done = finish_or_roll_back(state_dir, checkpoint, foreign, policy, path)
        remove_temporary_files(state_dir, checkpoint)
        return done


def finish_or_roll_back(
    state_dir: StateDir,
    checkpoint: Checkpoint,
    foreign: Foreign = Foreign.REFUSE,
    policy: Policy | None = None,
    model: str | Path | None = None,
) -> Recovery:
    """Ends an interrupted transaction: finishes it if it was committed, otherwise rolls it back. The lock must be held.

    Args:
        state_dir: Where the state of the model is.
        checkpoint: The model.
        foreign: What to do with a journal that neither this machine's seal nor a signed pack confirms.
        policy: Whose signatures count; None means the policy of this user.
        model: The model as the user names it.

    Returns:
        How the transaction was ended.

    Raises:
        JournalError: The journal does not fit the model, or the change cannot be ended now.
        ForeignJournalError: The journal is not confirmed.
        InPlaceError: A file that would be written is a link, has other names or is read-only.
    """
    if not os.path.lexists(state_dir.journal):
        return Recovery("none")
    try:
        return _finish_or_roll_back(state_dir, checkpoint, foreign, policy, model)
    except OSError as error:
        raise JournalError(
            f"an interrupted change of {checkpoint.path} cannot be ended: {error.strerror or error} ({error.filename})",
            advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the files can be written again.",
        ) from error


def _finish_or_roll_back(
    state_dir: StateDir, checkpoint: Checkpoint, foreign: Foreign, policy: Policy | None, model: str | Path | None
) -> Recovery:
    removed = Recovery("removed", "the user asked for it; rows are as they were found")
    try:
        journal = read_journal(state_dir)
        if journal is None:
            remove_journal(state_dir.journal)
            return Recovery("nothing was changed")
        ledger = read_ledger(state_dir)
        # The journal of this machine was committed only if this machine wrote the ledger too. A foreign journal that the ledger
        # names is dropped: that writes no row.
        if journal.transaction == ledger.transaction and (ledger.sealed or not journal.ours):
            remove_undo_records(state_dir, journal.retires if journal.ours else ())
            remove_journal(state_dir.journal)
            return Recovery("finished")
        check_fit(journal, checkpoint)
    except JournalError:
        if foreign is not Foreign.REMOVE:
            raise
        remove_journal(state_dir.journal)
        return removed
    if foreign is Foreign.REMOVE and not journal.ours:
        remove_journal(state_dir.journal)
        return removed
    names = [region.tensor for region in journal.regions]
    require_writable(checkpoint, names)
    proof = "the seal of this machine" if journal.ours else _confirmation(state_dir, journal, policy, model)
    if not proof and foreign is Foreign.REFUSE:
        files = ", ".join(file.name for file in files_of(checkpoint, names)[:3])
        tensors = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
        raise ForeignJournalError(
            f"the journal {journal.path} was not written here, and no pack with a trusted signature confirms it. It would put "
            f"{sum(region.rows for region in journal.regions)} rows of {len(names)} tensors in {files} back: {tensors}"
        )
    roll_back(journal, checkpoint)
    # The undo records that a foreign journal names are not confirmed with its rows: they may be needed.
    remove_undo_records(state_dir, journal.makes if journal.ours else ())
    remove_journal(state_dir.journal)
    remove_temporary_files(state_dir, checkpoint)
    return Recovery("rolled back", proof or "the user asked for it")


def _confirmation(state_dir: StateDir, journal: Journal, policy: Policy | None, model: str | Path | None) -> str:
    """Names the signed packs that have all rows of a journal as their base or result. Empty if there are none."""
    packs = _signed_packs(state_dir, policy, model)
    used: set[str] = set()
    with open_journal(journal.path) as file:
        for region in journal.regions:
            rows = journal.row_numbers(file, region)
            confirmed = np.zeros(len(rows), bool)
            for pack in packs:
                covered = _covered(pack, journal, file, region, rows)
                if covered is not None:
                    confirmed[covered] = True
                    used.add(pack.label)
            if not confirmed.all():
                return ""
    return f"the signed digests of {', '.join(sorted(used))}"


def _signed_packs(state_dir: StateDir, policy: Policy | None, model: str | Path | None) -> list[Pack]:
    """The kept packs that enough trusted keys signed."""
    try:
        rules = load_policy() if policy is None else policy
    except TrustError:
        return []
    packs = []
    for file in sorted(state_dir.folder.glob("*.nest"))[:_MOST_PACKS]:
        if PACK_ID.fullmatch(file.stem):
            with suppress(SignatureError, StateError):
                outcome = judge_kept(state_dir, file.stem, rules, model)
                packs += [outcome.pack] if isinstance(outcome, VerifiedPack) else []
    return packs


def _covered(pack: Pack, journal: Journal, file: FileIO, region: SavedRegion, rows: IntArray) -> IntArray | None:
    """Positions of the region's rows that a pack confirms; None if it confirms no rows."""
    delta = next((delta for delta in pack if delta.name == region.tensor), None)
    if delta is None or not np.isin(delta.rows, rows).all():
        return None
    places = np.searchsorted(rows, delta.rows)
    found = digest(journal.content(file, region, slice(position, position + 1)) for position in places.tolist())
    named = (pack.manifest.base.tensors[delta.name].rows_sha256, pack.manifest.result[delta.name])
    return places.astype(np.int64) if found in named else None


def remove_undo_records(state_dir: StateDir, names: Sequence[str]) -> None:
    """Removes undo records that a transaction has made unneeded: it was committed without them, or its rows were put back.

    Call it while the journal is there, so that recovery repeats it after a crash. A record that cannot be removed, even at a
    second attempt, does no harm.

    Args:
        state_dir: Where the state of the model is.
        names: The records.
    """
    for name in (*names, *names):
        with suppress(OSError):
            state_dir.undo(name).unlink(missing_ok=True)


def remove_temporary_files(state_dir: StateDir, checkpoint: Checkpoint) -> None:
    """Removes temporary files of interrupted writes. The lock must be held.

    Undo records are never removed here: only the transaction that makes one unneeded removes it.

    Args:
        state_dir: Where the state of the model is.
        checkpoint: The model.
    """
    with suppress(OSError):
        for file in temporary_files(state_dir, checkpoint):
            file.unlink(missing_ok=True)


def temporary_files(state_dir: StateDir, checkpoint: Checkpoint) -> list[Path]:
    """Finds the temporary files that interrupted writes left.

    Args:
        state_dir: Where the state of the model is.
        checkpoint: The model.

    Returns:
        The files.

    Raises:
        OSError: A folder cannot be read.
    """
    # The names that files/atomic.py gives to files which replace others as a whole.
    patterns = [(state_dir.folder, ".*.tmp")]
    patterns += [(file.parent, f".{escape(file.name)}.????????.tmp") for file in (state_dir.ledger, *checkpoint.files)]
    found = dict.fromkeys(file for folder, pattern in patterns for file in folder.glob(pattern))
    return [file for file in found if not file.is_dir() or file.is_symlink()]


def require_writable(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Checks that the files with some tensors may be changed where they are.

    Args:
        checkpoint: The model.
        names: The tensors.

    Raises:
        InPlaceError: A file is a link, has other names, or cannot be written by this user.
    """
    for file in files_of(checkpoint, names):
        if file.is_symlink():
            raise InPlaceError(
                f"{file} is a link to {file.resolve()}, as in a Hub cache: changing it would change other models too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to replace the link with a copy first.",
            )
        if file.stat().st_nlink > 1:
            raise InPlaceError(
                f"{file} has another name elsewhere (a hard link): changing it would change that model too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to give the model its own copy first.",
            )
        if not os.access(file, os.R_OK | os.W_OK):
            raise InPlaceError(f"{file} cannot be written by this user")
