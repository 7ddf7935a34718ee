"""In-place changes killed at every system call.

Each time the model must open as exactly one of two states afterwards: the one before the command, or the one after it.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.state_dir import state_dir_of
from tests.faults.cases import digests
from tests.faults.interrupting import (
    INTERRUPTIONS,
    MAIN,
    CaseOf,
    calls_of,
    interrupted,
    interrupted_template,
    number_of,
    settle_all,
)
from tests.faults.killer import Fault, Killer, needs_shim
from tests.helpers import tree_digest

pytestmark = needs_shim

KILLS = {
    # (operation, layout, in the middle of writes) -> kill points, at least
    ("apply", "bf16-sharded", False): 50,
    ("apply", "bf16-sharded", True): 30,
    ("apply", "f32-single", False): 50,
    ("apply", "f16-named", False): 50,
    ("upgrade", "bf16-sharded", False): 75,
    ("upgrade", "bf16-sharded", True): 55,
    ("upgrade", "f32-single", False): 75,
    ("revert", "bf16-sharded", False): 38,
    ("revert", "bf16-sharded", True): 25,
    ("revert", "f16-named", False): 38,
    ("downgrade", "bf16-sharded", False): 45,
    ("stacked", "bf16-sharded", False): 70,
    ("detach", "bf16-sharded", False): 40,
    ("apply", "q8_0-gguf", False): 50,
    ("apply", "q8_0-gguf", True): 30,
    ("upgrade", "q8_0-gguf", False): 75,
    ("revert", "q8_0-gguf", False): 38,
    ("apply", "q8_0-own", False): 50,
    ("upgrade", "q8_0-own", True): 55,
    ("revert", "q8_0-own", False): 38,
    ("apply", "f16-gguf", False): 50,
    ("revert", "f16-gguf", False): 38,
    ("apply", "columns-onnx", False): 40,
    ("apply", "columns-onnx", True): 25,
    ("upgrade", "columns-onnx", False): 60,
    ("revert", "columns-onnx", False): 30,
    ("apply", "blocks-onnx", False): 50,
    ("apply", "blocks-onnx", True): 30,
    ("revert", "blocks-onnx", False): 38,
    ("apply", "inside-onnx", False): 40,
}


@pytest.mark.parametrize(("operation", "layout", "tear"), KILLS)
def test_killed_at_every_call(killer: Killer, case_of: CaseOf, folder: Path, operation: str, layout: str, tear: bool) -> None:
    case = case_of(operation, layout)
    kills = killer.kill_at_each(case.command, lambda: case.fresh(folder), tear=tear)
    states, torn = settle_all(case, "in the middle of write" if tear else "before call", kills)
    assert len(states) >= KILLS[operation, layout, tear]
    assert torn > 10, "kills that leave no half-changed file prove nothing"
    # There is one commit: kills before it lead to the old state, kills after it to the new one.
    assert states == sorted(states, reverse=True)
    assert set(states) == ({"before"} if tear else {"before", "after"})


def test_hundreds_of_kills() -> None:
    """Each test above checks its own number."""
    assert sum(KILLS.values()) >= 500
    assert {operation for operation, *_ in KILLS} >= set(MAIN)


@pytest.mark.parametrize(
    ("operation", "left"),
    [*itertools.product(["upgrade"], INTERRUPTIONS), *itertools.product(["apply", "revert"], ["all rows", "the commit"])],
)
def test_recovery_killed_at_every_call(killer: Killer, case_of: CaseOf, folder: Path, operation: str, left: str) -> None:
    case = case_of(operation)
    choose, end = INTERRUPTIONS[left]
    number = choose(calls_of(killer, case, folder))
    template = interrupted_template(killer, case, folder, number)
    again = replace(case, template=template, args=lambda model: ["recover", str(model)])
    for tear in (False, True) if left == "all rows" else (False,):
        kills = killer.kill_at_each(again.command, lambda: again.fresh(folder), tear=tear)
        # The template is not in the state before its command.
        states, _ = settle_all(replace(again, template=case.template), f"recovery from {left}, torn={tear}, at", kills)
        assert set(states) <= {end}
        assert tear or len(states) >= 3


@pytest.mark.parametrize("operation", MAIN)
def test_recovery_killed_again_and_again(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    """All on one model: each recovery gets one call further than the one before."""
    case = case_of(operation)
    interrupted(killer, case, folder, INTERRUPTIONS["all rows"][0](calls_of(killer, case, folder)))
    assert case.state_of(folder) is case.after, "all rows are written, the ledger is not"
    kills = killer.kill_at_each(lambda model: ["recover", str(model)], lambda: folder)
    assert len(list(kills)) > 10
    assert case.settle(folder) is case.before


@pytest.mark.parametrize("operation", MAIN)
def test_killed_while_rolling_back_after_an_error(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    """The ledger cannot be written; the command puts the rows back, and is killed while it does."""
    case = case_of(operation)
    last = number_of(calls_of(killer, case, folder), "rename", "nestpatch.json")
    full = Fault(fail_at=last, error=errno.ENOSPC)
    kills = killer.kill_at_each(case.command, lambda: case.fresh(folder), after=full)
    states, torn = settle_all(case, f"call {last} failed, killed before call", kills)
    assert set(states) == {"before"}
    assert torn > 10


@pytest.mark.parametrize("following", ["recover", "apply", "revert"])
def test_any_next_command_that_writes_makes_the_model_whole(
    killer: Killer, case_of: CaseOf, folder: Path, following: str
) -> None:
    case = case_of("upgrade")
    args = case.command(folder) if following == "apply" else [following, str(folder)]
    for number in range(1, len(calls_of(killer, case, folder)) + 1, 6):
        interrupted(killer, case, folder, number)
        end = killer.run(args, folder)
        assert (end.how, end.code, end.trouble) == ("ended", 0, ""), f"{following} after call {number}: {end}"
        if following == "revert":
            assert digests(folder) == case.original, f"reverted after call {number}"
        elif following == "apply":
            assert case.prove(folder) is case.after, f"applied again after call {number}"
        elif state_dir_of(folder).journal.exists():
            pytest.fail(f"{following} after call {number} left the journal")
        else:
            case.settle(folder)


@pytest.mark.parametrize("following", ["verify", "verify with a pack", "status", "diff", "dry run", "export"])
def test_no_command_that_looks_changes_an_interrupted_model(
    killer: Killer, case_of: CaseOf, folder: Path, tmp_path: Path, following: str
) -> None:
    """It reports the interrupted change and how to end it; the folder does not change by a byte."""
    case = case_of("upgrade")
    args = {
        "verify": ["verify", str(folder)],
        "verify with a pack": ["verify", str(folder), str(case.pack)],
        "status": ["status", str(folder)],
        "diff": ["diff", str(folder), str(case.template)],
        "dry run": [*case.command(folder), "--dry-run"],
        "export": ["export", str(folder), "--to", "safetensors", "-o", str(tmp_path / "out")],
    }[following]
    interruptions = 0
    for number in range(1, len(calls_of(killer, case, folder)) + 1, 6):
        interrupted(killer, case, folder, number)
        before, left = tree_digest(folder), state_dir_of(folder).journal.exists()
        interruptions += left
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        end = killer.run(args, folder)
        assert (end.how, end.trouble) == ("ended", ""), f"{following} after call {number}: {end}"
        assert tree_digest(folder) == before, f"{following} after call {number}"
        if left:
            assert end.code == 1, f"{following} after call {number}: {end}"
            assert "was interrupted" in end.err, f"{following} after call {number}: {end}"
            assert "nestpatch recover" in end.err, f"{following} after call {number}: {end}"
    assert interruptions > 5


@pytest.mark.parametrize(("first", "second"), [("apply", "upgrade"), ("upgrade", "revert"), ("revert", "apply")])
def test_killed_between_two_commands(killer: Killer, case_of: CaseOf, folder: Path, first: str, second: str) -> None:
    done, next_one = case_of(first), case_of(second)
    assert killer.run(done.command(done.fresh(folder)), folder).code == 0
    victim = killer.start(next_one.args(folder), folder, Fault(stop_at=1))
    assert victim.wait().stopped
    victim.kill()
    assert recover_model(folder).action == "none"
    assert done.settle(folder) is done.after
