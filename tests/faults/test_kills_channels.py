"""Commands of channels killed at every system call: pull, push, yank, update.

Readers see the channel as it was or as it will be, packs come with their signatures, no user's memory is damaged, and the same
command run again ends in the new state.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nestpatch.channels._memory import recall
from nestpatch.channels.listing import CHANNEL_FILE, parse
from nestpatch.errors import NestpatchError
from nestpatch.patcher.inplace import revert
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.state_dir import state_dir_of
from tests.faults.cases import Case, digests
from tests.faults.fleet import Fleet, new_fleet
from tests.faults.killer import Fault, Killer, needs_shim

pytestmark = needs_shim


@pytest.fixture
def fleet(killer: Killer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Gives this process the home of the user."""
    made = new_fleet(killer, folder)
    monkeypatch.setenv("NESTPATCH_HOME", str(made.home("user")))
    return made


def kills(fleet: Fleet, user: str, words: list[str], every: int = 1) -> Iterator[int]:
    """The numbers of the calls before which a user's command is killed; the whole folder is watched."""
    for number, _ in fleet.killer.kill_at_each(lambda _: words, fleet.fresh, home=fleet.home(user), every=every):
        yield number


def each(numbers: Iterator[int], check: Callable[[int], str]) -> list[str]:
    """Checks what each kill led to; fails with the numbers of all kills after which something was wrong."""
    states, failures = [], []
    for number in numbers:
        try:
            states.append(check(number))
        except (AssertionError, NestpatchError, OSError) as error:
            failures.append(f"kill {number}: {error!r}"[:1500])
    assert not failures, f"{len(failures)} of {len(failures) + len(states)} kills:\n" + "\n".join(failures[:20])
    return states


def test_a_pull_killed_at_every_call(fleet: Fleet) -> None:
    fleet.answer("publisher", *fleet.push("1.0.0"))
    (fleet.folder / "pulled").mkdir()
    fleet.keep()
    file = fleet.folder / "pulled" / "no-harm-1.0.0.nest"
    words = ["pull", fleet.place, "-o", str(file.parent), "--json"]

    def check(_: int) -> str:
        there = file.exists()
        if there:
            assert fleet.answer("user", "verify-signature", str(file), "--json")["verdict"] == "signed"
            assert file.read_bytes() == fleet.pack("1.0.0").read_bytes()
        fleet.answer("user", *words)
        assert fleet.answer("user", "verify-signature", str(file), "--json")["verdict"] == "signed"
        assert sorted(one.name for one in file.parent.iterdir()) == [file.name, f"{file.name}.sig"]
        assert fleet.litter() == []
        known = recall(fleet.place)
        assert known is not None
        assert known.seen.serial == 1
        return "there" if there else "nothing"

    states = each(kills(fleet, "user", words), check)
    assert len(states) >= 20
    assert states == sorted(states)
    assert set(states) == {"nothing", "there"}


PUBLISHING = {
    # Command -> what was published before, kill points, at least
    "first push": ([], 25),
    "push": (["1.0.0"], 25),
    "yank": (["1.0.0", "1.1.0"], 15),
}


@pytest.mark.parametrize("what", PUBLISHING)
def test_publishing_killed_at_every_call(fleet: Fleet, what: str) -> None:
    before, least = PUBLISHING[what]
    for version in before:
        fleet.answer("publisher", *fleet.push(version))
    fleet.keep()
    words = fleet.yank("1.1.0") if what == "yank" else fleet.push(["1.0.0", "1.1.0"][len(before)])
    old, new = {"first push": (None, "1.0.0"), "push": ("1.0.0", "1.1.0"), "yank": ("1.1.0", "1.0.0")}[what]
    serial = len(before)

    def check(number: int) -> str:
        seen = read_by_others(fleet)
        assert seen in (old, new), f"readers get {seen}"
        if seen and number % 3 == 1:
            assert wanted(fleet) == seen
        done = fleet.answer("publisher", *words)
        assert (done["latest"], done["serial"]) == (new, serial + 1), done
        assert read_by_others(fleet) == new
        assert fleet.litter() == []
        if number % 3 != 1:
            return "new" if seen == new else "old"
        assert wanted(fleet) == new, "what the user remembers of the channel fits the new one"
        # The publisher continues from its memory.
        assert fleet.answer("publisher", "renew", fleet.place, *fleet.key, "--json")["serial"] == serial + 2
        assert fleet.answer("publisher", *fleet.push("1.2.0"))["latest"] == "1.2.0"
        return "new" if seen == new else "old"

    states = each(kills(fleet, "publisher", words), check)
    assert len(states) >= least
    assert states == sorted(states, reverse=True), "the channel file is replaced at one moment"
    assert set(states) == {"old", "new"}


def read_by_others(fleet: Fleet) -> str | None:
    """The latest version of the channel, pulled by a new user; None if there is no channel."""
    (fleet.folder / "reader").mkdir(mode=0o700, exist_ok=True)
    end = fleet.run("reader", "pull", fleet.place, "-o", str(fleet.folder / "reader" / "x.nest"), "--allow-unsigned", "--json")
    for file in (fleet.folder / "reader").glob("x.nest*"):
        file.unlink()
    if end.code == 0:
        # And the channel's own list agrees with the files.
        channel = parse((fleet.folder / "channel" / CHANNEL_FILE).read_bytes(), CHANNEL_FILE)[1]
        for patch in channel.packs:
            for listed in (patch.file, *patch.signatures):
                listed.check((fleet.folder / "channel" / listed.path).read_bytes(), fleet.place)
        version: str = json.loads(end.out)["pack"].removeprefix("no-harm ")
        return version
    assert "there is no" in end.err, end
    return None


def wanted(fleet: Fleet) -> str:
    """The version that `update --check` of the user would apply; the user remembers the channel from then on."""
    words = ["update", str(fleet.model), "--check", "--channel", fleet.place, "--json"]
    (update,) = fleet.answer("user", *words, code=10)["channels"]
    return str(update["after"])


UPDATES = {
    # Update -> (packs in the ledger before, after, only every n-th call, kill points, at least)
    "to a newer version": (["no-harm 1.0.0"], ["no-harm 1.1.0"], 2, 32),
    "off a yanked version": (["no-harm 1.1.0"], ["no-harm 1.0.0"], 2, 32),
    "of rows that were replaced": (["no-harm 1.0.0"], ["no-harm 1.0.0"], 2, 15),
}


def prepare(fleet: Fleet, what: str) -> None:
    """Brings model and channel into the state before the update."""
    fleet.answer("publisher", *fleet.push("1.0.0"))
    if what == "off a yanked version":
        fleet.answer("publisher", *fleet.push("1.1.0"))
    fleet.answer("user", "update", str(fleet.model), "--channel", fleet.place, "--json")
    if what == "to a newer version":
        fleet.answer("publisher", *fleet.push("1.1.0"))
    elif what == "off a yanked version":
        fleet.answer("publisher", *fleet.yank("1.1.0"))
    else:
        (fleet.model / "model.safetensors").write_bytes((fleet.folder / "base" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("what", UPDATES)
def test_an_update_killed_at_every_call(fleet: Fleet, what: str) -> None:
    before, after, every, least = UPDATES[what]
    prepare(fleet, what)
    fleet.keep()
    case = fleet.updating(before, after, fleet.pack("1.0.0"))
    serial = known_serial(fleet)
    words = ["update", str(fleet.model), "--json"]

    def check(number: int) -> str:
        torn = case.state_of(fleet.model) is None
        state = recovered(fleet, case, what) if number % 4 == 1 else ""
        (update,) = fleet.answer("user", *words)["channels"]
        assert update["state"] in ("updated", "current"), update
        assert update["after"] == after[0].removeprefix("no-harm ")
        assert case.prove(fleet.model) is case.after
        assert known_serial(fleet) == serial
        assert fleet.litter() == []
        if number % 8 == 1:
            revert(fleet.model)
            assert digests(fleet.model) == case.original
        return "torn" if torn else state

    states = each(kills(fleet, "user", words, every), check)
    assert len(states) >= least
    assert "torn" in states


def recovered(fleet: Fleet, case: Case, what: str) -> str:
    """`recover` alone leads to one of the two states, and `update --check` says which."""
    recover_model(fleet.model)
    found = fleet.run("user", "update", str(fleet.model), "--check", "--json")
    update: dict[str, Any] = json.loads(found.out)["channels"][0]
    state = case.state_of(fleet.model)
    assert state is not None
    if what != "of rows that were replaced":  # here ledger and rows disagree before, which the update repairs
        assert case.prove(fleet.model) is state
    assert (found.code, update["state"]) == ((0, "current") if state is case.after else (10, "available"))
    return state.name


def known_serial(fleet: Fleet) -> int:
    known = recall(fleet.place)
    assert known is not None
    return known.seen.serial


@dataclass(frozen=True)
class Host:
    """Three models of one user, all at 1.0.0, and a channel that has 1.1.0."""

    fleet: Fleet
    case: Case
    """Its states are those of each model."""

    @property
    def models(self) -> list[Path]:
        return [self.fleet.folder / name for name in ("model", "second", "third")]

    @property
    def words(self) -> list[str]:
        return ["update", *map(str, self.models), "--json"]

    def settled(self) -> list[str]:
        """Recovers each model, and proves that it is old or new."""
        for model in self.models:
            recover_model(model)
        return [self.case.prove(model).name for model in self.models]


@pytest.fixture
def host(fleet: Fleet) -> Host:
    for name in ("second", "third"):
        shutil.copytree(fleet.folder / "base", fleet.folder / name)
    fleet.answer("publisher", *fleet.push("1.0.0"))
    models = [str(fleet.folder / name) for name in ("model", "second", "third")]
    fleet.answer("user", "update", *models, "--channel", fleet.place, "--json")
    fleet.answer("publisher", *fleet.push("1.1.0"))
    fleet.keep()
    return Host(fleet, fleet.updating(["no-harm 1.0.0"], ["no-harm 1.1.0"], fleet.pack("1.0.0")))


def test_an_update_of_several_models_killed_at_many_calls(fleet: Fleet, host: Host) -> None:
    journals = []

    def check(number: int) -> str:
        journals.append(sum(state_dir_of(model).journal.exists() for model in host.models))
        if number % 2:
            host.settled()
        done = fleet.answer("user", *host.words)["models"]
        assert {one["state"] for one in done} <= {"updated", "current"}, done
        assert host.settled() == ["after"] * 3
        assert known_serial(fleet) == 2
        assert fleet.litter() == []
        return ""

    assert len(each(kills(fleet, "user", host.words, 9), check)) >= 12
    assert max(journals) >= 2, "several models were in the middle of a change"


def test_an_update_of_several_models_interrupted_at_many_calls(fleet: Fleet, host: Host) -> None:
    """SIGINT: unlike after SIGKILL, no model waits for the next command."""
    ends = set()
    for number in itertools.count(1, 17):
        fleet.fresh()
        victim = fleet.killer.start(host.words, fleet.folder, Fault(number), home=fleet.home("user"))
        if not victim.wait().stopped:
            break
        fleet.killer.ask("send", child=victim.child, signal=int(signal.SIGINT))
        victim.go_on()
        end = victim.wait()
        assert (end.how, end.trouble) == ("ended", ""), end
        assert not any(state_dir_of(model).journal.exists() for model in host.models), number
        states = [host.case.prove(model).name for model in host.models]
        assert end.code == 130 or (end.code == 0 and states == ["after"] * 3), end
        ends.add((end.code, *sorted(states)))
        done = fleet.answer("user", *host.words)["models"]
        assert [one["state"] for one in done] == ["updated" if state == "before" else "current" for state in states]
    assert {end[0] for end in ends} >= {130}
    assert any("before" in end for end in ends)
