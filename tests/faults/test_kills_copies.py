"""`apply -o` killed at every system call.

The source stays as it is, the copy is there whole or not at all, and the same command run again makes it and removes all that
the killed one left.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.state_dir import state_dir_of
from tests.faults.cases import LAYOUTS, convert, digests, write_packs
from tests.faults.killer import Fault, Killer, needs_shim
from tests.faults.making import (
    Making,
    assert_refused,
    calls_of,
    kills_of,
    make,
    names,
    settle_all,
    stopped_before,
)
from tests.helpers import tiny_checkpoint, tree_digest

pytestmark = needs_shim


def copying(killer: Killer, folder: Path, layout: str, *options: str) -> Making:
    """A model, and the command that copies it. `options`: "patched" for a model that has a pack already, or command options."""
    dtype, sharded, inside = LAYOUTS[layout]
    model = tiny_checkpoint(folder / "base", dtype=dtype, sharded=sharded, layers=1, hidden=32, inter=32)
    packs = write_packs(folder, model)
    if inside.endswith((".gguf", ".onnx")):
        convert(model, inside)
        (model / "model.safetensors").unlink()
    elif inside:
        (model / "model.safetensors").rename(model / inside)
    source, base = model / inside, digests(model / inside)
    if "patched" in options:
        apply_in_place(source, packs.one)
    in_one_file = inside and len(base) == 1
    target = model / f"new{source.suffix}" if in_one_file else folder / "new"
    pack = packs.two if "patched" in options else packs.one
    words = ["apply", str(source), str(pack), "-o", str(target), "--json", *(o for o in options if o.startswith("-"))]
    copy = target / inside if inside and not in_one_file else target
    if in_one_file:
        base = {".": base[inside]} if layout != "inside-onnx" else {target.name: base[inside]}
    return make(killer, folder, words, target, copy, base)


COPIES = {
    # (layout, option, in the middle of writes, only every n-th call) -> kill points, at least
    ("f16-named", "", False, 1): 35,
    ("f16-named", "", True, 1): 8,
    ("f16-named", "patched", False, 1): 55,
    ("f16-named", "patched", True, 2): 8,
    ("f32-single", "", False, 1): 28,
    ("bf16-sharded", "", False, 1): 35,
    ("bf16-sharded", "", True, 1): 8,
    ("bf16-sharded", "patched", False, 3): 18,
    ("bf16-sharded", "--hard-link", False, 1): 35,
    ("q8_0-gguf", "", False, 2): 17,
    ("q8_0-gguf", "patched", False, 3): 20,
    ("inside-onnx", "", False, 2): 13,
    ("columns-onnx", "", False, 2): 15,
    ("columns-onnx", "", True, 1): 5,
}


@pytest.mark.parametrize(("layout", "option", "tear", "every"), COPIES)
def test_a_copy_killed_at_every_call(killer: Killer, folder: Path, layout: str, option: str, tear: bool, every: int) -> None:
    making = copying(killer, folder, layout, *filter(None, [option]))
    states = settle_all(killer, making, kills_of(killer, making, tear=tear, every=every))
    assert len(states) >= COPIES[layout, option, tear, every]
    # The copy gets its name at one moment: kills before it leave no target, kills after it leave all of it.
    assert states == sorted(states, reverse=True)
    assert set(states) == {"nothing"} if tear else set(states) <= {"all", "nothing"} and "nothing" in states
    assert every > 1 or tear or "all" in states


def test_hundreds_of_kills() -> None:
    """Each test above checks its own number."""
    assert sum(COPIES.values()) >= 280


@pytest.mark.parametrize(("layout", "option"), [("f16-named", ""), ("bf16-sharded", "")])
def test_the_second_attempt_is_killed_too(killer: Killer, folder: Path, layout: str, option: str) -> None:
    """The second attempt removes what the first one left, and is killed at each call that does so. The third makes the copy."""
    making = copying(killer, folder, layout, *filter(None, [option]))
    calls = calls_of(killer, making)
    named = [number for number, call in enumerate(calls, start=1) if call.kind == "rename" and is_final(call.path, making)]
    assert len(named) == (1 if making.target.is_dir() else 3), "state folder, ledger and file, or the directory"
    killed = 0
    for first in dict.fromkeys([named[0] // 2, *named]):
        for second in range(1, 14):
            stopped_before(killer, making, first)
            victim = killer.start(making.command, making.folder, Fault(second))
            assert victim.wait().stopped
            victim.kill()
            killed += 1
            assert making.check_retry(killer, thorough=second == 1) == "nothing", f"killed at {first}, then at {second}"
    assert killed >= 20


def test_an_export_to_the_place_of_a_killed_copy_gets_none_of_its_state(killer: Killer, folder: Path) -> None:
    """The copy was killed when its state had its name, and its file had not."""
    making = copying(killer, folder, "f16-named")
    calls = calls_of(killer, making)
    name = making.target.relative_to(folder).as_posix()
    stopped_before(killer, making, next(n for n, c in enumerate(calls, start=1) if (c.kind, c.path) == ("rename", name)))
    assert state_dir_of(making.target).ledger.exists()
    end = killer.run(["export", making.command[1], "--to", "safetensors", "-o", str(making.target)], folder)
    assert (end.code, end.trouble) == (0, ""), end
    assert sorted(names(folder)) == sorted([*tree_digest(making.template), name])


def is_final(path: str, making: Making) -> bool:
    """Whether a call gives something its final name."""
    return ".tmp" not in path and path.startswith(str(making.target.parent.relative_to(making.folder)).removeprefix("."))


@pytest.mark.parametrize("layout", ["f16-named", "bf16-sharded"])
def test_of_two_processes_that_copy_to_one_place_one_wins(killer: Killer, folder: Path, layout: str) -> None:
    """One is stopped at each of its calls in turn; then the other starts and runs to its end, and the first continues."""
    making = copying(killer, folder, layout)
    winners = []
    for number in range(1, len(calls_of(killer, making)) + 1):
        making.fresh()
        first = killer.start(making.command, making.folder, Fault(number))
        assert first.wait().stopped
        second = killer.run(making.command, making.folder)
        first.go_on()
        ends = [first.wait(), second]
        assert sorted(end.code for end in ends) == [0, 1], f"stopped at {number}: {ends}"
        winners.append(0 if ends[0].code == 0 else 1)
        assert_refused(ends[1 - winners[-1]])
        assert names(making.folder) == making.names, f"stopped at {number}"
        making.check_source()
        making.check_target()
    # The first to name the copy wins, whichever began first.
    assert winners == sorted(winners, reverse=True)
    assert set(winners) == {0, 1}


def temporary_folders(making: Making) -> list[Path]:
    return list(making.target.parent.glob(f".{making.target.name}.*.tmp"))


def test_what_a_living_process_writes_is_not_swept(killer: Killer, folder: Path) -> None:
    """Three processes: one lives and is stopped, one was killed, and the third removes what the killed one left."""
    making = copying(killer, folder, "f16-named")
    number = len(calls_of(killer, making)) // 2
    making.fresh()
    living = killer.start(making.command, making.folder, Fault(number))
    assert living.wait().stopped
    its = set(names(making.folder))
    dead = killer.start(making.command, making.folder, Fault(number))
    assert dead.wait().stopped
    dead.kill()
    assert len(temporary_folders(making)) == 2
    third = killer.start(making.command, making.folder, Fault(number))
    assert third.wait().stopped
    third.kill()
    assert its < set(names(making.folder))
    assert len(temporary_folders(making)) == 2, "of the living process, and of the third, not of the second"
    living.go_on()
    assert living.wait().code == 0
    making.check_target()
    assert_refused(killer.run(making.command, making.folder))
    assert names(making.folder) == making.names
