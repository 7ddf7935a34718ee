"""Journals that are damaged or belong to another model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestpatch.errors import ForeignJournalError, JournalError
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.recovery import Foreign, recover_model
from nestpatch.patcher.state_dir import state_dir_of
from tests.faults.cases import digests
from tests.faults.interrupting import INTERRUPTIONS, CaseOf, calls_of, interrupted
from tests.faults.killer import Killer, needs_shim
from tests.helpers import tiny_checkpoint, tree_digest

pytestmark = needs_shim


@pytest.fixture
def journaled(killer: Killer, case_of: CaseOf, folder: Path) -> Path:
    """A model with a complete journal and half of its rows changed."""
    case = case_of("apply")
    return interrupted(killer, case, folder, INTERRUPTIONS["half the rows"][0](calls_of(killer, case, folder)))


def damages(journal: bytes) -> Iterator[tuple[str, bytes]]:
    """Journals whose writing was interrupted, or in which bits were lost."""
    for length in (0, 1, 19, 20, 27, 28, 60, len(journal) // 2, *(len(journal) - left for left in (65, 64, 33, 32, 1))):
        yield f"cut to {length}", journal[:length]
    for at in (0, 19, 20, 27, 28, 100, len(journal) // 2, len(journal) - 65, len(journal) - 64, len(journal) - 33):
        yield f"flipped at {at}", journal[:at] + bytes([journal[at] ^ 0x10]) + journal[at + 1 :]
    yield "longer", journal + b"\0"
    yield "zeros", bytes(len(journal))


def test_damaged_journal_counts_as_none(case_of: CaseOf, journaled: Path) -> None:
    """An incomplete journal means that nothing was changed."""
    case, journal = case_of("apply"), state_dir_of(journaled).journal.read_bytes()
    for what, data in damages(journal):
        case.fresh(journaled)
        state_dir = state_dir_of(journaled)
        state_dir.folder.mkdir()
        state_dir.journal.write_bytes(data)
        assert recover_model(journaled).action == "nothing was changed", what
        assert case.prove(journaled) is case.before, what


@pytest.mark.parametrize("at", [1, 32])
def test_a_journal_whose_seal_is_damaged_is_foreign(case_of: CaseOf, journaled: Path, at: int) -> None:
    """It is complete, so it may be the only copy of the rows: it is neither carried out nor removed without a request."""
    case, state_dir = case_of("apply"), state_dir_of(journaled)
    journal = bytearray(state_dir.journal.read_bytes())
    journal[-at] ^= 0x10
    state_dir.journal.write_bytes(journal)
    before = tree_digest(journaled)
    for act in (lambda: recover_model(journaled), lambda: apply_in_place(journaled, case.pack)):
        with pytest.raises(ForeignJournalError, match=r"It would put \d+ rows of 4 tensors"):
            act()
        assert tree_digest(journaled) == before
    done = recover_model(journaled, Foreign.ROLL_BACK)
    assert (done.action, done.proof) == ("rolled back", "the user asked for it")
    assert digests(journaled) == case.before.weights
    assert not state_dir.journal.exists()
    assert list(state_dir.folder.glob("*.undo")), "what a foreign journal claims to have made stays"


def test_a_copied_folder_has_a_foreign_journal(case_of: CaseOf, journaled: Path, tmp_path: Path) -> None:
    """The seal is for one path. The request of the user is carried out: roll back, or remove and leave the rows as they are."""
    case, results = case_of("apply"), {}
    for what in (Foreign.ROLL_BACK, Foreign.REMOVE):
        copy = Path(shutil.copytree(journaled, tmp_path.resolve() / what.value))
        with pytest.raises(ForeignJournalError):
            recover_model(copy)
        assert recover_model(copy, what).action == {"roll-back": "rolled back", "remove": "removed"}[what.value]
        assert not state_dir_of(copy).journal.exists()
        results[what] = digests(copy)
    assert results[Foreign.ROLL_BACK] == case.before.weights
    assert results[Foreign.REMOVE] not in (case.before.weights, case.after.weights)


@pytest.mark.parametrize("other", ["other files", "other sizes", "same layout"])
def test_journal_of_another_model(killer: Killer, journaled: Path, tmp_path: Path, other: str) -> None:
    """It is refused, and neither the model nor the journal is touched."""
    kinds = {"other files": {"sharded": False}, "other sizes": {"sharded": True, "inter": 32}}
    model = tiny_checkpoint(tmp_path.resolve() / "other", seed=7, **kinds.get(other, {"sharded": True}))  # type: ignore[arg-type]
    shutil.copytree(state_dir_of(journaled).folder, state_dir_of(model).folder)
    before = tree_digest(model)
    with pytest.raises(JournalError):
        recover_model(model)
    end = killer.run(["verify", str(model)], model)
    assert (end.code, end.trouble) == (1, "")
    assert "journal" in end.err
    assert tree_digest(model) == before
