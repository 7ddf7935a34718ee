"""Kills while the user's folder is written: the list of trusted keys and the key of this machine are complete or missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.machine import KEY_BYTES, KEY_FILE
from tests.faults.cases import write_packs
from tests.faults.fleet import new_fleet
from tests.faults.killer import Fault, Killer, needs_shim
from tests.helpers import tiny_checkpoint

pytestmark = needs_shim


@pytest.mark.parametrize("first", [True, False], ids=["the first key", "one more key"])
def test_trust_add_killed_at_every_call(killer: Killer, folder: Path, first: bool) -> None:
    fleet = new_fleet(killer, folder)
    other = folder / "other.pub"
    other.write_text((folder / "acme.pub").read_text(encoding="ascii"), encoding="ascii")
    fleet.keep()
    home, user = (folder / "new", "new") if first else (folder / "user", "user")
    words = ["trust", "add", str(other), "--name", "other", "--json"]
    before = [] if first else ["acme"]
    after, states = ["other"], []
    for number, _ in killer.kill_at_each(lambda _: words, fleet.fresh, home=home):
        home.mkdir(exist_ok=True)  # NESTPATCH_HOME has to be there for a command that only reads
        found = [key["name"] for key in fleet.answer(user, "trust", "list", "--json")["keys"]]
        assert found in (before, after), f"killed at {number}: {found}"
        states.append(found)
        fleet.answer(user, *words)
        assert [key["name"] for key in fleet.answer(user, "trust", "list", "--json")["keys"]] == after
        assert (home / "trust.json").stat().st_mode & 0o777 == 0o600
        assert not list(home.glob(".*.tmp")), "what the killed one left"
    assert len(states) >= 5
    assert before in states
    assert after in states


@pytest.mark.parametrize("tear", [False, True])
def test_the_first_use_of_the_machine_key_killed_at_every_call(
    killer: Killer, folder: Path, monkeypatch: pytest.MonkeyPatch, tear: bool
) -> None:
    """Only calls in the user's folder count; the change of the model that needed the key is rolled back or repeated."""
    monkeypatch.setenv("NESTPATCH_HOME", str(folder / "new"))
    fleet = new_fleet(killer, folder)
    fleet.keep()
    home = folder / "new"
    words = ["apply", str(fleet.model), str(fleet.pack("1.0.0")), "--in-place", "--json"]
    states = []
    for number in range(1, 100):
        fleet.fresh()
        home.mkdir(mode=0o700)
        victim = killer.start(words, home, Fault(number, tear), home=home)
        if not victim.wait().stopped:
            break
        victim.kill()
        states.append((home / KEY_FILE).exists())
        fleet.answer("new", *words)
        require_key(home)
        assert not read_ledger(state_dir_of(fleet.model)).applied[0].foreign, "the seal of the ledger is not valid"
        assert fleet.litter() == []
    assert len(states) >= (1 if tear else 6)
    assert states == sorted(states), "it is there from one moment on"


def require_key(home: Path) -> None:
    file = home / KEY_FILE
    assert len(bytes.fromhex(file.read_text(encoding="ascii"))) == KEY_BYTES
    assert file.stat().st_mode & 0o777 == 0o600


def test_two_processes_that_make_the_machine_key_end_with_one(
    killer: Killer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is stopped at each of its calls in the user's folder, even while it holds the lock; then the other starts."""
    home = folder / "home"
    monkeypatch.setenv("NESTPATCH_HOME", str(home))
    models = [tiny_checkpoint(folder / name, layers=1) for name in ("a", "b")]
    pack = write_packs(folder, models[0]).one
    for number in range(1, 100):
        fresh(models, home)
        commands = [["apply", str(model), str(pack), "--in-place", "--json"] for model in models]
        first = killer.start(commands[0], home, Fault(number), home=home)
        if not first.wait().stopped:
            break
        second = killer.start(commands[1], home, Fault(), home=home)
        first.go_on()
        ends = [first.wait(), second.wait()]
        assert [(end.code, end.trouble) for end in ends] == [(0, "")] * 2, f"stopped at {number}: {ends}"
        require_key(home)
        for model in models:
            assert not read_ledger(state_dir_of(model)).applied[0].foreign, (
                f"stopped at {number}: the seal in {model} is not valid"
            )
    assert number > 6


def fresh(models: list[Path], home: Path) -> None:
    """Models without state, and a home without a key."""
    for model in models:
        kept = model.with_name(f"{model.name}-kept")
        if not kept.exists():
            shutil.copytree(model, kept)
        shutil.rmtree(model)
        shutil.copytree(kept, model)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700)
