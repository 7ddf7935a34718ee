"""The order of syncs that survives a power cut: everything that a step relies on is on disk before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.cases import digests
from tests.faults.interrupting import INTERRUPTIONS, MAIN, CaseOf, calls_of, interrupted_template, number_of, row_writes
from tests.faults.killer import Call, Killer, needs_shim

pytestmark = needs_shim


def synced_between(calls: list[Call], path: str, after: int, before: int) -> bool:
    """Whether a file or folder was synced after one call and before another."""
    return any(call.kind == "fsync" and call.path == path for call in calls[after : before - 1])


def last_change(calls: list[Call], path: str) -> int:
    """The number of the last call that wrote to a path."""
    return max(n for n, call in enumerate(calls, start=1) if call.path == path and call.kind in ("write", "create"))


@pytest.mark.parametrize("operation", MAIN)
def test_the_journal_is_durable_before_any_row(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    calls = calls_of(killer, case_of(operation), folder)
    first_row, written = row_writes(calls)[0], last_change(calls, ".nestpatch/journal")
    assert written < first_row
    assert synced_between(calls, ".nestpatch/journal", written, first_row)
    assert synced_between(calls, ".nestpatch", written, first_row)
    if operation == "apply":
        made = number_of(calls, "mkdir", ".nestpatch")
        assert synced_between(calls, "", made, first_row), "a power cut may lose the folder with the journal in it"


@pytest.mark.parametrize("operation", MAIN)
def test_everything_is_durable_before_the_commit(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    calls = calls_of(killer, case_of(operation), folder)
    commit = number_of(calls, "rename", "nestpatch.json")
    assert row_writes(calls)[-1] < commit
    written = {call.path for call in calls[: commit - 1] if call.kind == "write"} - {".nestpatch/journal"}
    assert len(written) >= 3
    for path in written:
        # The kept pack is written under another name, as is the ledger.
        assert synced_between(calls, path, last_change(calls, path), commit), f"{path} is not on disk"
    made = [n for n, call in enumerate(calls[:commit], start=1) if call.kind == "create" and call.path.endswith(".undo")]
    assert operation == "revert" or made
    for number in made:
        assert synced_between(calls, ".nestpatch", number, commit), "a power cut may lose the undo record's name"


@pytest.mark.parametrize("operation", MAIN)
def test_the_commit_is_durable_before_the_journal_goes(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    calls = calls_of(killer, case_of(operation), folder)
    commit, removal = number_of(calls, "rename", "nestpatch.json"), number_of(calls, "unlink", ".nestpatch/journal")
    assert synced_between(calls, "", commit, removal)
    # Undo records are removed after the commit, while the journal still names them.
    gone = [n for n, call in enumerate(calls, start=1) if call.kind == "unlink" and call.path.endswith(".undo")]
    assert all(n < removal and synced_between(calls, "", commit, n) for n in gone)
    assert operation == "apply" or gone
    assert operation == "apply" or synced_between(calls, ".nestpatch", removal, len(calls) + 1)


COPIES = {
    "export": ["export", "{model}", "{pack}", "--to", "safetensors", "-o", "{out}"],
    "apply": ["apply", "{model}", "{pack}", "-o", "{out}"],
}


@pytest.mark.parametrize("layout", ["bf16-sharded", "f32-single", "f16-named"])
@pytest.mark.parametrize("what", COPIES)
def test_a_new_model_is_durable_before_it_has_its_name(
    killer: Killer, case_of: CaseOf, folder: Path, what: str, layout: str
) -> None:
    """Every file of the copy, including other files and kept state, and every folder that they are in."""
    case = case_of("apply", layout)
    model, name = case.model(case.fresh(folder)), "out" if not case.inside else "out.safetensors"
    watched = folder.with_name("watched")
    watched.mkdir()
    words = {"{model}": str(model), "{pack}": str(case.pack), "{out}": str(watched / name)}
    calls = killer.calls([words.get(word, word) for word in COPIES[what]], watched, folder.with_name("calls"))
    commit = number_of(calls, "rename", name)
    made = {call.path for call in calls[: commit - 1] if call.kind in ("create", "write") and call.path.startswith(".out")}
    assert case.inside or len([path for path in made if path.endswith("config.json")]) == 1
    for path in made:
        # Files that are renamed inside are synced under their temporary names.
        assert synced_between(calls, path, last_change(calls, path), commit), f"{path} is not on disk"
    for inner in {str(Path(path).parent) for path in made} - {"."}:
        assert synced_between(calls, inner, last_name(calls, inner, commit), commit), f"the names in {inner} are not on disk"
    assert synced_between(calls, "", commit, len(calls) + 1)


def last_name(calls: list[Call], folder: str, before: int) -> int:
    """The number of the last call before another that changed which names are in a folder."""
    kinds = ("create", "rename", "unlink", "mkdir")
    return max(n for n, c in enumerate(calls[: before - 1], start=1) if c.kind in kinds and str(Path(c.path).parent) == folder)


def test_restored_rows_are_durable_before_the_journal_goes(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    case = case_of("upgrade")
    number = INTERRUPTIONS["all rows"][0](calls_of(killer, case, folder))
    template = interrupted_template(killer, case, folder, number)
    again = replace(case, template=template, args=lambda model: ["recover", str(model)])
    calls = calls_of(killer, again, folder)
    removal = number_of(calls, "unlink", ".nestpatch/journal")
    for name in digests(folder):
        assert synced_between(calls, name, last_change(calls, name), removal)
