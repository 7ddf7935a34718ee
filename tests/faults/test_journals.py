"""Journals that are damaged or another model's."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestpatch.errors import JournalError
from nestpatch.patcher.place import place_of
from nestpatch.patcher.recovery import recover_model
from tests.faults.interrupting import INTERRUPTIONS, CaseOf, calls_of, interrupted
from tests.faults.killer import Killer, needs_shim
from tests.helpers import tiny_checkpoint, tree_digest

pytestmark = needs_shim


@pytest.fixture
def journaled(killer: Killer, case_of: CaseOf, folder: Path) -> Path:
    """A model with a whole journal and half of its rows changed."""
    case = case_of("apply")
    return interrupted(killer, case, folder, INTERRUPTIONS["half the rows"][0](calls_of(killer, case, folder)))


def damages(journal: bytes) -> Iterator[tuple[str, bytes]]:
    """Journals whose writing was interrupted, or that the disk has lost bits of."""
    for length in (0, 1, 19, 20, 27, 28, 60, len(journal) // 2, len(journal) - 33, len(journal) - 32, len(journal) - 1):
        yield f"cut to {length}", journal[:length]
    for place in (0, 19, 20, 27, 28, 100, len(journal) // 2, len(journal) - 33, len(journal) - 32, len(journal) - 1):
        yield f"flipped at {place}", journal[:place] + bytes([journal[place] ^ 0x10]) + journal[place + 1 :]
    yield "longer", journal + b"\0"
    yield "zeros", bytes(len(journal))


def test_damaged_journal_counts_as_none(case_of: CaseOf, journaled: Path) -> None:
    """A journal that is not whole means that nothing was changed yet."""
    case, journal = case_of("apply"), place_of(journaled).journal.read_bytes()
    for what, data in damages(journal):
        case.fresh(journaled)
        place = place_of(journaled)
        place.folder.mkdir()
        place.journal.write_bytes(data)
        assert recover_model(journaled).action == "nothing was changed", what
        assert case.prove(journaled) is case.before, what


@pytest.mark.parametrize("other", ["other files", "other sizes", "same layout"])
def test_journal_of_another_model(killer: Killer, journaled: Path, tmp_path: Path, other: str) -> None:
    """It is refused, and neither the model nor the journal is touched."""
    kinds = {"other files": {"sharded": False}, "other sizes": {"sharded": True, "inter": 32}}
    model = tiny_checkpoint(tmp_path.resolve() / "other", seed=7, **kinds.get(other, {"sharded": True}))  # type: ignore[arg-type]
    shutil.copytree(place_of(journaled).folder, place_of(model).folder)
    before = tree_digest(model)
    with pytest.raises(JournalError):
        recover_model(model)
    end = killer.run(["verify", str(model)], model)
    assert (end.code, end.trouble) == (1, "")
    assert "journal" in end.err
    assert tree_digest(model) == before
