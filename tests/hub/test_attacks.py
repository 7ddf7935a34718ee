"""What somebody may try who controls the server, the network or one key: each is refused by name, and nothing is applied."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.channels.follow import pull
from nestpatch.channels.listing import CHANNEL_FILE, ListedFile, parse, payload, write_envelope
from nestpatch.channels.rules import ChannelRules
from nestpatch.errors import (
    ChannelFormatError,
    ChannelKeyError,
    ChannelPathError,
    EquivocationError,
    ExpiredError,
    ForeignChannelError,
    HubAnswerError,
    NestpatchError,
    RollbackError,
)
from nestpatch.pack import utc_now
from nestpatch.signing.envelopes import Envelope
from nestpatch.signing.trust import Policy
from tests.hub.scene import REPO, Scene, refused


def test_a_channel_without_a_signature(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    bare = json.loads(scene.read(CHANNEL_FILE)) | {"signatures": []}
    scene.put(channel=json.dumps(bare).encode())
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_a_channel_signed_with_another_key(scene: Scene) -> None:
    scene.put(channel=scene.resign(scene.channel, scene.evil))
    refused(scene, ChannelKeyError, "is not signed by its root key")
    with pytest.raises(ChannelKeyError, match="which is not trusted here"):
        ChannelRules(scene.policy, utc_now()).accept(*parse(scene.read(CHANNEL_FILE), "the channel"), "the channel")


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
    data, gate = scene.read(CHANNEL_FILE), ChannelRules(scene.policy, utc_now())
    good = gate.accept(*parse(data, "it"), "it").channel
    for position in range(0, len(data), 7):
        spoiled = bytearray(data)
        spoiled[position] ^= 1
        try:
            found = gate.accept(*parse(bytes(spoiled), "it"), "it").channel
        except NestpatchError:
            continue
        # White space between the members of the envelope, and the key's name, are not signed and say nothing.
        assert found == good


def test_a_signature_for_another_purpose(scene: Scene) -> None:
    """What the root key signed as something else is no channel."""
    envelope = json.loads(scene.read(CHANNEL_FILE))
    scene.put(channel=json.dumps(envelope | {"payloadType": "application/vnd.in-toto+json"}).encode())
    refused(scene, ChannelFormatError, "has the type 'application/vnd.in-toto")


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
    refused(scene, ExpiredError, "expired at 2020-01-31T00:00:00Z")


def test_a_server_that_says_for_ever_that_nothing_is_new(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scene.update().state == "current"
    monkeypatch.setattr("nestpatch.channels.follow.utc_now", lambda: "2999-01-01T00:00:00Z")
    refused(scene, ExpiredError, "now it is 2999-01-01T00:00:00Z")


def test_equivocation(scene: Scene) -> None:
    other = scene.resign(replace(scene.channel, serial=scene.channel.serial - 1), days=400)
    scene.put(channel=other)
    refused(scene, EquivocationError, "has number 1, which was seen before with other content")


def test_the_channel_of_another_repository_of_the_same_publisher(scene: Scene) -> None:
    scene.put(channel=scene.resign(replace(scene.channel, name="acme/other", serial=5)))
    refused(scene, ForeignChannelError, "is the channel acme/other, expected acme/no-harm")


@pytest.mark.parametrize(
    "path",
    ["../../etc/cron.d/x", "/etc/passwd", "packs/1.0.0/../../x.nest", "packs/1.0.0/no-harm.nest/../../../x", "C:\\x",
     "patches\\1.0.0\\no-harm.nest", "packs/1.0.0/other.nest", "packs/2.0.0/no-harm.nest", "packs/1.0.0/no-harm.nest\0",
     ""],
)  # fmt: skip
def test_paths_that_escape(scene: Scene, path: str) -> None:
    file = scene.channel.packs[0].file
    scene.put(channel=scene.resign(scene.listed("1.0.0", file=replace(file, path=path))))
    refused(scene, ChannelPathError, "lists the file")


@pytest.mark.parametrize("suffix", ["/../../../.ssh/authorized_keys", ".sig/..", ".0123.sig", "", ".pth"])
def test_signature_paths_that_escape(scene: Scene, suffix: str) -> None:
    file = scene.channel.packs[0].file
    odd = ListedFile(f"{file.path}{suffix}", 10, "0" * 64)
    scene.put(channel=scene.resign(scene.listed("1.0.0", signatures=(odd,))))
    refused(scene, ChannelPathError, "lists the file")


@pytest.mark.parametrize(
    ("field", "value"), [("name", "../x"), ("name", "a/b"), ("name", ".hidden"), ("version", "1.0"), ("version", "../1.0.0")]
)
def test_names_that_escape(scene: Scene, field: str, value: str) -> None:
    scene.put(channel=scene.resign(scene.listed("1.0.0", **{field: value})))
    refused(scene, ChannelFormatError, "is invalid")


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
    with pytest.raises(ChannelKeyError, match="its key is not, or no longer, trusted here"):
        scene.update()
    scene.key = key
    assert scene.state() == before


def test_nobody_is_trusted(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(ChannelKeyError, match="not, or no longer, trusted"):
        pull(REPO, tmp_path / "got.nest", policy=Policy())
    assert not (tmp_path / "got.nest").exists()
    assert pull(REPO, tmp_path / "got.nest", allow_unsigned=True, policy=Policy()).signers == {}
