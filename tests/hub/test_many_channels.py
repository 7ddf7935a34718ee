"""A model that follows several channels: what is wrong with one does not keep the others from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from nestpatch import errors
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import ChannelFile
from nestpatch.channels.shared import SharedReader
from nestpatch.formats import nest
from nestpatch.patcher.ledger import read_ledger, write_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.update import update
from nestpatch.signing.store import save_policy
from tests.calls import answer, run
from tests.helpers import tiny_pack
from tests.hub.calls import ledger_of
from tests.hub.scene import REPO, Scene
from tests.hubserver import faults


@pytest.fixture
def places(scene: Scene, tmp_path: Path) -> tuple[str, str, str]:
    """Three channels that the model follows, the middle one on the Hub; all have a new version."""
    save_policy(scene.policy)
    folders = [tmp_path / name for name in ("a", "z")]
    for version in ("1.0.0", "1.1.0"):
        for number, folder in enumerate(folders):
            pack = tiny_pack(scene.base, name=folder.name, version=version, seed=20 + number, neurons=2)
            nest.write(pack, tmp_path / "new.nest", overwrite=True)
            scene.push(tmp_path / "new.nest", str(folder))
        if version == "1.0.0":
            found = (folders[0].as_uri(), f"hub://{REPO}", folders[1].as_uri())
            assert run("update", scene.model, "--allow-overlap", *(w for p in found for w in ("--channel", p))).exit_code == 0
    scene.publish("1.1.0", 1)
    return found


def versions(scene: Scene) -> dict[str, str]:
    return {entry.name: entry.version for entry in ledger_of(scene.model).applied}


def test_a_channel_that_cannot_be_reached_does_not_stop_the_others(scene: Scene, places: tuple[str, str, str]) -> None:
    scene.hub.stop()
    told = answer("update", scene.model, "--allow-overlap", *words(places), code=1)["channels"]
    assert [(one["address"], one["state"]) for one in told] == [
        (places[0], "updated"), (places[1], "failed"), (places[2], "updated"),
    ]  # fmt: skip
    failed = told[1]
    assert (failed["error"], failed["before"], failed["after"], failed["steps"]) == ("HubUnavailableError", "", "", [])
    assert "cannot read http" in failed["reason"]
    assert "try again" in failed["advice"]
    assert versions(scene) == {"a": "1.1.0", "no-harm": "1.0.0", "z": "1.1.0"}
    assert (told[0]["error"], told[0]["advice"]) == ("", "")


def test_all_channels_are_asked_at_the_same_time(scene: Scene, places: tuple[str, str, str], monkeypatch: Any) -> None:
    """Each waits until the others have been asked."""
    together, ask = Barrier(3, timeout=20), SharedReader._ask

    def waiting(reader: SharedReader) -> ChannelFile:
        together.wait()
        return ask(reader)

    monkeypatch.setattr(SharedReader, "_ask", waiting)
    told = update(scene.model, places, policy=scene.policy, check=True)
    assert [(one.address, one.state) for one in told] == [(place, "available") for place in places]


def words(places: tuple[str, ...]) -> list[str]:
    return [word for place in places for word in ("--channel", place)]


def test_a_channel_that_is_refused_does_not_stop_the_others(scene: Scene, places: tuple[str, str, str]) -> None:
    scene.put(channel=b"{}")
    told = run("update", scene.model, "--quiet", "--allow-overlap", *words(places))
    assert told.exit_code == 1
    assert told.stdout.count("went from 1.0.0 to 1.1.0") == 2
    lines = told.stderr.splitlines()
    assert lines[0].startswith("ChannelFormatError: the channel at hub://acme/no-harm: expected")
    assert lines[1].startswith("What to do: ")
    assert lines[2] == "Nothing was applied from hub://acme/no-harm."
    assert versions(scene) == {"a": "1.1.0", "no-harm": "1.0.0", "z": "1.1.0"}


def test_a_pack_that_is_refused_does_not_stop_the_others(scene: Scene, places: tuple[str, str, str]) -> None:
    path = scene.channel.packs[1].file.path
    scene.spoil_large(path, b"x" + scene.read(path)[1:])
    told = answer("update", scene.model, "--allow-overlap", *words(places), code=1)["channels"]
    assert [one["error"] for one in told] == ["", "SwappedFileError", ""]
    assert versions(scene) == {"a": "1.1.0", "no-harm": "1.0.0", "z": "1.1.0"}


def test_check_tries_all_channels_and_ends_with_the_failure(scene: Scene, places: tuple[str, str, str]) -> None:
    (Path(places[0].removeprefix("file://")) / CHANNEL_FILE).unlink()
    before = scene.state()
    told = answer("update", scene.model, "--check", *words(places), code=1)["channels"]
    assert [one["state"] for one in told] == ["failed", "available", "available"]
    assert told[0]["error"] == "HubNotFoundError"
    assert scene.state() == before
    assert run("update", scene.model, "--check", *words(places[1:])).exit_code == 10


def test_errors_are_on_stderr_with_json_too(scene: Scene) -> None:
    save_policy(scene.policy)
    scene.hub.fault(CHANNEL_FILE, faults.status(503))
    told = run("update", scene.model, "--json")
    assert (told.exit_code, told.stderr.splitlines()[0].split(":")[0]) == (1, "HubUnavailableError")
    (only,) = json.loads(told.stdout)["channels"]
    assert (only["state"], only["error"]) == ("failed", "HubUnavailableError")


def test_a_file_system_in_trouble_is_reported_as_such(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered cannot be written: the folder's place is taken by a file."""
    (scene.folder / "taken").write_bytes(b"")
    monkeypatch.setenv("NESTPATCH_HOME", str(scene.folder / "taken"))
    # The key of the seals is out of reach too, so the ledger counts as one that came along: the channel has to be named.
    (only,) = update(scene.model, [REPO], policy=scene.policy)
    assert (only.state, only.error) == ("failed", "FileSystemError")
    assert issubclass(getattr(errors, only.error), errors.NestpatchError)


def test_a_ledger_that_names_an_odd_place_does_not_stop_the_others(scene: Scene) -> None:
    """What the ledger names is shown without control characters and passwords."""
    save_policy(scene.policy)
    place = state_dir_of(scene.model)
    ledger = replace(read_ledger(place), follows=("https://me:pw@host:99999/\x1b[2J?t0ken", f"hub://{REPO}"))
    write_ledger(place, ledger)
    scene.publish("1.1.0", 1)
    told = run("update", scene.model, "--quiet")
    assert (told.exit_code, versions(scene)) == (1, {"no-harm": "1.1.0"})
    assert "DataError" in told.stderr
    assert not any(word in told.stderr for word in ("\x1b", "pw", "t0ken"))


def test_a_place_that_is_typed_wrong_is_a_usage_error(scene: Scene) -> None:
    save_policy(scene.policy)
    before = scene.state()
    assert run("update", scene.model, "--channel", REPO, "--channel", "ftp://x").exit_code == 2
    assert scene.state() == before
