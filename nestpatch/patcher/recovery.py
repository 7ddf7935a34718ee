"""Opening a model, and ending what an interrupted process left behind: its change is rolled back, or was committed already.

Commands that only look open a model with `open_model`, which writes nothing: it says when a change was interrupted. Commands
that write, and `recover`, end the change first, if it is proven to be one of this model: by this machine's seal on the journal,
or because the rows that it would put back are, by their digests, the base or the result of packs that trusted keys signed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from glob import escape
from hashlib import sha256
from io import FileIO
from pathlib import Path

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
from nestpatch.patcher._journal import (
    Journal,
    Saved,
    check_fit,
    files_of,
    open_journal,
    read_journal,
    remove_journal,
    roll_back,
)
from nestpatch.patcher.kept import judge_kept
from nestpatch.patcher.ledger import Ledger, read_ledger
from nestpatch.patcher.state_dir import PACK_ID, StateDir, locked, require_idle, state_dir_of
from nestpatch.signing.trust import Policy, load_policy
from nestpatch.signing.verify import VerifiedPack

MOST_PACKS = 64
"""Kept packs that are looked at to confirm a journal."""


class Foreign(str, Enum):
    """What to do with a journal that nothing confirms."""

    REFUSE = "refuse"
    ROLL_BACK = "roll-back"
    REMOVE = "remove"


@dataclass(frozen=True)
class Recovery:
    """What a leftover journal led to."""

    action: str
    """"none", "rolled back", "finished", "nothing was changed" or "removed"."""
    proof: str = ""
    """Why rows were put back: whose seal, which packs, or that the user asked for it."""


def open_model(path: str | Path) -> tuple[Checkpoint, StateDir]:
    """Opens a model for a command that only looks. Writes nothing.

    Raises InterruptedChangeError when a journal is left, BusyError while another process writes the model, StateError when
    something else is in the place of what nestpatch keeps there, CheckpointError.
    """
    checkpoint, state_dir = open_checkpoint(path), state_dir_of(path)
    require_settled(state_dir, path)
    return checkpoint, state_dir


def require_settled(state_dir: StateDir, model: str | Path) -> None:
    """Raises InterruptedChangeError when a journal is left, BusyError while its process is at work. Writes nothing."""
    state_dir.check_folder()
    if os.path.lexists(state_dir.journal):
        require_idle(state_dir)
        raise InterruptedChangeError(
            f"a change of {model} was interrupted: its journal {state_dir.journal} is still there",
            advice=f"`nestpatch recover {model}` ends it: it puts the rows back, or finds that the change was complete.",
        )


def recover(
    state_dir: StateDir,
    checkpoint: Checkpoint,
    foreign: Foreign = Foreign.REFUSE,
    policy: Policy | None = None,
    model: str | Path | None = None,
) -> Recovery:
    """Ends an interrupted transaction: rolls it back, or finishes it when it was already committed. The lock must be held.

    Raises JournalError when the journal does not fit the model, ForeignJournalError when nothing confirms it, InPlaceError when
    a file that it would write has other names.
    """
    if not os.path.lexists(state_dir.journal):
        return Recovery("none")
    try:
        return _recover(state_dir, checkpoint, foreign, policy, model)
    except OSError as error:
        raise JournalError(
            f"an interrupted change of {checkpoint.path} cannot be ended: {error.strerror or error} ({error.filename})",
            advice="The journal holds all that is needed: run `nestpatch recover MODEL` when the files can be written again.",
        ) from error


def _recover(
    state_dir: StateDir, checkpoint: Checkpoint, foreign: Foreign, policy: Policy | None, model: str | Path | None
) -> Recovery:
    try:
        journal = read_journal(state_dir)
        if journal is None:
            remove_journal(state_dir.journal)
            return Recovery("nothing was changed")
        if _is_committed(journal, read_ledger(state_dir)):
            return _finish(state_dir, journal)
        check_fit(journal, checkpoint)
    except JournalError:
        if foreign is not Foreign.REMOVE:
            raise
        journal = None
    if foreign is Foreign.REMOVE and (journal is None or not journal.ours):
        remove_journal(state_dir.journal)
        return Recovery("removed", "the user asked for it; rows are as they were found")
    assert journal is not None  # noqa: S101 - raised above otherwise
    require_writable(checkpoint, [region.tensor for region in journal.regions])
    proof = "the seal of this machine" if journal.ours else _confirmation(state_dir, journal, policy, model)
    if not proof and foreign is Foreign.REFUSE:
        raise _refusal(journal, checkpoint)
    roll_back(journal, checkpoint)
    if journal.ours:
        # Of another journal rows are confirmed, or wanted; what it says of undo records is not: these may be needed.
        retire(state_dir, journal.makes)
    remove_journal(state_dir.journal)
    sweep(state_dir, checkpoint)
    return Recovery("rolled back", proof or "the user asked for it")


def _is_committed(journal: Journal, ledger: Ledger) -> bool:
    """Whether the ledger names the journal's change: of a journal that was written here, the ledger has to be from here too.

    A journal that came along with a ledger that names it is dropped, which writes no row.
    """
    return journal.transaction == ledger.transaction and (ledger.sealed or not journal.ours)


def _finish(state_dir: StateDir, journal: Journal) -> Recovery:
    if journal.ours:
        retire(state_dir, journal.retires)
    remove_journal(state_dir.journal)
    return Recovery("finished")


def _refusal(journal: Journal, checkpoint: Checkpoint) -> ForeignJournalError:
    names = [region.tensor for region in journal.regions]
    files = ", ".join(file.name for file in files_of(checkpoint, names)[:3])
    return ForeignJournalError(
        f"the journal {journal.path} was not written here, and no pack with a trusted signature confirms it. It would put "
        f"{journal.rows} rows of {len(names)} tensors in {files} back: {', '.join(names[:3])}{', ..' if len(names) > 3 else ''}"
    )


def _confirmation(state_dir: StateDir, journal: Journal, policy: Policy | None, model: str | Path | None) -> str:
    """The signed packs that name all rows of a journal as their base or result; empty when they do not."""
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
    """The kept packs that enough trusted keys have signed."""
    try:
        rules = load_policy() if policy is None else policy
    except TrustError:
        return []
    packs = []
    for file in sorted(state_dir.folder.glob("*.nest"))[:MOST_PACKS]:
        if PACK_ID.fullmatch(file.stem):
            with suppress(SignatureError, StateError):
                outcome = judge_kept(state_dir, file.stem, rules, model)
                packs += [outcome.pack] if isinstance(outcome, VerifiedPack) else []
    return packs


def _covered(pack: Pack, journal: Journal, file: FileIO, region: Saved, rows: IntArray) -> IntArray | None:
    """Which of a region's rows a pack confirms, as positions; None when it confirms none."""
    delta = next((delta for delta in pack if delta.name == region.tensor), None)
    if delta is None or not np.isin(delta.rows, rows).all():
        return None
    places = np.searchsorted(rows, delta.rows)
    state = sha256()
    for position in places.tolist():
        state.update(journal.content(file, region, slice(position, position + 1)).data)
    named = (pack.manifest.base.tensors[delta.name].rows_sha256, pack.manifest.result[delta.name])
    return places.astype(np.int64) if state.hexdigest() in named else None


def retire(state_dir: StateDir, names: Sequence[str]) -> None:
    """Removes undo records that a transaction has made unneeded: it was committed without them, or its rows were put back.

    Only while its journal is there: what a crash leaves of this, recovery ends. What cannot be removed, also not at a second
    attempt, is no harm.
    """
    for name in (*names, *names):
        with suppress(OSError):
            state_dir.undo(name).unlink(missing_ok=True)


def sweep(state_dir: StateDir, checkpoint: Checkpoint) -> None:
    """Removes temporary files of interrupted writes. The lock must be held.

    Undo records are never swept: only the transaction that makes one unneeded removes it.
    """
    # The temporary names of formats/atomic.py, for the files that are replaced as a whole.
    patterns = [(state_dir.folder, ".*.tmp")]
    patterns += [(file.parent, f".{escape(file.name)}.????????.tmp") for file in (state_dir.ledger, *checkpoint.files)]
    with suppress(OSError):
        for folder, pattern in patterns:
            for file in folder.glob(pattern):
                if not file.is_dir() or file.is_symlink():
                    file.unlink(missing_ok=True)


def require_writable(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Raises InPlaceError when a file with these tensors is a link, has other names, or cannot be written."""
    for file in files_of(checkpoint, names):
        if file.is_symlink():
            raise InPlaceError(
                f"{file} is a link to {file.resolve()}, as in a Hub cache: changing it would change other models too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to replace the link by a file of its own first.",
            )
        if file.stat().st_nlink > 1:
            raise InPlaceError(
                f"{file} has another name elsewhere (a hard link): changing it would change that model too",
                advice="Write a patched copy with -o OUTPUT, or pass --detach to give the model a file of its own first.",
            )
        if not os.access(file, os.R_OK | os.W_OK):
            raise InPlaceError(f"{file} cannot be written by this user")


def recover_model(path: str | Path, foreign: Foreign = Foreign.REFUSE, policy: Policy | None = None) -> Recovery:
    """Ends an interrupted transaction, if there is one.

    `foreign`: what to do with a journal that neither this machine's seal nor a signed pack confirms. `policy`: whose signatures
    count; None means that of this user.

    Raises BusyError while another process writes the model, JournalError when the journal does not fit it,
    ForeignJournalError when nothing confirms it.
    """
    checkpoint, state_dir = open_checkpoint(path), state_dir_of(path)
    state_dir.check_folder()
    if not state_dir.folder.exists():
        return Recovery("none")
    with locked(state_dir):
        done = recover(state_dir, checkpoint, foreign, policy, path)
        sweep(state_dir, checkpoint)
        return done
