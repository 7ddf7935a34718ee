"""Several models of one host in one command: each channel is asked once, and what fails for one leaves the others alone."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.errors import DataError
from nestpatch.events import Event
from nestpatch.files.threads import allowed
from nestpatch.formats import nest
from nestpatch.patcher import fleet
from nestpatch.patcher.fleet import update_all
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.update import Task
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.signing.store import save_policy
from nestpatch.signing.trust import Policy, TrustedKey
from tests.calls import answer, run
from tests.helpers import tiny_pack, tree_digest
from tests.hub.calls import ledger_of, weights
from tests.hub.scene import REPO, Scene
from tests.hubserver import faults


@pytest.fixture
def host(scene: Scene, tmp_path: Path) -> list[Path]:
    """Five models that have 1.0.0 of the channel, which has 1.1.0 now. The log of the Hub is empty."""
    save_policy(scene.policy)
    models = [Path(shutil.copytree(scene.base, tmp_path / "host" / f"m{number}")) for number in range(5)]
    answer("update", *models, "--channel", REPO)
    scene.publish("1.1.0", 1)
    scene.hub.log.clear()
    return models


def versions(models: list[Path]) -> list[str]:
    return [entry.version for model in models for entry in ledger_of(model).applied]


def test_a_channel_is_asked_once_and_a_pack_is_read_once(scene: Scene, host: list[Path]) -> None:
    done = answer("update", *host)["models"]
    assert [(one["model"], one["state"]) for one in done] == [(str(model), "updated") for model in host]
    assert {(one["channels"][0]["before"], one["channels"][0]["after"]) for one in done} == {("1.0.0", "1.1.0")}
    seen = [one.target for one in scene.hub.log if one.place == "hub" and one.method == "GET"]
    assert sum(CHANNEL_FILE in target for target in seen) == 1
    assert sum(target.endswith("no-harm.nest") for target in seen) == 1
    assert sum(target.endswith(".sig") for target in seen) == 1
    scene.update()
    assert {str(weights(model)) for model in host} == {str(weights(scene.model))}
    assert {verify(model, full=True).verdict for model in host} == {Verdict.PATCHED}
    scene.hub.log.clear()
    assert [one["state"] for one in answer("update", *host)["models"]] == ["current"] * 5
    assert len(scene.hub.log) == 1


def test_models_are_changed_at_the_same_time(scene: Scene, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits until another has come as far."""
    together, change = Barrier(2, timeout=20), Task.update

    def waiting(*arguments: Any) -> Any:
        together.wait()
        return change(*arguments)

    monkeypatch.setattr(Task, "update", waiting)
    assert [one.state for one in update_all(host[:4], policy=scene.policy)] == ["updated"] * 4


def test_the_limit_of_threads_holds_for_every_model(scene: Scene, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, change = [], Task.update

    def looking(*arguments: Any) -> Any:
        seen.append(allowed())
        return change(*arguments)

    monkeypatch.setattr(Task, "update", looking)
    assert answer("update", *host, "--threads", 3)["models"]
    assert seen == [3] * len(host)


def cut(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


def break_ledger(model: Path) -> None:
    state_dir_of(model).ledger.write_text("{", encoding="utf-8")


def let_overlap(model: Path) -> None:
    other = tiny_pack(model.parents[1] / "base", name="other", seed=4)
    apply_in_place(model, other, allow_overlap=True, trust="none")


WRONG = {
    # What is done to a model -> the error of the model, of its channel
    cut: ("CheckpointFormatError", None),
    break_ledger: ("LedgerError", None),
    shutil.rmtree: ("CheckpointFormatError", None),
    let_overlap: ("", "OverlapError"),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_a_model_that_fails_does_not_stop_the_others(scene: Scene, host: list[Path], wrong: Any) -> None:
    wrong(host[1])
    before = tree_digest(host[1]) if host[1].exists() else {}
    told = answer("update", *host, code=1)["models"]
    assert [one["state"] for one in told] == ["updated", "failed", "updated", "updated", "updated"]
    own, of_channel = WRONG[wrong]
    assert told[1]["error"] == own
    assert [one["error"] for one in told[1]["channels"]] == ([of_channel] if of_channel else [])
    assert told[1]["advice"] or told[1]["channels"][0]["advice"]
    assert (tree_digest(host[1]) if host[1].exists() else {}) == before
    assert versions([host[0], *host[2:]]) == ["1.1.0"] * 4


def test_a_bug_in_one_model_does_not_stop_the_others(scene: Scene, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    change = Task.update

    def broken(task: Task, model: Path, *more: Any) -> Any:
        if model == host[2]:
            raise ZeroDivisionError("no such luck")
        return change(task, model, *more)

    monkeypatch.setattr(Task, "update", broken)
    told = update_all(host, policy=scene.policy)
    assert [one.error for one in told] == ["", "", "UnexpectedError", "", ""]
    assert told[2].reason.startswith("ZeroDivisionError: no such luck (patcher/fleet.py:")


def test_a_channel_that_is_down_is_tried_for_all_models_together(scene: Scene, host: list[Path]) -> None:
    before = [tree_digest(model) for model in host]
    scene.hub.fault(CHANNEL_FILE, faults.status(503))
    told = run("update", *host, "--quiet")
    assert told.exit_code == 1
    assert len(scene.hub.log) == 3, "one request and its two repetitions"
    assert told.stderr.count("HubUnavailableError") == 1
    assert f"Nothing was applied from hub://{REPO} to {', '.join(map(str, host))}." in told.stderr
    assert told.stdout.count("failed, HubUnavailableError") == 5
    assert [tree_digest(model) for model in host] == before


def test_a_pack_that_is_refused_is_refused_for_every_model(scene: Scene, host: list[Path]) -> None:
    path = scene.channel.packs[1].file.path
    scene.spoil_large(path, b"x" + scene.read(path)[1:])
    told = answer("update", *host, code=1)["models"]
    assert {one["channels"][0]["error"] for one in told} == {"SwappedFileError"}
    assert versions(host) == ["1.0.0"] * 5


def test_each_model_is_judged_by_the_rules_for_it(scene: Scene, host: list[Path]) -> None:
    """What is shared is what the server sent, not who may have it."""
    save_policy(Policy((TrustedKey("acme", scene.key.public, (str(host[0]), str(host[3]))),)))
    told = answer("update", *host, code=1)["models"]
    assert [one["channels"][0]["error"] for one in told] == ["", "ChannelKeyError", "ChannelKeyError", "", "ChannelKeyError"]
    assert versions(host) == ["1.1.0", "1.0.0", "1.0.0", "1.1.0", "1.0.0"]


def test_check_changes_nothing(scene: Scene, host: list[Path]) -> None:
    before = [tree_digest(model) for model in host]
    told = answer("update", *host, "--check", code=10)["models"]
    assert [one["state"] for one in told] == ["available"] * 5
    assert [tree_digest(model) for model in host] == before
    cut(host[4])
    told = answer("update", *host, "--check", code=1)["models"]
    assert [one["state"] for one in told] == [*["available"] * 4, "failed"]
    assert run("update", *host[:2]).exit_code == 0
    told = answer("update", *host[:2], "--check")["models"]
    assert [one["state"] for one in told] == ["current"] * 2


def test_the_table(scene: Scene, host: list[Path]) -> None:
    answer("update", host[0])
    scene.yank("1.0.0", "breaks [bold]tables[/]")
    scene.yank("1.1.0", "worse")
    cut(host[2])
    told = run("update", *host[:3], "--quiet")
    head, *rows = [re.split(r" {2,}", line.strip()) for line in told.stdout.splitlines()]
    assert head == ["model", "channel", "before -> after", "outcome", "seconds"]
    assert [row[:-1] for row in rows] == [
        [str(host[0]), f"hub://{REPO}", "1.1.0 -> base", "updated, yanked: worse"],
        [str(host[1]), f"hub://{REPO}", "1.0.0 -> base", "updated, yanked: breaks [bold]tables[/]"],
        [str(host[2]), "failed, CheckpointFormatError"],
    ]
    assert all(re.fullmatch(r"\d+\.\d\d", row[-1]) for row in rows)
    assert told.stderr.splitlines()[-1] == f"Not updated: {host[2]}."


def test_a_model_that_is_named_twice_is_one_model(scene: Scene, host: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(host[0])
    names = [tmp_path / "link", host[0], host[0] / "model.safetensors", host[1], host[1] / ".." / host[1].name]
    told = answer("update", *names)["models"]
    assert [(one["model"], one["state"]) for one in told] == [(str(host[0]), "updated"), (str(host[1]), "updated")]


def test_a_weight_file_and_a_link_to_it_are_one_model(scene: Scene, tmp_path: Path) -> None:
    """Through the link it would be refused."""
    save_policy(scene.policy)
    (tmp_path / "a").mkdir()
    file, link = tmp_path / "a" / "m.safetensors", tmp_path / "l.safetensors"
    shutil.copy(scene.base / "model.safetensors", file)
    answer("update", file, "--channel", REPO)
    link.symlink_to(file)
    scene.publish("1.1.0", 1)
    (told,) = answer("update", link, file)["models"]
    assert (told["model"], told["state"]) == (str(file), "updated")


def test_an_address_that_is_wrong_is_found_before_any_change(scene: Scene, host: list[Path]) -> None:
    before = [tree_digest(model) for model in host]
    assert run("update", *host, "--channel", REPO, "--channel", "ftp://x").exit_code == 2
    with pytest.raises(DataError):
        update_all(host, [REPO, "ftp://x"])
    assert [tree_digest(model) for model in host] == before
    assert scene.hub.log == []


def test_several_channels_and_an_overlap(scene: Scene, host: list[Path], tmp_path: Path) -> None:
    nest.write(tiny_pack(scene.base, name="other", seed=20, neurons=2), tmp_path / "other.nest")
    scene.push(tmp_path / "other.nest", str(tmp_path / "other"))
    words = ("--channel", REPO, "--channel", tmp_path / "other", "--allow-overlap")
    told = answer("update", *host, *words)["models"]
    assert {tuple(one["after"] for one in model["channels"]) for model in told} == {("1.1.0", "1.0.0")}
    assert {entry.name for model in host for entry in ledger_of(model).applied} == {"no-harm", "other"}


def test_no_model_and_no_trust(scene: Scene, host: list[Path]) -> None:
    assert update_all([], policy=scene.policy) == ()
    assert run("update").exit_code == 2
    save_policy(Policy())
    told = run("update", *host, "--quiet", "--allow-unsigned")
    assert (told.exit_code, told.stderr.count("no key is trusted on this machine")) == (0, 1)


def test_an_interrupt_begins_no_further_model(scene: Scene, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the first model is done; the second one is at work then, for as long as it is not stopped."""
    monkeypatch.setattr(fleet, "AT_ONCE", 2)
    change = Task.update

    def slow(task: Task, model: Path, *more: Any) -> Any:
        while model != host[0]:
            task.on_event(Event("merge"))
            time.sleep(0.01)
        return change(task, model, *more)

    monkeypatch.setattr(Task, "update", slow)
    with pytest.raises(KeyboardInterrupt):
        update_all(host, policy=scene.policy, on_event=interrupt)
    assert versions(host) == ["1.1.0", *["1.0.0"] * 4]
    monkeypatch.setattr(Task, "update", change)
    assert [one.state for one in update_all(host, policy=scene.policy)] == ["current", *["updated"] * 4]


def interrupt(_: Event) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_does_not_wait_for_a_slow_server(scene: Scene, host: list[Path]) -> None:
    """One model needs the server, the other one has failed at once, which is when the interrupt comes."""
    cut(host[1])
    scene.hub.fault(CHANNEL_FILE, faults.slow(60))
    with pytest.raises(KeyboardInterrupt):
        update_all(host[:2], policy=scene.policy, on_event=interrupt)
    assert versions(host[:1]) == ["1.0.0"]


def test_an_interrupt_is_reported(scene: Scene, host: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fleet, "update_all", stopped)
    told = run("update", *host, "--json")
    assert told.exit_code == 130
    assert "No model holds an unfinished change" in json.loads(told.stdout)["error"]["advice"]
    state_dir_of(host[3]).journal.write_bytes(b"")
    assert f"A change of {host[3]} is unfinished" in run("update", *host).stderr
