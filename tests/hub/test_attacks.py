"""What somebody may try who controls the server, the network or one key: each is refused by name, and nothing is applied."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.errors import (
    BadSignatureError,
    BaseMismatchError,
    ChannelFormatError,
    ChannelKeyError,
    ChannelPathError,
    EquivocationError,
    ExpiredError,
    ForeignChannelError,
    HubAccessError,
    HubAnswerError,
    HubNotFoundError,
    HubUnavailableError,
    NestpatchError,
    PublishError,
    RevokedError,
    RollbackError,
    SwappedFileError,
    UnsignedError,
    UntrustedError,
    VersionError,
)
from nestpatch.formats import nest
from nestpatch.hub import publish
from nestpatch.hub.channel import Gate
from nestpatch.hub.follow import fetch_patch, pull, utc_now
from nestpatch.hub.listing import CHANNEL_FILE, File, base_digest, payload, write_envelope
from nestpatch.hub.memory import recall
from nestpatch.hub.publish import push, renew, withdraw
from nestpatch.hub.release import listed
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.place import place_of
from nestpatch.signing import bundle
from nestpatch.signing.dsse import Envelope
from nestpatch.signing.trust import Policy
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.hub.scene import PATCH, REPO, Scene
from tests.hubserver import faults
from tests.hubserver.messages import Answer
from tests.hubserver.server import Hub


def refused(scene: Scene, error: type[NestpatchError], match: str, *, remembered: bool = True) -> None:
    """`update` raises this error; the model and what is kept beside it are as before."""
    before, known = scene.state(), recall(f"hub://{REPO}")
    with pytest.raises(error, match=match) as caught:
        scene.update()
    assert type(caught.value) is error
    assert caught.value.advice
    assert scene.state() == before
    assert read_ledger(place_of(scene.model).ledger).applied[0].version == "1.0.0"
    assert (recall(f"hub://{REPO}") == known) is remembered


# The channel


def test_a_channel_without_a_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    bare = json.loads(scene.read(CHANNEL_FILE)) | {"signatures": []}
    scene.put(channel=json.dumps(bare).encode())
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_a_channel_signed_with_another_key(scene: Scene) -> None:
    scene.put(channel=scene.resign(scene.channel, scene.evil))
    refused(scene, ChannelKeyError, "is not signed by its root key")
    with pytest.raises(ChannelKeyError, match="which is not trusted here"):
        Gate(scene.policy, utc_now()).admit(scene.read(CHANNEL_FILE), "the channel")


def test_another_signature_under_the_root_key_s_name(scene: Scene) -> None:
    channel = replace(scene.channel, serial=9)
    forged = scene.evil.sign(b"whatever")
    names = ((scene.key.public.key_id, forged),)
    scene.put(channel=write_envelope(Envelope("application/vnd.nestpatch.channel.v1+json", payload(channel), names)))
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_a_tampered_channel(scene: Scene) -> None:
    envelope = json.loads(scene.read(CHANNEL_FILE))
    altered = payload(replace(scene.channel, serial=2, expires="2999-01-01T00:00:00Z"))
    scene.put(channel=write_envelope(Envelope(envelope["payloadType"], altered, ())))
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_no_byte_of_a_channel_can_be_changed(scene: Scene) -> None:
    data, gate = scene.read(CHANNEL_FILE), Gate(scene.policy, utc_now())
    good = gate.admit(data, "it").channel
    for position in range(0, len(data), 7):
        spoiled = bytearray(data)
        spoiled[position] ^= 1
        try:
            found = gate.admit(bytes(spoiled), "it").channel
        except NestpatchError:
            continue
        # White space between the members of the envelope, and the key's name, are not signed and say nothing.
        assert found == good


def test_a_signature_for_another_purpose(scene: Scene) -> None:
    """What the root key signed as something else is no channel."""
    envelope = json.loads(scene.read(CHANNEL_FILE))
    scene.put(channel=json.dumps(envelope | {"payloadType": "application/vnd.in-toto+json"}).encode())
    refused(scene, ChannelFormatError, "is no channel but 'application/vnd.in-toto")


def test_a_replayed_old_channel(scene: Scene) -> None:
    old = scene.read(CHANNEL_FILE)
    scene.publish("1.1.0", 1)
    assert scene.update(check=True).after == "1.1.0"
    scene.put(channel=old)
    refused(scene, RollbackError, "has number 1 of .*; 2 was seen before")


def test_an_old_commit_of_the_repository(scene: Scene) -> None:
    """The server turns main back: what it serves is whole and was signed."""
    old = scene.repo.resolve("main")
    scene.publish("1.1.0", 1)
    scene.update(check=True)
    scene.repo.set_ref("refs/heads/main", old)
    refused(scene, RollbackError, "2 was seen before")


def test_an_expired_channel(scene: Scene) -> None:
    scene.put(channel=scene.resign(scene.channel, now="2020-01-01T00:00:00Z", days=30))
    refused(scene, ExpiredError, "was good until 2020-01-31T00:00:00Z")


def test_a_server_that_says_for_ever_that_nothing_is_new(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scene.update().state == "current"
    monkeypatch.setattr("nestpatch.hub.follow.utc_now", lambda: "2999-01-01T00:00:00Z")
    refused(scene, ExpiredError, "now it is 2999-01-01T00:00:00Z")


def test_equivocation(scene: Scene) -> None:
    other = scene.resign(replace(scene.channel, serial=scene.channel.serial - 1), days=400)
    scene.put(channel=other)
    refused(scene, EquivocationError, "has number 1, as one that was seen before and said something else")


def test_the_channel_of_another_repository_of_the_same_publisher(scene: Scene) -> None:
    scene.put(channel=scene.resign(replace(scene.channel, name="acme/other", serial=5)))
    refused(scene, ForeignChannelError, "is the channel acme/other, where acme/no-harm should be")


@pytest.mark.parametrize(
    "path",
    ["../../etc/cron.d/x", "/etc/passwd", "patches/1.0.0/../../x.nest", "patches/1.0.0/no-harm.nest/../../../x", "C:\\x",
     "patches\\1.0.0\\no-harm.nest", "patches/1.0.0/other.nest", "patches/2.0.0/no-harm.nest", "patches/1.0.0/no-harm.nest\0",
     ""],
)  # fmt: skip
def test_paths_that_escape(scene: Scene, path: str) -> None:
    file = scene.channel.patches[0].file
    scene.put(channel=scene.resign(scene.listed("1.0.0", file=replace(file, path=path))))
    refused(scene, ChannelPathError, "names the file")


@pytest.mark.parametrize("suffix", ["/../../../.ssh/authorized_keys", ".sig/..", ".0123.sig", "", ".pth"])
def test_signature_paths_that_escape(scene: Scene, suffix: str) -> None:
    file = scene.channel.patches[0].file
    odd = File(f"{file.path}{suffix}", 10, "0" * 64)
    scene.put(channel=scene.resign(scene.listed("1.0.0", signatures=(odd,))))
    refused(scene, ChannelPathError, "names the file")


@pytest.mark.parametrize(
    ("field", "name"), [("id", "../x"), ("id", "a/b"), ("id", ".hidden"), ("version", "1.0"), ("version", "../1.0.0")]
)
def test_names_that_escape(scene: Scene, field: str, name: str) -> None:
    scene.put(channel=scene.resign(scene.listed("1.0.0", **{field: name})))
    refused(scene, ChannelFormatError, "makes no sense")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff\xfe", b"{" * 5000, b" " * (1 << 20) + b"{}", b'{"a":1,"a":1}'])
def test_what_is_no_channel_at_all(scene: Scene, data: bytes) -> None:
    scene.put(channel=data)
    before = scene.state()
    with pytest.raises((ChannelFormatError, HubAnswerError)):
        scene.update()
    assert scene.state() == before


def test_a_key_that_is_no_longer_trusted(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    before = scene.state()
    scene.key, key = scene.evil, scene.key
    with pytest.raises(ChannelKeyError, match="its key is no longer trusted here"):
        scene.update()
    scene.key = key
    assert scene.state() == before


def test_nobody_is_trusted(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ChannelKeyError, match="no longer trusted"):
        pull(REPO, Policy(), tmp_path / "got.nest")
    assert not (tmp_path / "got.nest").exists()
    assert pull(REPO, Policy(), tmp_path / "got.nest", allow_unsigned=True).signers == {}


# The files


def test_a_pack_without_a_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=())))
    refused(scene, UnsignedError, r"no-harm\.nest is not signed", remembered=False)


def test_a_pack_signed_with_another_key(scene: Scene) -> None:
    """The server cannot do this alone: the channel's key was used without the publisher's second person."""
    scene.publish("1.1.0", 1)
    patch = scene.channel.patches[1]
    content = bundle.sign(patch.file.sha256, "no-harm.nest", scene.evil)
    file = File(patch.signatures[0].path, len(content), sha256(content).hexdigest())
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=(file,))), **{file.path: content})
    refused(scene, UntrustedError, "which is not trusted here", remembered=False)


def test_a_signature_for_another_pack(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    one, two = scene.channel.patches
    content = scene.read(one.signatures[0].path)
    file = replace(two.signatures[0], size=len(content), sha256=one.signatures[0].sha256)
    scene.put(channel=scene.resign(scene.listed("1.1.0", signatures=(file,))), **{file.path: content})
    refused(scene, BadSignatureError, "was made for other bytes", remembered=False)


def test_a_tampered_pack_of_equal_size(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    data = bytearray(scene.read(PATCH.format("1.1.0")))
    data[-1] ^= 1
    scene.spoil_large(PATCH.format("1.1.0"), bytes(data))
    refused(scene, SwappedFileError, "is not what the channel names", remembered=False)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data * 2])
def test_a_pack_of_another_size(scene: Scene, change: Callable[[bytes], bytes]) -> None:
    scene.publish("1.1.0", 1)
    path = PATCH.format("1.1.0")
    scene.spoil_large(path, change(scene.read(path)))
    refused(scene, SwappedFileError, "bytes; the channel names one of", remembered=False)


def test_the_old_pack_under_the_new_path(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    files = {PATCH.format("1.1.0") + end: scene.read(PATCH.format("1.0.0") + end) for end in ("", ".sig")}
    scene.put(**files)
    refused(scene, SwappedFileError, "1.1.0/no-harm.nest", remembered=False)


def test_a_swapped_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.put(**{PATCH.format("1.1.0") + ".sig": b"x" * scene.channel.patches[1].signatures[0].size})
    refused(scene, SwappedFileError, r"no-harm\.nest\.sig in hub://acme/no-harm is not what", remembered=False)


def test_a_pack_that_is_not_what_the_channel_says_of_it(scene: Scene) -> None:
    """Signed by everybody, but listed under another version."""
    data = scene.pack("1.0.5", 1).read_bytes()
    signature = bundle.sign(sha256(data).hexdigest(), "no-harm.nest", scene.key)
    patch, files = listed(nest.decode(data).manifest, data, {".sig": signature})
    moved = {path.replace("1.0.5", "1.1.0"): content for path, content in files.items()}
    entries = [replace(f, path=f.path.replace("1.0.5", "1.1.0")) for f in (patch.file, *patch.signatures)]
    lie = replace(patch, version="1.1.0", file=entries[0], signatures=(entries[1],))
    scene.put(channel=scene.resign(replace(scene.channel, patches=(*scene.channel.patches, lie))), **moved)
    refused(scene, SwappedFileError, r"lists no-harm 1\.1\.0 for .*, but holds no-harm 1\.0\.5", remembered=False)


def test_a_revoked_latest_version(scene: Scene, tmp_path: Path) -> None:
    scene.publish("1.1.0", 1)
    scene.withdraw("1.1.0", "refuses too much")
    assert scene.update().state == "current"
    with pytest.raises(RevokedError, match=r"1\.1\.0 was revoked by its publisher: refuses too much"):
        fetch_patch(f"hub://{REPO}@1.1.0", scene.policy, scene.model)
    scene.withdraw("1.0.0", "all of it")
    with pytest.raises(VersionError, match="no version of acme/no-harm is active"):
        pull(REPO, scene.policy, tmp_path / "got.nest")
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
    fewer = replace(scene.channel, patches=scene.channel.patches[:1])
    active = replace(fewer, patches=tuple(replace(p, status=type(p.status).ACTIVE) for p in fewer.patches))
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
    refused(scene, HubUnavailableError, "100 bytes came where", remembered=False)


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
    refused(scene, ChannelFormatError, "is no JSON")


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
    refused(scene, HubAnswerError, "sends its readers to another host: 127.0.0.1")
    assert len(scene.hub.seen("cdn")) == count, "nothing was asked of it"


def test_a_channel_that_leads_in_a_circle(scene: Scene) -> None:
    scene.hub.fault(CHANNEL_FILE, faults.redirected(f"{scene.hub.url}/{REPO}/resolve/main/{CHANNEL_FILE}"))
    refused(scene, HubAnswerError, "leads from one address to the next")


def test_a_pack_that_leads_to_another_host(scene: Scene, hub: Hub) -> None:
    """As the Hub does itself for large files: the token stays here, and the bytes are compared."""
    scene.publish("1.1.0", 1)
    data = scene.read(PATCH.format("1.1.0"))
    oid = hub.store.add_large(data[:-1] + bytes([data[-1] ^ 1]))
    scene.hub.fault(r"resolve/\w+/patches/1.1.0/no-harm.nest ?$", faults.redirected(hub.cdn_address(oid)))
    refused(scene, SwappedFileError, "is not what the channel names", remembered=False)
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
        pull("acme/nothing", scene.policy)


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
    assert [patch.version for patch in scene.channel.patches] == ["1.0.0", "1.1.0", "1.2.0", "1.3.0"]
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
    with pytest.raises(PublishError, match="3 attempts came too late"):
        scene.publish("1.2.0", 2)
    assert scene.read(CHANNEL_FILE) == before


def test_a_published_version_never_changes(scene: Scene) -> None:
    before = scene.repo.resolve("main")
    with pytest.raises(VersionError, match=r"has no-harm 1\.0\.0 already, with other content"):
        scene.publish("1.0.0", 7)
    with pytest.raises(VersionError, match="with the same content"):
        scene.publish("1.0.0")
    with pytest.raises(VersionError, match="already"):
        scene.publish("1.0.0+build", 7)
    assert scene.repo.resolve("main") == before


def test_a_publisher_with_another_key(scene: Scene) -> None:
    for act in (lambda: push(scene.pack("2.0.0"), REPO, scene.evil), lambda: renew(REPO, scene.evil),
                lambda: withdraw(REPO, "1.0.0", "x", scene.evil)):  # fmt: skip
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
