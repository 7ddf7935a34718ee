"""Whether the packs of a model are still accepted: the policy of today, and the channel as far as it is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch import doctor
from nestpatch.formats import nest
from nestpatch.health.checks import Check
from tests.calls import answer
from tests.helpers import tiny_checkpoint, tiny_pack


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model that follows a channel of two packs, the first of which is published, and a home."""
    folder = tmp_path.resolve()
    (folder / "home").mkdir(mode=0o700)
    monkeypatch.setenv("NESTPATCH_HOME", str(folder / "home"))
    base = tiny_checkpoint(folder / "model")
    for version, seed in (("1.0.0", 0), ("1.1.0", 1)):
        nest.write(tiny_pack(base, version=version, seed=seed), folder / f"{version}.nest")
    answer("keygen", folder / "acme", "--no-password")
    answer("sign", folder / "1.0.0.nest", "--key", folder / "acme.key")
    answer("trust", "add", folder / "acme.pub", "--name", "acme")
    publish(folder, "1.0.0")
    answer("apply", base, (folder / "channel").as_uri(), "--in-place")
    return folder


def publish(folder: Path, version: str) -> None:
    answer("push", folder / f"{version}.nest", (folder / "channel").as_uri(), "--key", folder / "acme.key")


def checks(folder: Path, *, online: bool = False) -> dict[str, Check]:
    return {check.name: check for check in doctor(folder / "model", online=online).checks}


def test_signed_and_the_latest(place: Path) -> None:
    found = checks(place)
    assert (found["signature"].state.value, found["channel"].state.value) == ("ok", "ok")
    assert found["signature"].detail == "signed by acme"


def test_a_key_that_is_no_longer_trusted(place: Path) -> None:
    answer("trust", "remove", "acme")
    answer("keygen", place / "other", "--no-password")
    answer("trust", "add", place / "other.pub", "--name", "other")
    found = checks(place)
    assert found["signature"].state.value == "failed"
    assert "trust add" in found["signature"].advice


def test_a_newer_version_is_a_warning(place: Path) -> None:
    publish(place, "1.1.0")
    found = checks(place, online=True)
    assert found["channel"].state.value == "warning"
    assert "offers no-harm 1.1.0" in found["channel"].detail


def test_a_withdrawn_version_fails(place: Path) -> None:
    channel = (place / "channel").as_uri()
    publish(place, "1.1.0")
    answer("yank", channel, "1.0.0", "--reason", "breaks arithmetic", "--key", place / "acme.key")
    found = checks(place, online=True)
    assert found["channel"].state.value == "failed"
    assert "breaks arithmetic" in found["channel"].detail
    assert checks(place)["channel"].state.value == "failed", "what was read is remembered"


def test_a_channel_that_cannot_be_read(place: Path) -> None:
    (place / "channel").rename(place / "gone")
    assert checks(place)["channel"].state.value == "ok"
    found = checks(place, online=True)
    assert found["channel"].state.value == "not checked"
    assert "file://" in found["channel"].detail
