"""In-place changes on full and failing disks, on read-only files and on files that disappear."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.errors import NestpatchError
from nestpatch.patcher.inplace import apply_in_place, revert
from tests.faults.cases import Case, digests
from tests.faults.interrupting import INTERRUPTIONS, MAIN, CaseOf, calls_of, interrupted, interrupted_template
from tests.faults.killer import Fault, Killer, needs_shim
from tests.helpers import tree_digest

pytestmark = needs_shim


@pytest.mark.parametrize(("operation", "dead"), [("apply", False), ("upgrade", False), ("upgrade", True), ("revert", False)])
def test_a_failing_call_is_told_and_undone(killer: Killer, case_of: CaseOf, folder: Path, operation: str, dead: bool) -> None:
    """Whichever call fails: a message instead of a traceback, and a model in one of the two states."""
    case, failures = case_of(operation), []
    error = errno.EIO if dead else errno.ENOSPC
    for number in range(1, len(calls_of(killer, case, folder)) + 1):
        case.fresh(folder)
        end = killer.run(case.command(folder), folder, Fault(fail_at=number, error=error, dead=dead))
        said = end.err.strip().splitlines()[:3]
        try:
            assert not end.trouble, end.trouble
            assert end.code in (0, 1)
            if not dead:
                assert case.state_of(folder), f"left as neither state, said {said}"
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
    template = interrupted_template(killer, case, folder, number)
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
    """Runs an apply, upgrade or revert in this process; returns what it raised."""
    command = case.command(folder)
    try:
        if command[0] == "revert":
            revert(folder)
        else:
            apply_in_place(folder, command[2])
    except NestpatchError as error:
        return error
    return None


def read_only(folder: Path, what: str) -> None:
    """Makes all weight files, the last one, or the folder read-only."""
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
