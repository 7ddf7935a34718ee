"""The same for the files that a channel names, for the way that they take, and among publishers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.channels import publish
from nestpatch.channels._release import listed
from nestpatch.channels.follow import fetch_pack, pull
from nestpatch.channels.listing import CHANNEL_FILE, ListedFile, base_digest, parse
from nestpatch.channels.publish import push, renew, yank
from nestpatch.errors import (
    BadSignatureError,
    BaseMismatchError,
    ChannelFormatError,
    ChannelKeyError,
    HubAccessError,
    HubAnswerError,
    HubNotFoundError,
    HubUnavailableError,
    NestpatchError,
    PublishError,
    RollbackError,
    SwappedFileError,
    UnsignedError,
    UntrustedError,
    VersionError,
    YankedError,
)
from nestpatch.formats import nest
from nestpatch.signing import envelopes
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.hub.scene import PATCH, REPO, Scene, refused
from tests.hubserver import faults
from tests.hubserver.messages import Answer
from tests.hubserver.server import Hub

# The files


def test_a_pack_without_a_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=())))
    refused(scene, UnsignedError, r"no-harm\.nest is not signed", remembered=False)


def test_a_pack_signed_with_another_key(scene: Scene) -> None:
    """The server cannot do this alone: the channel's key was used without the publisher's second person."""
    scene.publish("1.1.0", 1)
    patch = scene.channel.packs[1]
    content = envelopes.Bundle.write(patch.file.sha256, "no-harm.nest", scene.evil)
    file = ListedFile(patch.signatures[0].path, len(content), sha256(content).hexdigest())
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=(file,))), **{file.path: content})
    refused(scene, UntrustedError, "which is not trusted here", remembered=False)


def test_a_signature_for_another_pack(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    one, two = scene.channel.packs
    content = scene.read(one.signatures[0].path)
    file = replace(two.signatures[0], size=len(content), sha256=one.signatures[0].sha256)
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=(file,))), **{file.path: content})
    refused(scene, BadSignatureError, "was made for other bytes", remembered=False)


def test_a_tampered_pack_of_equal_size(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    data = bytearray(scene.read(PATCH.format("1.1.0")))
    data[-1] ^= 1
    scene.spoil_large(PATCH.format("1.1.0"), bytes(data))
    refused(scene, SwappedFileError, "is not what the channel lists", remembered=False)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data * 2])
def test_a_pack_of_another_size(scene: Scene, change: Callable[[bytes], bytes]) -> None:
    scene.publish("1.1.0", 1)
    path = PATCH.format("1.1.0")
    scene.spoil_large(path, change(scene.read(path)))
    refused(scene, SwappedFileError, "bytes; the channel lists", remembered=False)


def test_the_old_pack_under_the_new_path(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    files = {PATCH.format("1.1.0") + end: scene.read(PATCH.format("1.0.0") + end) for end in ("", ".sig")}
    scene.put(**files)
    refused(scene, SwappedFileError, "1.1.0/no-harm.nest", remembered=False)


def test_a_swapped_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.put(**{PATCH.format("1.1.0") + ".sig": b"x" * scene.channel.packs[1].signatures[0].size})
    refused(scene, SwappedFileError, r"no-harm\.nest\.sig in hub://acme/no-harm is not what", remembered=False)


def test_a_pack_that_is_not_what_the_channel_says_of_it(scene: Scene) -> None:
    """VerifiedPack by everybody, but listed under another version."""
    data = scene.pack("1.0.5", 1).read_bytes()
    signature = envelopes.Bundle.write(sha256(data).hexdigest(), "no-harm.nest", scene.key)
    patch, files = listed(nest.decode(data).manifest, data, {".sig": signature})
    moved = {path.replace("1.0.5", "1.1.0"): content for path, content in files.items()}
    entries = [replace(f, path=f.path.replace("1.0.5", "1.1.0")) for f in (patch.file, *patch.signatures)]
    lie = replace(patch, version="1.1.0", file=entries[0], signatures=(entries[1],))
    scene.put(channel=scene.resign(replace(scene.channel, packs=(*scene.channel.packs, lie))), **moved)
    refused(scene, SwappedFileError, r"lists no-harm 1\.1\.0 for .*, but contains no-harm 1\.0\.5", remembered=False)


def test_a_yanked_latest_version(scene: Scene, tmp_path: Path) -> None:
    scene.publish("1.1.0", 1)
    scene.yank("1.1.0", "refuses too much")
    assert scene.update().state == "current"
    with pytest.raises(YankedError, match=r"1\.1\.0 was yanked by its publisher: refuses too much"):
        fetch_pack(f"hub://{REPO}@1.1.0", scene.policy, scene.model)
    scene.yank("1.0.0", "all of it")
    with pytest.raises(VersionError, match="no version of acme/no-harm is active"):
        pull(REPO, tmp_path / "got.nest", policy=scene.policy)
    assert not (tmp_path / "got.nest").exists()


def test_a_pack_for_another_base(scene: Scene, tmp_path: Path) -> None:
    """Well published and signed, but for another model."""
    other = tiny_checkpoint(tmp_path / "other", seed=5)
    nest.write(tiny_pack(other, version="1.1.0"), tmp_path / "other.nest")
    scene.push(tmp_path / "other.nest")
    refused(scene, BaseMismatchError, "are not the base of no-harm 1.1.0", remembered=False)


def test_a_channel_that_lies_about_the_base(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.put(channel=scene.resign(scene.listed("1.1.0", base_sha256="0" * 64)))
    refused(scene, SwappedFileError, "lists no-harm 1.1.0", remembered=False)
    one, two = (nest.read(scene.pack(*facts)).manifest for facts in (("1.0.0", 0), ("1.1.0", 1)))
    assert base_digest(one) == base_digest(two)


def test_an_older_version_is_never_an_update(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.update()
    fewer = replace(scene.channel, packs=scene.channel.packs[:1])
    active = replace(fewer, packs=tuple(replace(p, status=type(p.status).ACTIVE) for p in fewer.packs))
    scene.put(channel=scene.resign(active))
    before = scene.state()
    assert scene.update().state == "current"
    assert scene.state() == before


# The way


def test_a_truncated_download(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(f"GET /{scene.entry(PATCH.format('1.1.0')).lfs}", faults.truncated(100))
    refused(scene, HubUnavailableError, "cannot read acme/no-harm", remembered=False)


def test_a_shortened_download(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(f"GET /{scene.entry(PATCH.format('1.1.0')).lfs}", faults.shortened(100))
    refused(scene, HubUnavailableError, "received 100 bytes, expected", remembered=False)


@pytest.mark.parametrize("bend", [faults.truncated(50), faults.dropped()])
def test_a_channel_that_breaks_off(scene: Scene, bend: faults.Bend) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(CHANNEL_FILE, bend)
    refused(scene, HubUnavailableError, "cannot read http")
    scene.hub.faults.clear()
    scene.hub.fault(CHANNEL_FILE, bend, times=2)
    assert scene.update().after == "1.1.0"


def test_a_shortened_channel(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.hub.fault(CHANNEL_FILE, faults.shortened(300))
    refused(scene, ChannelFormatError, "is not valid JSON")


@pytest.mark.parametrize("code", [500, 502, 503, 429])
def test_a_server_in_trouble_and_a_remembered_channel(scene: Scene, code: int) -> None:
    """What is remembered is no answer: silence must not look like "nothing new"."""
    scene.hub.fault("GET", faults.status(code))
    refused(scene, HubUnavailableError, f"the server answered {code}")


def test_a_dead_server_and_a_remembered_channel(scene: Scene) -> None:
    scene.hub.stop()
    refused(scene, HubUnavailableError, "cannot read http")


def test_offline_is_said(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    count = len(scene.hub.log)
    refused(scene, HubUnavailableError, "HF_HUB_OFFLINE is set")
    assert len(scene.hub.log) == count


def test_a_channel_that_leads_to_another_host(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    elsewhere = scene.hub.cdn_address("0" * 64)
    scene.hub.fault(CHANNEL_FILE, faults.redirected(elsewhere))
    count = len(scene.hub.seen("cdn"))
    refused(scene, HubAnswerError, "redirects to another host: 127.0.0.1")
    assert len(scene.hub.seen("cdn")) == count, "nothing was asked of it"


def moved(scene: Scene) -> None:
    """The Hub may send readers of small files to a cache of its own, on the same host, and names the commit where it does."""
    commit = scene.repo.resolve("main")
    headers = {"Location": f"/api/resolve-cache/{CHANNEL_FILE}", "X-Repo-Commit": commit}
    scene.hub.fault(f"resolve/main/{CHANNEL_FILE}", faults.replayed(Answer(307, headers)))
    scene.hub.fault("resolve-cache", faults.replayed(Answer(200, {}, scene.read(CHANNEL_FILE))))


def test_the_hub_s_own_cache_is_followed_when_there_is_something_new(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    moved(scene)
    scene.hub.log.clear()
    assert scene.update(check=True).after == "1.1.0"
    assert [seen.status for seen in scene.hub.log] == [307, 200]
    assert {seen.token for seen in scene.hub.log} == {"hf_writer"}, "it is the same host: private repositories need the token"
    scene.hub.log.clear()
    assert scene.update(check=True).state == "available"
    assert [seen.status for seen in scene.hub.log] == [307], "this commit is known"


def test_a_channel_that_leads_in_a_circle(scene: Scene) -> None:
    scene.hub.fault(CHANNEL_FILE, faults.redirected(f"{scene.hub.url}/{REPO}/resolve/main/{CHANNEL_FILE}"))
    refused(scene, HubAnswerError, "redirects more than 4 times")


def test_a_pack_that_leads_to_another_host(scene: Scene, hub: Hub) -> None:
    """As the Hub does itself for large files: the token stays here, and the bytes are compared."""
    scene.publish("1.1.0", 1)
    data = scene.read(PATCH.format("1.1.0"))
    oid = hub.store.add_large(data[:-1] + bytes([data[-1] ^ 1]))
    scene.hub.fault(r"resolve/\w+/packs/1.1.0/no-harm.nest ?$", faults.redirected(hub.cdn_address(oid)))
    refused(scene, SwappedFileError, "is not what the channel lists", remembered=False)
    assert {seen.token for seen in hub.seen("cdn")} == {None}


def test_a_login_page(scene: Scene) -> None:
    scene.hub.fault(CHANNEL_FILE, faults.replayed(Answer(200, {"Content-Type": "text/html"}, b"<html>Please log in")))
    refused(scene, HubAnswerError, "names no commit")


def test_gated_and_missing_repositories(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    scene.hub.accounts.of("model", REPO).gated = True
    refused(scene, HubAccessError, "is gated")
    scene.hub.accounts.of("model", REPO).private = True
    refused(scene, HubNotFoundError, "or hides it from this user")
    with pytest.raises(HubNotFoundError):
        pull("acme/nothing", policy=scene.policy)


# Publishers


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_publishers_at_once_both_get_their_turn(scene: Scene) -> None:
    packs = [scene.pack(f"1.{number}.0", number) for number in range(1, 4)]
    errors: list[Exception] = []

    def run(file: Path) -> None:
        try:
            push(file, REPO, scene.key)
        except NestpatchError as error:
            errors.append(error)

    with scene.as_publisher():
        run_all([threading.Thread(target=run, args=(file,)) for file in packs])
    assert errors == []
    assert scene.channel.serial == 4
    assert [patch.version for patch in scene.channel.packs] == ["1.0.0", "1.1.0", "1.2.0", "1.3.0"]
    assert scene.update().after == "1.3.0"


def test_a_publisher_who_is_always_too_late(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(request: object, serve: faults.Serve) -> Answer:
        scene.put(note=b"%d" % len(scene.hub.log))
        return serve(request)  # type: ignore[arg-type]

    monkeypatch.setattr(publish, "ATTEMPTS", 3)
    scene.hub.fault("POST .*/commit/main", faster, times=2)
    assert scene.publish("1.1.0", 1).serial == 2, "the third attempt reads the channel anew"
    scene.hub.faults.clear()
    scene.hub.fault("POST .*/commit/main", faster)
    before = scene.read(CHANNEL_FILE)
    with pytest.raises(PublishError, match="gave up after 3 attempts"):
        scene.publish("1.2.0", 2)
    assert scene.read(CHANNEL_FILE) == before


def test_two_publishers_at_once_in_a_folder(scene: Scene, tmp_path: Path) -> None:
    packs = [scene.pack(f"1.{number}.0", number) for number in range(1, 4)]
    place = str(tmp_path / "shared")
    with scene.as_publisher():
        push(scene.pack("1.0.0"), place, scene.key)
        run_all([threading.Thread(target=push, args=(file, place, scene.key)) for file in packs])
    _, channel = parse((tmp_path / "shared" / CHANNEL_FILE).read_bytes(), "it")
    assert (channel.serial, len(channel.packs)) == (4, 4)


def test_a_commit_whose_answer_is_lost_stands_once(scene: Scene) -> None:
    def lost(request: object, serve: faults.Serve) -> Answer:
        return replace(serve(request), cut=-1)  # type: ignore[arg-type]

    scene.hub.fault("POST .*/commit/main", lost, times=1)
    with pytest.raises(HubUnavailableError):
        scene.publish("1.1.0", 1)
    assert scene.channel.serial == 2
    again = scene.publish("1.1.0", 1)
    assert (again.serial, again.message) == (2, "no-harm 1.1.0 is already published")
    assert again.revision == scene.repo.resolve("main")
    assert scene.publish("1.2.0", 2).serial == 3
    assert scene.update().after == "1.2.0"


def test_a_published_version_never_changes(scene: Scene) -> None:
    before = scene.repo.resolve("main")
    with pytest.raises(VersionError, match=r"has no-harm 1\.0\.0 already, with other content"):
        scene.publish("1.0.0", 7)
    assert scene.publish("1.0.0").serial == 1
    with pytest.raises(VersionError, match="already"):
        scene.publish("1.0.0+build", 7)
    assert scene.repo.resolve("main") == before


def test_a_publisher_with_another_key(scene: Scene) -> None:
    for act in (lambda: push(scene.pack("2.0.0"), REPO, scene.evil), lambda: renew(REPO, scene.evil),
                lambda: yank(REPO, "1.0.0", "x", scene.evil)):  # fmt: skip
        with pytest.raises(ChannelKeyError, match="has the root key"):
            act()
    assert scene.channel.serial == 1


def test_a_publisher_does_not_build_on_an_old_channel(scene: Scene) -> None:
    old = scene.repo.resolve("main")
    scene.publish("1.1.0", 1)
    scene.repo.set_ref("refs/heads/main", old)
    with pytest.raises(RollbackError):
        scene.publish("1.2.0", 2)


def test_a_reader_cannot_publish(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubAccessError, match="answered 403"):
        scene.publish("1.1.0", 1)
    assert scene.channel.serial == 1
