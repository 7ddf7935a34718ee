"""What somebody may try with other places, other clocks and a stolen key against what a user has seen of a channel."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.channels._memory import Memory, address_file, held, keep, memory_file, recall, recall_channel
from nestpatch.channels._release import hand_over
from nestpatch.channels.follow import follow
from nestpatch.channels.listing import CHANNEL_FILE, MAX_FIRST, MAX_NUMBER, Channel
from nestpatch.channels.publish import push, renew, yank
from nestpatch.channels.readers import ChannelFile, FolderReader
from nestpatch.channels.rules import MAX_JUMP, SeenChannel
from nestpatch.errors import (
    ChannelError,
    ChannelFormatError,
    ChannelKeyError,
    ClockError,
    EquivocationError,
    ForeignChannelError,
    RollbackError,
    SerialJumpError,
)
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.trust import Policy, TrustedKey
from tests.hub.scene import REPO, Scene, refused, updated
from tests.hub.web import Web

HUB = f"hub://{REPO}"


def refused_at(scene: Scene, place: str, error: type[Exception], match: str) -> None:
    """Following the channel at another place raises this error; nothing is applied, and nothing remembered of the place."""
    before, known = scene.state(), recall(place)
    with pytest.raises(error, match=match) as caught:
        updated(scene.model, scene.policy, [place])
    assert type(caught.value) is error
    assert (scene.state(), recall(place)) == (before, known)


def handed(scene: Scene, new: PrivateKey) -> Channel:
    """The channel of the server as it would be under a new key."""
    return hand_over(scene.channel, scene.key, new)


def rotated(scene: Scene) -> PrivateKey:
    """The publisher hands the channel over; the new key."""
    new = PrivateKey.generate()
    with scene.as_publisher():
        assert renew(REPO, scene.key, new).serial == 1
    return new


# Other places


@pytest.mark.parametrize("kind", ["folder", "web"])
def test_a_mirror_cannot_serve_what_is_older_than_what_the_hub_has_shown(scene: Scene, tmp_path: Path, kind: str) -> None:
    old = scene.mirror(tmp_path / "old")
    scene.publish("1.1.0", 1)
    assert scene.update(check=True).after == "1.1.0"
    server = Web(old)
    server.listener.start()
    place = old.as_uri() if kind == "folder" else server.url
    refused_at(scene, place, RollbackError, "has number 1 of .*; 2 was seen before")
    server.listener.stop()


def test_the_hub_cannot_serve_what_is_older_than_what_a_mirror_has_shown(scene: Scene, tmp_path: Path) -> None:
    old = scene.read(CHANNEL_FILE)
    scene.publish("1.1.0", 1)
    mirror = scene.mirror(tmp_path / "mirror")
    assert updated(scene.model, scene.policy, [mirror.as_uri()], check=True)[0].after == "1.1.0"
    scene.put(channel=old)
    refused(scene, RollbackError, "has number 1 of .*; 2 was seen before")


def test_a_withdrawal_is_not_hidden_by_another_address(scene: Scene, tmp_path: Path) -> None:
    """The attack that matters: the version was withdrawn, and a copy of the day before says that it stands."""
    scene.publish("1.1.0", 1)
    yesterday = scene.mirror(tmp_path / "yesterday")
    scene.yank("1.1.0", "breaks things")
    assert scene.update().state == "current"
    refused_at(scene, yesterday.as_uri(), RollbackError, "3 was seen before")


def test_two_places_that_say_different_things_under_one_number(scene: Scene, tmp_path: Path) -> None:
    mirror = scene.mirror(tmp_path / "mirror")
    other = scene.resign(replace(scene.channel, serial=0), days=400)
    (mirror / CHANNEL_FILE).write_bytes(other)
    refused_at(scene, mirror.as_uri(), EquivocationError, "has number 1, which was seen before with other content")


def test_a_mirror_from_before_a_hand_over(scene: Scene, tmp_path: Path) -> None:
    """Its number is higher than that of the new key, whose count has just begun."""
    for number in range(1, 4):
        scene.publish(f"1.{number}.0", number)
    before = scene.mirror(tmp_path / "before")
    rotated(scene)
    assert scene.update(check=True).serial == 1
    refused_at(scene, before.as_uri(), RollbackError, "from before that key handed the channel over")


def test_a_mirror_that_is_up_to_date_is_the_same_channel(scene: Scene, tmp_path: Path) -> None:
    scene.publish("1.1.0", 1)
    mirror = scene.mirror(tmp_path / "mirror")
    assert updated(scene.model, scene.policy, [mirror.as_uri()])[0].after == "1.1.0"
    known, there = recall(HUB), recall(mirror.as_uri())
    assert known is not None
    assert there is not None
    assert known.seen == there.seen, "one memory"
    assert known.seen.serial == 2
    assert known.revision != there.revision, "the last answer of an address is its own"


@pytest.mark.parametrize("known_elsewhere", [False, True])
def test_a_place_that_serves_another_channel_of_the_same_key(scene: Scene, tmp_path: Path, known_elsewhere: bool) -> None:
    mirror = scene.mirror(tmp_path / "mirror")
    updated(scene.model, scene.policy, [mirror.as_uri()])
    with scene.as_publisher():
        push(scene.pack("2.0.0", 2), str(tmp_path / "other"), scene.key, name="other")
    if known_elsewhere:
        assert follow(FolderReader(tmp_path / "other"), scene.policy).accepted.channel.name == "other"
    shutil.copy(tmp_path / "other" / CHANNEL_FILE, mirror / CHANNEL_FILE)
    refused_at(scene, mirror.as_uri(), ForeignChannelError, "is the channel other, expected acme/no-harm")


def test_a_place_that_serves_a_channel_of_its_name_and_of_another_trusted_key(scene: Scene, tmp_path: Path) -> None:
    mirror = scene.mirror(tmp_path / "mirror")
    both = Policy((*scene.policy.keys, TrustedKey("evil", scene.evil.public)))
    updated(scene.model, both, [mirror.as_uri()])
    (mirror / CHANNEL_FILE).write_bytes(scene.resign(replace(scene.channel, serial=7), scene.evil))
    with pytest.raises(ChannelKeyError, match="is not signed by its root key"):
        updated(scene.model, both)
    fresh = shutil.copytree(mirror, tmp_path / "fresh")
    assert follow(FolderReader(fresh), both).accepted.channel.serial == 8, "elsewhere it is a channel of its own"
    assert scene.update(check=True, channels=[REPO]).serial == 1, "and the other one is where it was"


def test_what_another_process_saw_meanwhile_counts(scene: Scene, tmp_path: Path) -> None:
    """A place answers with an old copy; before that is judged, another process has seen the newer one."""
    old = scene.mirror(tmp_path / "old")
    scene.publish("1.1.0", 1)

    class Slow(FolderReader):
        def channel(self, known: str = "") -> ChannelFile:
            answer = super().channel(known)
            scene.update(check=True)
            return answer

    with pytest.raises(RollbackError, match="2 was seen before"):
        follow(Slow(old), scene.policy)
    seen = recall_channel(memory_file(scene.key.public.key_id, REPO), REPO)
    assert seen is not None
    assert seen.serial == 2


def test_many_at_once_remember_the_newest(scene: Scene, tmp_path: Path) -> None:
    """Copies of all ages, each at a place of its own: whoever comes late is refused, and forgets nothing for the others."""
    copies = [scene.mirror(tmp_path / "1")]
    for number in range(2, 6):
        scene.publish(f"1.{number}.0", number)
        copies.append(scene.mirror(tmp_path / str(number)))
    outcomes: list[object] = []

    def run(folder: Path) -> None:
        try:
            outcomes.append(follow(FolderReader(folder), scene.policy).accepted.channel.serial)
        except ChannelError as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=run, args=(folder,)) for folder in copies * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(5) == 4
    assert {found for found in outcomes if not isinstance(found, int)} <= {RollbackError}
    seen = recall_channel(memory_file(scene.key.public.key_id, REPO), REPO)
    assert seen is not None
    assert seen.serial == 5


def test_the_memory_does_not_go_back_behind_a_hand_over(scene: Scene) -> None:
    old = recall(HUB)
    assert old is not None
    rotated(scene)
    scene.update(check=True)
    new = recall(HUB)
    assert new is not None
    assert new.seen.order == (1, 1)
    with held():
        keep(HUB, Memory(replace(old.seen, serial=50), "x", old.data))
    assert recall(HUB) == new


# What is remembered


def test_a_broken_memory_of_a_channel_names_the_way_out(scene: Scene, tmp_path: Path) -> None:
    mirror = scene.mirror(tmp_path / "mirror")
    file = memory_file(scene.key.public.key_id, REPO)
    good = json.loads(file.read_text(encoding="utf-8"))
    for broken in ("", "[]", "\x00", "{" * 5000, json.dumps(good | {"roots": []}), json.dumps(good | {"name": "other"}),
                   json.dumps(good | {"roots": [scene.evil.public.pem]}), json.dumps(good | {"serial": "1"})):  # fmt: skip
        file.write_text(broken, encoding="utf-8")
        for place in (HUB, mirror.as_uri()):
            with pytest.raises(ChannelFormatError, match="what is remembered of the channel acme/no-harm is broken") as caught:
                updated(scene.model, scene.policy, [place])
            assert f"Removing the file ({file})" in caught.value.advice
    file.unlink()
    assert scene.update().state == "current"
    assert file.is_file()


def test_a_memory_of_an_earlier_nestpatch_stands_in_no_way(scene: Scene) -> None:
    """One file for each place, named by its digest."""
    address_file(HUB).rename(address_file(HUB).parent.parent / address_file(HUB).name)
    memory_file(scene.key.public.key_id, REPO).unlink()
    assert scene.update().state == "current"


def test_a_channel_of_the_greatest_length_is_remembered(scene: Scene, tmp_path: Path) -> None:
    """Written into JSON once more it is longer than what readers of signed files take."""
    mirror = scene.mirror(tmp_path / "mirror")
    file = mirror / CHANNEL_FILE
    file.write_bytes(file.read_bytes() + b"\n" * ((1 << 20) - file.stat().st_size))
    assert updated(scene.model, scene.policy, [mirror.as_uri()])[0].state == "current"
    assert updated(scene.model, scene.policy, [mirror.as_uri()])[0].state == "current"


def test_a_later_key_alone_was_trusted_at_first_contact(scene: Scene, tmp_path: Path) -> None:
    """Who trusts the first key later has the same channel, and the same memory."""
    home = os.environ["NESTPATCH_HOME"]
    os.environ["NESTPATCH_HOME"] = str(tmp_path / "another user")
    try:
        new = rotated(scene)
        scene.key, first = new, scene.key
        old = scene.mirror(tmp_path / "old")
        scene.publish("1.1.0", 1)
        later = Policy((TrustedKey("later", new.public),))
        assert follow(FolderReader(scene.mirror(tmp_path / "now")), later).accepted.channel.serial == 2
        scene.key = first
        assert updated(scene.model, scene.policy, [HUB], check=True)[0].after == "1.1.0"
        refused_at(scene, old.as_uri(), RollbackError, "2 was seen before")
    finally:
        os.environ["NESTPATCH_HOME"] = home


# Clocks


def test_a_clock_that_is_behind_the_channel(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever can turn a clock back could serve an old copy for ever."""
    issued = scene.channel.issued
    monkeypatch.setattr("nestpatch.channels.follow.utc_now", lambda: "2020-01-01T00:00:00Z")
    refused(scene, ClockError, f"was issued at {issued}; this machine's clock says that it is 2020-01-01T00:00:00Z")


def test_a_channel_of_the_future(scene: Scene) -> None:
    """A thief of the key cannot make a channel that begins next year."""
    scene.put(channel=scene.resign(scene.channel, now="2999-01-01T00:00:00Z"))
    refused(scene, ClockError, "was issued at 2999-01-01T00:00:00Z")


def test_a_publisher_whose_clock_is_behind(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestpatch.channels.publish.utc_now", lambda: "2020-01-01T00:00:00Z")
    before = scene.read(CHANNEL_FILE)
    with scene.as_publisher():
        for act in (lambda: push(scene.pack("1.1.0", 1), REPO, scene.key), lambda: renew(REPO, scene.key),
                    lambda: yank(REPO, "1.0.0", "x", scene.key)):  # fmt: skip
            with pytest.raises(ClockError, match="2020-01-01T00:00:00Z"):
                act()
    assert scene.read(CHANNEL_FILE) == before


# A stolen key


def test_a_thief_who_runs_ahead_of_the_count(scene: Scene) -> None:
    scene.put(channel=scene.resign(replace(scene.channel, serial=MAX_NUMBER - 2)))
    refused(scene, SerialJumpError, f"has number {MAX_NUMBER - 1}; 1 was seen before, and at most {1 + MAX_JUMP} could follow")


def test_a_thief_who_runs_ahead_before_the_first_contact(scene: Scene, tmp_path: Path) -> None:
    mirror = scene.mirror(tmp_path / "mirror")
    (mirror / CHANNEL_FILE).write_bytes(scene.resign(replace(scene.channel, serial=MAX_FIRST)))
    address_file(HUB).unlink()
    memory_file(scene.key.public.key_id, REPO).unlink()
    refused_at(scene, mirror.as_uri(), SerialJumpError, "none was seen before, and at most 1000000 could follow")


def test_a_hand_over_outranks_every_number_of_the_stolen_key(scene: Scene) -> None:
    """This machine has seen the highest number that there is, from the thief."""
    known = recall(HUB)
    assert known is not None
    with held():
        keep(HUB, Memory(SeenChannel(REPO, MAX_NUMBER - 1, "0" * 64, known.seen.roots), known.revision, known.data))
    scene.publish("1.1.0", 1)
    refused(scene, RollbackError, f"{MAX_NUMBER - 1} was seen before")
    rotated(scene)
    done = scene.update()
    assert (done.after, done.serial) == ("1.1.0", 1)


def test_of_two_hand_overs_of_one_key_the_first_that_was_seen_stays(scene: Scene, tmp_path: Path) -> None:
    stolen = handed(scene, scene.evil)
    rotated(scene)
    assert scene.update(check=True).serial == 1
    forged = scene.resign(replace(stolen, serial=40), scene.evil)
    mirror = scene.mirror(tmp_path / "mirror")
    (mirror / CHANNEL_FILE).write_bytes(forged)
    refused_at(scene, mirror.as_uri(), ChannelKeyError, "is not signed by its root key")
    scene.put(channel=forged)
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_both_hand_overs_in_one_channel_count_as_the_first(scene: Scene) -> None:
    stolen = handed(scene, scene.evil)
    rotated(scene)
    scene.update(check=True)
    both = (*scene.channel.successions, *stolen.successions)
    scene.put(channel=scene.resign(replace(scene.channel, successions=both), scene.evil))
    refused(scene, ChannelKeyError, "is not signed by its root key")
    scene.put(channel=scene.resign(replace(scene.channel, successions=both[::-1]), scene.evil))
    refused(scene, ChannelKeyError, "is not signed by its root key")


def test_a_key_that_gets_the_channel_back_counts_anew(scene: Scene, tmp_path: Path) -> None:
    """Its old channels have higher numbers and its signature; they are from an earlier time in office all the same."""
    for number in range(1, 4):
        scene.publish(f"1.{number}.0", number)
    first = scene.mirror(tmp_path / "first")
    new = rotated(scene)
    with scene.as_publisher():
        renew(REPO, new, scene.key)
    assert scene.update(check=True).serial == 1
    known = recall(HUB)
    assert known is not None
    assert known.seen.order == (2, 1)
    refused_at(scene, first.as_uri(), RollbackError, "from before that key handed the channel over")


# Publishers


def test_a_publisher_who_has_seen_a_newer_channel_elsewhere(scene: Scene, tmp_path: Path) -> None:
    old = scene.repo.resolve("main")
    scene.publish("1.1.0", 1)
    mirror = scene.mirror(tmp_path / "mirror")
    scene.repo.set_ref("refs/heads/main", old)
    address_file(HUB).unlink()
    with scene.as_publisher():
        address_file(HUB).unlink()
        assert follow(FolderReader(mirror), scene.policy).accepted.channel.serial == 2
        for act in (lambda: push(scene.pack("1.2.0", 2), REPO, scene.key), lambda: renew(REPO, scene.key, scene.evil)):
            with pytest.raises(RollbackError, match=r"has number 1 of .*; 2 was seen before") as caught:
                act()
            assert "Nothing was published. Put the newest channel back there" in caught.value.advice
    assert scene.channel.serial == 1


def test_a_publisher_after_a_thief_who_ran_ahead(scene: Scene) -> None:
    """The way out that the advice names: the last channel of one's own, then a hand-over."""
    own = scene.read(CHANNEL_FILE)
    scene.put(channel=scene.resign(replace(scene.channel, serial=MAX_NUMBER - 2)))
    with scene.as_publisher(), pytest.raises(SerialJumpError) as caught:
        renew(REPO, scene.key, scene.evil)
    assert "put your own last channel back" in caught.value.advice
    scene.put(channel=own)
    rotated(scene)
    assert scene.update(check=True).serial == 1
