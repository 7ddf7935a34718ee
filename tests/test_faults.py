"""In-place changes under fire: a process killed at every system call, a full disk, a dead disk, and two writers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Case, make_case
from tests.faults.killer import Killer, build_shim, compiler

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the shim that counts system calls is for Linux"),
    pytest.mark.skipif(compiler() is None, reason="no C compiler to build the shim that counts system calls"),
]


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(build_shim(tmp_path_factory.mktemp("shim")))
    yield killer
    killer.close()


@pytest.fixture(autouse=True)
def lazy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process recovers hundreds of models, and no power cut is to be survived here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


CaseOf = Callable[[str, str], Case]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> CaseOf:
    """(operation, layout) -> its case, built once."""
    known: dict[tuple[str, str], Case] = {}

    def find(operation: str, layout: str) -> Case:
        if (operation, layout) not in known:
            folder = tmp_path_factory.mktemp(f"{operation}-{layout}").resolve()
            known[operation, layout] = make_case(folder, operation, layout)
        return known[operation, layout]

    return find


LAYOUT_OF = {
    "apply": ("bf16-sharded", "f32-single", "f16-named"),
    "upgrade": ("bf16-sharded", "f32-single"),
    "revert": ("bf16-sharded", "f32-single", "f16-named"),
    "downgrade": ("bf16-sharded",),
    "stacked": ("bf16-sharded",),
    "detach": ("bf16-sharded",),
}
import time

@pytest.mark.parametrize(("operation", "layout"), [(o, l) for o, ls in LAYOUT_OF.items() for l in ls])
def test_count(killer, case_of, operation, layout, tmp_path):
    t=time.time()
    case = case_of(operation, layout)
    t1=time.time()-t
    calls = killer.calls(case.command(case.fresh(tmp_path / "m")), tmp_path / "m", tmp_path / "log")
    t=time.time()
    for tear in (False, True):
        n=0; bad=0; seen=[]; neither=0
        for number, folder in killer.kill_at_each(case.command, lambda: case.fresh(tmp_path / "k"), tear=tear):
            n+=1
            neither += case.state_of(folder) is None
            try:
                seen.append(case.settle(folder).name)
            except AssertionError as e:
                bad+=1; print(number, tear, str(e)[:300])
        print(operation, layout, tear, n, bad, neither, seen.count("before"), seen.count("after"), time.time()-t, t1)
    if layout=="bf16-sharded":
        print("\n".join(map(str,calls)))
