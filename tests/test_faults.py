"""In-place changes under fire: a process killed at every system call, full and dying disks, files that vanish, two writers.

Each time the model must open as exactly one of two states afterwards: the one before the command, or the one after it.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.errors import JournalError, NestpatchError
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.place import place_of
from nestpatch.patcher.recovery import recover_model
from tests.faults.cases import Case, digests, make_case
from tests.faults.killer import Call, Fault, Killer, build_shim, compiler
from tests.helpers import tiny_checkpoint, tree_digest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the shim that counts system calls is for Linux"),
    pytest.mark.skipif(compiler() is None, reason="no C compiler to build the shim that counts system calls"),
]

CaseOf = Callable[[str, str], Case]

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
MAIN = ("apply", "upgrade", "revert")


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(build_shim(tmp_path_factory.mktemp("shim")))
    yield killer
    killer.close()


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """(operation, layout) -> its case, built once."""
    known: dict[tuple[str, str], Case] = {}

    def find(operation: str, layout: str = "bf16-sharded") -> Case:
        if (operation, layout) not in known:
            folder = tmp_path_factory.mktemp(f"{operation}-{layout}").resolve()
            known[operation, layout] = make_case(folder, operation, layout)
        return known[operation, layout]

    return find


@pytest.fixture(autouse=True)
def _lazy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process recovers hundreds of models, and no power cut is to be survived here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a copy of a template goes."""
    return tmp_path.resolve() / "model"


def calls_of(killer: Killer, case: Case, folder: Path) -> list[Call]:
    """What the command of a case does, call by call."""
    return killer.calls(case.command(case.fresh(folder)), folder, folder.with_name("calls"))


def number_of(calls: list[Call], kind: str, path: str) -> int:
    """The number of the first call of that kind to that path."""
    return next(n for n, call in enumerate(calls, start=1) if call.kind == kind and call.path == path)


def row_writes(calls: list[Call]) -> list[int]:
    """The numbers of the calls that write rows."""
    return [
        n for n, call in enumerate(calls, start=1) if call.kind == "write" and call.path.endswith((".safetensors", ".gguf"))
    ]


def interrupted(killer: Killer, case: Case, folder: Path, number: int) -> Path:
    """A model whose command was killed before a call."""
    case.fresh(folder)
    victim = killer.start(case.command(folder), folder, Fault(number))
    assert victim.wait().stopped
    victim.kill()
    return folder


def settle_all(case: Case, what: str, kills: Iterator[tuple[int, Path]]) -> tuple[list[str], int]:
    """Settles every killed model: (states in the order of the kills, how many were in neither state before recovery).

    Fails with the operation, the number, the mode and the digests of all that could not be settled.
    """
    states, torn, failures = [], 0, []
    for number, folder in kills:
        torn += case.state_of(folder) is None
        try:
            states.append(case.settle(folder).name)
        except (AssertionError, NestpatchError, OSError) as error:
            failures.append(f"{case.name}, {what} {number}: {error!r}")
    assert not failures, f"{len(failures)} of {len(failures) + len(states)} kills:\n" + "\n".join(failures[:20])
    assert digests(case.model(case.template)) == case.before.weights, "what the model links to was changed"
    return states, torn


@pytest.mark.parametrize(("operation", "layout", "tear"), KILLS)
def test_killed_at_every_call(killer: Killer, case_of: CaseOf, folder: Path, operation: str, layout: str, tear: bool) -> None:
    case = case_of(operation, layout)
    kills = killer.kill_at_each(case.command, lambda: case.fresh(folder), tear=tear)
    states, torn = settle_all(case, "in the middle of write" if tear else "before call", kills)
    assert len(states) >= KILLS[operation, layout, tear]
    assert torn > 10, "kills that leave no half-changed file prove nothing"
    # There is one commit: no kill before it leads to the new state, none after it to the old one.
    assert states == sorted(states, reverse=True)
    assert set(states) == ({"before"} if tear else {"before", "after"})


def test_hundreds_of_kills() -> None:
    """Each test above makes sure of its own number."""
    assert sum(KILLS.values()) >= 500
    assert {operation for operation, *_ in KILLS} >= set(MAIN)


INTERRUPTIONS = {
    # How the first kill left the model -> (call before which it came, the state that every recovery must end in)
    "half a journal": (lambda calls: number_of(calls, "write", ".nestpatch/journal"), "before"),
    "a journal only": (lambda calls: row_writes(calls)[0], "before"),
    "half the rows": (lambda calls: row_writes(calls)[len(row_writes(calls)) // 2], "before"),
    "all rows": (lambda calls: number_of(calls, "rename", "nestpatch.json"), "before"),
    "the commit": (lambda calls: number_of(calls, "unlink", ".nestpatch/journal"), "after"),
}


@pytest.mark.parametrize(
    ("operation", "left"),
    [*itertools.product(["upgrade"], INTERRUPTIONS), *itertools.product(["apply", "revert"], ["all rows", "the commit"])],
)
def test_recovery_killed_at_every_call(killer: Killer, case_of: CaseOf, folder: Path, operation: str, left: str) -> None:
    case = case_of(operation)
    choose, end = INTERRUPTIONS[left]
    number = choose(calls_of(killer, case, folder))
    template = interrupted(killer, case, folder.with_name("interrupted"), number)
    again = replace(case, template=template, args=lambda model: ["recover", str(model)])
    for tear in (False, True) if left == "all rows" else (False,):
        kills = killer.kill_at_each(again.command, lambda: again.fresh(folder), tear=tear)
        # The template is not in the state before its command.
        states, _ = settle_all(replace(again, template=case.template), f"recovery from {left}, torn={tear}, at", kills)
        assert set(states) <= {end}
        assert tear or len(states) >= 3


@pytest.mark.parametrize("operation", MAIN)
def test_recovery_killed_again_and_again(killer: Killer, case_of: CaseOf, folder: Path, operation: str) -> None:
    """On one and the same model: each recovery gets one call further than the one before."""
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


@pytest.mark.parametrize("following", ["recover", "verify", "status", "apply", "dry run", "revert"])
def test_any_next_command_makes_the_model_whole(killer: Killer, case_of: CaseOf, folder: Path, following: str) -> None:
    case = case_of("upgrade")
    commands = {"apply": case.command(folder), "dry run": [*case.command(folder), "--dry-run"]}
    args = commands.get(following, [following, str(folder)])
    for number in range(1, len(calls_of(killer, case, folder)) + 1, 6):
        interrupted(killer, case, folder, number)
        end = killer.run(args, folder)
        assert (end.how, end.code, end.trouble) == ("ended", 0, ""), f"{following} after call {number}: {end}"
        if following == "revert":
            assert digests(folder) == case.original, f"reverted after call {number}"
        elif following == "apply":
            assert case.prove(folder) is case.after, f"applied again after call {number}"
        elif place_of(folder).journal.exists():
            pytest.fail(f"{following} after call {number} left the journal")
        else:
            case.settle(folder)


@pytest.mark.parametrize(("first", "second"), [("apply", "upgrade"), ("upgrade", "revert"), ("revert", "apply")])
def test_killed_between_two_commands(killer: Killer, case_of: CaseOf, folder: Path, first: str, second: str) -> None:
    done, next_one = case_of(first), case_of(second)
    assert killer.run(done.command(done.fresh(folder)), folder).code == 0
    victim = killer.start(next_one.args(folder), folder, Fault(stop_at=1))
    assert victim.wait().stopped
    victim.kill()
    assert recover_model(folder).action == "none"
    assert done.settle(folder) is done.after


# Disks that fail.


@pytest.mark.parametrize(("operation", "dead"), [("apply", False), ("upgrade", False), ("upgrade", True), ("revert", False)])
def test_a_failing_call_is_told_and_undone(killer: Killer, case_of: CaseOf, folder: Path, operation: str, dead: bool) -> None:
    """Whichever call fails: a message instead of a traceback, and a model in one of the two states."""
    case, failures = case_of(operation), []
    error = errno.EIO if dead else errno.ENOSPC
    for number in range(1, len(calls_of(killer, case, folder)) + 1):
        case.fresh(folder)
        end = killer.run(case.command(folder), folder, Fault(fail_at=number, error=error, dead=dead))
        told = end.err.strip().splitlines()[:3]
        try:
            assert not end.trouble, end.trouble
            assert end.code in (0, 1)
            if not dead:
                assert case.state_of(folder), f"left as neither state, told {told}"
            state = case.settle(folder)
            assert end.code == 1 or state is case.after, f"ended well, but in the state {state.name}"
            assert state is case.before or "nothing was written" not in end.err, "says that nothing was written"
        except (AssertionError, NestpatchError, OSError) as problem:
            failures.append(f"{case.name}, call {number} fails with {errno.errorcode[error]}, dead={dead}: {problem!r}")
    assert not failures, f"{len(failures)} calls:\n" + "\n".join(failures[:20])


@pytest.mark.parametrize("dead", [False, True], ids=["one EIO", "EIO from there on"])
def test_a_failing_call_of_a_recovery_is_told(killer: Killer, case_of: CaseOf, folder: Path, dead: bool) -> None:
    case, failures = case_of("upgrade"), []
    number = INTERRUPTIONS["all rows"][0](calls_of(killer, case, folder))
    template = interrupted(killer, case, folder.with_name("interrupted"), number)
    again = replace(case, template=template, args=lambda model: ["recover", str(model)])
    for number in range(1, len(calls_of(killer, again, folder)) + 1):
        again.fresh(folder)
        end = killer.run(again.command(folder), folder, Fault(fail_at=number, error=errno.EIO, dead=dead))
        try:
            assert not end.trouble, end.trouble
            assert again.settle(folder) is case.before
        except (AssertionError, NestpatchError, OSError) as problem:
            failures.append(f"recovery, call {number} fails with EIO, dead={dead}: {problem!r}")
    assert not failures, f"{len(failures)} calls:\n" + "\n".join(failures[:20])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path.resolve() / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        pytest.skip("only root may mount a small tmpfs, and not everywhere")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("operation", MAIN)
def test_full_disk(case_of: CaseOf, small_disk: Path, operation: str) -> None:
    """With 0, 1, 2, .. free pages: refused with nothing changed, until there are enough."""
    case, refusals = case_of(operation), 0
    folder, filler = small_disk / "model", small_disk / "filler"
    for pages in itertools.count():
        case.fresh(folder)
        with open(filler, "wb", buffering=0) as file:
            file.write(bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - pages * 4096))
        end = run_here(case, folder)
        filler.unlink()
        if end is None:
            break
        assert "No space left" in str(end), f"{pages} pages free"
        assert case.prove(folder) is case.before, f"{pages} pages free"
        refusals += 1
    assert refusals >= 2
    assert case.settle(folder) is case.after


def run_here(case: Case, folder: Path) -> NestpatchError | None:
    """Runs an apply, upgrade or revert in this process: what it raised."""
    command = case.command(folder)
    try:
        if command[0] == "revert":
            revert(folder)
        else:
            apply_in_place(folder, command[2])
    except NestpatchError as error:
        return error
    return None


# Files that cannot be written, or are gone.


def read_only(folder: Path, what: str) -> None:
    """Takes the right to write from all weight files, from the last one, or from the folder."""
    files = {"all files": digests(folder), "one file": [max(digests(folder))], "the folder": []}[what]
    for name in files:
        (folder / name).chmod(0o444)
    if what == "the folder":
        folder.chmod(0o555)


@pytest.mark.parametrize("what", ["all files", "one file", "the folder"])
def test_read_only_model(killer: Killer, case_of: CaseOf, folder: Path, what: str) -> None:
    case = case_of("apply")
    read_only(case.fresh(folder), what)
    before = tree_digest(folder)
    end = killer.run(case.command(folder), folder, Fault(powerless=True))
    folder.chmod(0o755)
    assert (end.code, end.trouble) == (1, "")
    assert "cannot be written" in end.err or "cannot write" in end.err
    assert tree_digest(folder) == before


def test_read_only_model_with_a_journal(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    """The recovery is refused, and succeeds when the files may be written again."""
    case = case_of("apply")
    interrupted(killer, case, folder, INTERRUPTIONS["half the rows"][0](calls_of(killer, case, folder)))
    read_only(folder, "all files")
    before = tree_digest(folder)
    end = killer.run(["recover", str(folder)], folder, Fault(powerless=True))
    assert (end.code, end.trouble) == (1, "")
    assert tree_digest(folder) == before
    for name in digests(folder):
        (folder / name).chmod(0o644)
    assert case.settle(folder) is case.before


@pytest.mark.parametrize("put_back", ["as it was before", "as it vanished"])
@pytest.mark.parametrize("moment", ["the first call", "a journal only", "half the rows"])
@pytest.mark.parametrize("operation", MAIN)
def test_a_file_vanishes_under_way(
    killer: Killer, case_of: CaseOf, folder: Path, operation: str, moment: str, put_back: str
) -> None:
    case = case_of(operation)
    calls = calls_of(killer, case, folder)
    number = 1 if moment == "the first call" else INTERRUPTIONS[moment][0](calls)
    victim = killer.start(case.command(case.fresh(folder)), folder, Fault(stop_at=number))
    assert victim.wait().stopped
    name = max(digests(folder))
    (folder / name).rename(folder.with_name("vanished"))
    victim.go_on()
    end = victim.wait()
    source = folder.with_name("vanished") if put_back == "as it vanished" else case.template / name
    shutil.copyfile(source, folder / name)
    assert case.settle(folder) is case.before
    assert (end.code, end.trouble) == (1, "")


# Journals.


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


# Two writers.


@pytest.mark.parametrize("moment", ["the lock only", *INTERRUPTIONS])
def test_the_second_writer_is_told(killer: Killer, case_of: CaseOf, folder: Path, moment: str) -> None:
    """The first one waits in the middle of its work; the second changes nothing; then the first one ends well."""
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
    """Both start on a fresh model; the loser is held until the winner has the lock, and only then tries to get it."""
    case = case_of("apply")
    calls = calls_of(killer, case, folder)
    stop_at = number_of(calls, "create", ".nestpatch/journal") if winner_at == "journal" else row_writes(calls)[3]
    loser = killer.start(case.command(case.fresh(folder)), folder, Fault(stop_at=1))
    assert loser.wait().stopped
    winner = killer.start(case.command(folder), folder, Fault(stop_at=stop_at))
    assert winner.wait().stopped
    loser.go_on()
    lost = loser.wait()
    left = place_of(folder).lock.exists()
    winner.go_on()
    won = winner.wait()
    assert (lost.code, lost.trouble) == (1, "")
    assert "another nestpatch is writing" in lost.err
    assert (won.code, won.trouble) == (0, ""), won.err
    assert left, "the loser removed the winner's lock"
    assert case.settle(folder) is case.after


def test_a_failing_winner_leaves_the_next_one_alone(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    """The first one fails and tidies up what it made, when another one already works there."""
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
    """Nobody is held: one wins, the others are told or come later and find the work done."""
    case = case_of("apply")
    for attempt in range(12):
        case.fresh(folder)
        racers = [killer.start(case.command(folder), folder, Fault()) for _ in range(3)]
        ends = [racer.wait() for racer in racers]
        assert not [end.trouble for end in ends if end.crash], f"race {attempt}"
        assert {end.code for end in ends} <= {0, 1}
        told = ["another nestpatch is writing" in end.err for end in ends if end.code == 1]
        assert all(told), f"race {attempt}: {[end.err for end in ends]}"
        assert len(told) < len(ends), f"race {attempt}: nobody won"
        assert case.settle(folder) is case.after, f"race {attempt}"


# The order that a power cut needs: what is relied upon is on disk before.


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
    # What an undo needs goes last.
    assert all(n > removal for n, call in enumerate(calls, start=1) if call.kind == "unlink" and call.path.endswith(".undo"))
    assert operation == "apply" or synced_between(calls, ".nestpatch", removal, len(calls) + 1)


def test_restored_rows_are_durable_before_the_journal_goes(killer: Killer, case_of: CaseOf, folder: Path) -> None:
    case = case_of("upgrade")
    number = INTERRUPTIONS["all rows"][0](calls_of(killer, case, folder))
    template = interrupted(killer, case, folder.with_name("interrupted"), number)
    again = replace(case, template=template, args=lambda model: ["recover", str(model)])
    calls = calls_of(killer, again, folder)
    removal = number_of(calls, "unlink", ".nestpatch/journal")
    for name in digests(folder):
        assert synced_between(calls, name, last_change(calls, name), removal)
