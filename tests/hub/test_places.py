"""Channels in folders and on web servers: the same rules, no Hub."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.channels._memory import address_file
from nestpatch.channels.follow import follow, pull
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.publish import push, renew
from nestpatch.channels.readers import FolderReader, HubReader, WebReader, open_reader, split_version
from nestpatch.errors import (
    ChannelFormatError,
    DataError,
    ForeignChannelError,
    HubAccessError,
    HubAnswerError,
    HubNotFoundError,
    HubUnavailableError,
    PublishError,
    RollbackError,
    SwappedFileError,
    VersionError,
)
from nestpatch.patcher.inplace import revert
from nestpatch.patcher.update import Updated
from tests.helpers import weight_files
from tests.hub.scene import REPO, Scene, updated
from tests.hub.web import Web
from tests.hubserver.messages import Answer


def weights(model: Path) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]


def brought(scene: Scene, *channels: str, **options: object) -> Updated:
    (done,) = updated(scene.model, scene.policy, channels, **options)
    return done


@pytest.mark.parametrize("kind", ["folder", "web"])
def test_the_whole_way_without_a_hub(scene: Scene, shared: Path, web: Web, kind: str) -> None:
    place, folder = (shared.as_uri() if kind == "folder" else web.url), shared.as_uri()
    original = weights(scene.model)
    count = len(scene.hub.log)
    assert brought(scene, place).after == "1.0.0"
    at_one = weights(scene.model)
    assert brought(scene).state == "current"
    scene.publish("1.1.0", 1, folder)
    assert brought(scene, check=True).state == "available"
    assert brought(scene).steps == ("undo no-harm 1.0.0", "apply no-harm 1.1.0")
    scene.yank("1.1.0", "bad", folder)
    assert brought(scene).steps == ("undo no-harm 1.1.0", "apply no-harm 1.0.0")
    assert weights(scene.model) == at_one
    scene.yank("1.0.0", "bad too", folder)
    assert brought(scene).steps == ("undo no-harm 1.0.0",)
    assert weights(scene.model) == original
    scene.publish("1.2.0", 2, folder)
    assert brought(scene).after == "1.2.0", "a model that had to go back to its base still follows"
    assert len(scene.hub.log) == count
    assert web.tokens <= {None}, "the Hub's token is for the Hub"


def test_nothing_new_on_a_web_server_is_one_request_without_content(scene: Scene, web: Web) -> None:
    brought(scene, web.url)
    web.log.clear()
    assert brought(scene).state == "current"
    assert web.log == [(f"/{CHANNEL_FILE}", 304)]


def test_a_mirror_of_a_hub_channel(scene: Scene, tmp_path: Path) -> None:
    """Air-gapped: the repository's files in a folder are the channel."""
    mirror = scene.mirror(tmp_path / "mirror")
    scene.hub.stop()
    revert(scene.model)
    assert brought(scene, mirror.as_uri()).after == "1.0.0"
    assert follow(FolderReader(mirror), scene.policy).accepted.channel.name == REPO


def test_a_mirror_that_is_half_copied(scene: Scene, shared: Path, tmp_path: Path) -> None:
    mirror = shutil.copytree(shared, tmp_path / "mirror")
    brought(scene, mirror.as_uri())
    scene.publish("1.1.0", 1, shared.as_uri())
    shutil.copy(shared / CHANNEL_FILE, mirror / CHANNEL_FILE)
    before = scene.state()
    with pytest.raises(HubNotFoundError, match="there is no"):
        brought(scene)
    (mirror / "packs" / "1.1.0").mkdir()
    shutil.copy(shared / "packs/1.1.0/no-harm.nest", mirror / "packs/1.1.0/no-harm.nest")
    (mirror / "packs/1.1.0/no-harm.nest.sig").write_bytes(b"")
    with pytest.raises(SwappedFileError):
        brought(scene)
    assert scene.state() == before


def test_an_old_mirror(scene: Scene, shared: Path, tmp_path: Path) -> None:
    old = shutil.copytree(shared, tmp_path / "old")
    scene.publish("1.1.0", 1, shared.as_uri())
    brought(scene, shared.as_uri())
    shutil.copy(old / CHANNEL_FILE, shared / CHANNEL_FILE)
    with pytest.raises(RollbackError):
        brought(scene)


def test_another_channel_in_the_same_folder(scene: Scene, shared: Path) -> None:
    brought(scene, shared.as_uri())
    shutil.rmtree(shared)
    with scene.as_publisher():
        address_file(shared.as_uri()).unlink()
        push(scene.pack("3.0.0"), str(shared), scene.key, name="another")
    before = scene.state()
    with pytest.raises(ForeignChannelError, match="is the channel another, expected no-harm"):
        brought(scene)
    assert scene.state() == before


def test_a_folder_of_versions_never_changes(scene: Scene, shared: Path) -> None:
    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    with pytest.raises(VersionError, match="already"):
        scene.publish("1.0.0", 5, shared.as_uri())
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before
    assert sorted(path.relative_to(shared).as_posix() for path in before) == [
        ".channel.lock", "README.md", CHANNEL_FILE, "packs/1.0.0/no-harm.nest", "packs/1.0.0/no-harm.nest.sig",
    ]  # fmt: skip


def test_an_interrupted_push_is_invisible(scene: Scene, shared: Path) -> None:
    """Files that the channel does not name yet: readers see the old channel, and the next push replaces them."""
    (shared / "packs" / "1.1.0").mkdir()
    (shared / "packs" / "1.1.0" / "no-harm.nest").write_bytes(b"half")
    assert brought(scene, shared.as_uri()).after == "1.0.0"
    scene.publish("1.1.0", 1, shared.as_uri())
    assert brought(scene).after == "1.1.0"


def test_a_channel_that_was_removed_is_not_started_anew(scene: Scene, shared: Path) -> None:
    (shared / CHANNEL_FILE).unlink()
    with pytest.raises(RollbackError, match="had a channel, number 1, and has none now"):
        scene.publish("1.1.0", 1, shared.as_uri())


def test_a_card_of_one_s_own_is_left_alone(scene: Scene, shared: Path) -> None:
    assert "no-harm" in (shared / "README.md").read_text(encoding="utf-8")
    (shared / "README.md").write_text("mine", encoding="utf-8")
    scene.publish("1.1.0", 1, shared.as_uri())
    assert (shared / "README.md").read_text(encoding="utf-8") == "mine"


def test_a_web_server_that_sends_its_readers_elsewhere(scene: Scene, web: Web) -> None:
    brought(scene, web.url)
    web.replaced[f"/{CHANNEL_FILE}"] = Answer(302, {"Location": scene.hub.url + "/x"})
    with pytest.raises(HubAnswerError, match="redirects to another host"):
        brought(scene)
    web.replaced[f"/{CHANNEL_FILE}"] = Answer(302, {"Location": "/moved.json"})
    (web.folder / "moved.json").write_bytes((web.folder / CHANNEL_FILE).read_bytes())
    assert brought(scene).state == "current"


@pytest.mark.parametrize(
    ("answer", "error"),
    [(Answer(404), HubNotFoundError), (Answer(403), HubAccessError), (Answer(503), HubUnavailableError),
     (Answer(204), HubAnswerError), (Answer(200, {}, b"x" * (2 << 20)), HubAnswerError),
     (Answer(200, {}, b"<html>"), ChannelFormatError)],
)  # fmt: skip
def test_what_a_web_server_may_answer(scene: Scene, web: Web, answer: Answer, error: type[Exception]) -> None:
    brought(scene, web.url)
    web.replaced[f"/{CHANNEL_FILE}"] = answer
    before = scene.state()
    with pytest.raises(error):
        brought(scene)
    assert scene.state() == before


def test_a_server_that_claims_nothing_is_new_at_the_first_contact(scene: Scene, web: Web) -> None:
    web.replaced[f"/{CHANNEL_FILE}"] = Answer(304)
    with pytest.raises(HubAnswerError, match="was never read before"):
        brought(scene, web.url)


def test_nobody_publishes_to_a_web_server(scene: Scene, web: Web) -> None:
    with pytest.raises(PublishError, match="can only be read"):
        scene.publish("1.1.0", 1, web.url)


def test_publishing_needs_a_channel_to_change(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VersionError, match="there is no channel"):
        renew(str(tmp_path / "empty"), scene.key)


def test_a_broken_memory_is_said(scene: Scene, shared: Path) -> None:
    brought(scene, shared.as_uri())
    file = address_file(shared.as_uri())
    good = json.loads(file.read_text(encoding="utf-8"))
    for broken in ("", "{}", json.dumps(good | {"address": "file:///other"}), json.dumps(good | {"root": 1})):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(ChannelFormatError, match="what is remembered of file://") as caught:
            brought(scene)
        assert str(file) in caught.value.advice


def test_pulled_files_carry_their_signatures(scene: Scene, shared: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = pull(f"{shared.as_uri()}@1.0.0", tmp_path / "in", policy=scene.policy)
    assert done.file == tmp_path / "in" / "no-harm-1.0.0.nest"
    assert sorted(file.name for file in (tmp_path / "in").iterdir()) == ["no-harm-1.0.0.nest", "no-harm-1.0.0.nest.sig"]
    assert pull(str(shared), tmp_path / "in", policy=scene.policy) == done, "the same again is no error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/no-harm", HubReader("acme/no-harm", "x")),
        ("hub://acme/no-harm", HubReader("acme/no-harm", "x")),
        ("https://patches.example/llama/", WebReader("https://patches.example/llama")),
        ("http://localhost:80/x", WebReader("http://localhost:80/x")),
        ("file:///srv/patches", FolderReader(Path("/srv/patches"))),
        ("file:///srv/a%20b", FolderReader(Path("/srv/a b"))),
        ("/srv/patches", FolderReader(Path("/srv/patches"))),
    ],
)
def test_places(text: str, expected: object) -> None:
    found = open_reader(text)
    assert (HubReader(found.name, "x") if isinstance(found, HubReader) else found) == expected
    assert open_reader(found.address).address == found.address


@pytest.mark.parametrize(
    "text", ["http://patches.example/x", "ftp://x/y", "file://server/share", "acme", "", "acme/no-harm@main", "s3://bucket/x"]
)
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(DataError):
        open_reader(text)


def test_a_text_that_could_be_a_folder_is_not_sent_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="'acme/no-harm' looks like a path") as caught:
        open_reader("acme/no-harm")
    assert "./acme/no-harm" in caught.value.advice
    assert "hub://acme/no-harm" in caught.value.advice
    assert isinstance(open_reader("hub://acme/no-harm"), HubReader)
    assert isinstance(open_reader("./acme/no-harm"), FolderReader)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a/b@1.0.0", ("a/b", "1.0.0")), ("file:///x@y/z", ("file:///x@y/z", None)),
     ("https://me@host/x@1.2.3-rc.1", ("https://me@host/x", "1.2.3-rc.1")),
     ("a/b", ("a/b", None))],
)  # fmt: skip
def test_versions_of_places(text: str, expected: tuple[str, str | None]) -> None:
    assert split_version(text) == expected
