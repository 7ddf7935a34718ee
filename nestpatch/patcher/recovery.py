"""Opening a model, and ending what an earlier process left behind: its change is rolled back, or was committed already."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from nestpatch.errors import JournalError
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.journal import read_transaction, remove_journal, roll_back
from nestpatch.patcher.ledger import Ledger, read_ledger
from nestpatch.patcher.place import Place, locked, place_of


@dataclass(frozen=True)
class Recovery:
    """What a leftover journal led to."""

    action: str
    """"none", "rolled back", "finished" or "nothing was changed"."""


def recover(place: Place, checkpoint: Checkpoint) -> Recovery:
    """Ends an interrupted transaction: rolls it back, or finishes it when it was already committed. The lock must be held.

    Raises JournalError when the journal does not fit the model.
    """
    try:
        return _recover(place, checkpoint)
    except OSError as error:
        raise JournalError(
            f"an interrupted change of {checkpoint.path} cannot be ended: {error.strerror or error} ({error.filename})",
            advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the files can be written again.",
        ) from error


def _recover(place: Place, checkpoint: Checkpoint) -> Recovery:
    action = "none"
    if place.journal.exists():
        transaction = read_transaction(place.journal)
        if transaction is None:
            action = "nothing was changed"
        elif transaction == read_ledger(place.ledger).transaction:
            action = "finished"
        else:
            roll_back(place.journal, checkpoint)
            action = "rolled back"
        remove_journal(place.journal)
    sweep(place, checkpoint, read_ledger(place.ledger))
    return Recovery(action)


def sweep(place: Place, checkpoint: Checkpoint, ledger: Ledger) -> None:
    """Removes undo records that no applied entry needs, and temporary files of interrupted writes. The lock must be held.

    What cannot be removed now is no harm: the next command tries again.
    """
    needed = {place.undo(entry.undo) for entry in ledger.applied}
    patterns = [(place.folder, "*.undo"), (place.folder, ".*.tmp")]
    # The temporary names of formats/atomic.py, for the files that are replaced as a whole.
    patterns += [(file.parent, f".{escape(file.name)}.????????.tmp") for file in (place.ledger, *checkpoint.files)]
    with suppress(OSError):
        for folder, pattern in patterns:
            for file in folder.glob(pattern):
                if file not in needed:
                    file.unlink(missing_ok=True)


def open_model(path: str | Path) -> tuple[Checkpoint, Place]:
    """Opens a model for any command. An interrupted transaction is rolled back or finished first.

    Raises BusyError while another process writes the model, CheckpointError, JournalError.
    """
    checkpoint, place = open_checkpoint(path), place_of(path)
    if place.journal.exists():
        with locked(place):
            recover(place, checkpoint)
    return checkpoint, place


def recover_model(path: str | Path) -> Recovery:
    """Ends an interrupted transaction, if there is one.

    Raises BusyError while another process writes the model, JournalError when the journal does not fit it.
    """
    checkpoint, place = open_checkpoint(path), place_of(path)
    if not place.folder.exists():
        return Recovery("none")
    with locked(place):
        return recover(place, checkpoint)
