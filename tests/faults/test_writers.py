"""Two commands that change the same model at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.patcher.state_dir import state_dir_of
from tests.faults.interrupting import INTERRUPTIONS, CaseOf, calls_of, number_of, row_writes
from tests.faults.killer import Fault, Killer, needs_shim
from tests.helpers import tree_digest

pytestmark = needs_shim


@pytest.mark.parametrize("moment", ["the lock only", *INTERRUPTIONS])
def test_the_second_writer_is_told(killer: Killer, case_of: CaseOf, folder: Path, moment: str) -> None:
    """The first stops in the middle of its work; the second changes nothing; then the first succeeds."""
    case = case_of("upgrade")
    calls = calls_of(killer, case, folder)
    choose, _ = INTERRUPTIONS.get(moment, (lambda calls: number_of(calls, "create", ".nestpatch/journal"), ""))
    victim = killer.start(case.command(case.fresh(folder)), folder, Fault(stop_at=choose(calls)))
    assert victim.wait().stopped
    before = tree_digest(folder)
    for args in (case.command(folder), ["revert", str(folder)], ["recover", str(folder)]):
        end = killer.run(args, folder)
        assert (end.code, end.trouble) == (1, ""), f"{args[0]} at {moment}"
        assert "another nestpatch is writing" in end.err, f"{args[0]} at {moment}"
        assert tree_digest(folder) == before, f"{args[0]} at {moment}"
    victim.go_on()
    assert victim.wait().code == 0
    assert case.settle(folder) is case.after


@pytest.mark.parametrize("winner_at", ["journal", "rows"])
def test_a_late_loser_leaves_the_winner_alone(killer: Killer, case_of: CaseOf, folder: Path, winner_at: str) -> None:
    """Both start on a new model; the loser is stopped until the winner has the lock, and only then tries to get it."""
    case = case_of("apply")
    calls = calls_of(killer, case, folder)
    stop_at = number_of(calls, "create", ".nestpatch/journal") if winner_at == "journal" else row_writes(calls)[3]
    loser = killer.start(case.command(case.fresh(folder)), folder, Fault(stop_at=1))
    assert loser.wait().stopped
    winner = killer.start(case.command(folder), folder, Fault(stop_at=stop_at))
    assert winner.wait().stopped
    loser.go_on()
    lost = loser.wait()
    left = state_dir_of(folder).lock.exists()
    winner.go_on()
    won = winner.wait()
    assert (lost.code, lost.trouble) == (1, "")
    assert "another nestpatch is writing" in lost.err
    assert (won.code, won.trouble) == (0, ""), won.err
    assert left, "the loser removed the winner's lock"
    assert case.settle(folder) is case.after


def test_a_failing_winner_leaves_the_next_one_alone(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    """The first fails and removes the folder that it made, while the second already works there."""
    case = case_of("apply")
    create = number_of(calls_of(killer, case, folder), "create", ".nestpatch/journal")
    wrong = case_of("apply", "f32-single").command(case.fresh(folder))
    tidying = number_of(killer.calls(wrong, folder, folder.with_name("calls"), code=1), "unlink", ".nestpatch/lock")
    assert tree_digest(folder) == tree_digest(case.template), "nothing came of it, and nothing is left"
    first = killer.start(wrong, folder, Fault(stop_at=tidying))
    assert first.wait().stopped
    second = killer.start(case.command(folder), folder, Fault(stop_at=create))
    stopped = second.wait()
    first.go_on()
    assert first.wait().code == 1
    if stopped.stopped:
        second.go_on()
        stopped = second.wait()
    busy = stopped.code == 1 and "another nestpatch is writing" in stopped.err
    assert busy or stopped.code == 0, stopped
    assert case.settle(folder).name == ("before" if busy else "after")


def test_a_race(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    """No process is stopped: one wins, and the others are refused or come later and find the work done."""
    case = case_of("apply")
    for attempt in range(12):
        case.fresh(folder)
        racers = [killer.start(case.command(folder), folder, Fault()) for _ in range(3)]
        ends = [racer.wait() for racer in racers]
        assert not [end.trouble for end in ends if end.crash], f"race {attempt}"
        assert {end.code for end in ends} <= {0, 1}
        losers = ["another nestpatch is writing" in end.err for end in ends if end.code == 1]
        assert all(losers), f"race {attempt}: {[end.err for end in ends]}"
        assert len(losers) < len(ends), f"race {attempt}: no process won"
        assert case.settle(folder) is case.after, f"race {attempt}"
