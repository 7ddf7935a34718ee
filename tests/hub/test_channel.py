"""The rules of channels as values: order, trust, succession, and what a model should do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from nestpatch import errors
from nestpatch.channels._release import add, hand_over, issue, mark_yanked, require_next_number
from nestpatch.channels.listing import (
    MAX_FIRST,
    MAX_NUMBER,
    PAYLOAD_TYPE,
    Channel,
    ListedFile,
    ListedPack,
    ListedStatus,
    pack_path,
    parse,
    payload,
    write_envelope,
)
from nestpatch.channels.rules import (
    MAX_JUMP,
    AcceptedChannel,
    ChannelRules,
    GoBack,
    Stay,
    Upgrade,
    choose,
    decide,
    inherit,
    latest,
)
from nestpatch.errors import (
    ChannelError,
    ChannelFormatError,
    ChannelKeyError,
    ClockError,
    EquivocationError,
    PackContentError,
    PublishError,
    RollbackError,
    SerialJumpError,
    VersionError,
    YankedError,
)
from nestpatch.formats.manifest import canonical_json
from nestpatch.signing.envelopes import Envelope
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.subject import Subject
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from tests.helpers import changed

NOW = "2026-11-23T12:00:00Z"
MODEL, OTHER = Subject(("/srv/models/llama",)), Subject(("/home/me/model",))


@pytest.fixture(scope="module")
def keys() -> tuple[PrivateKey, PrivateKey, PrivateKey, PrivateKey]:
    return PrivateKey.generate(), PrivateKey.generate(), PrivateKey.generate(), PrivateKey.generate()


def patch(version: str, *, supersedes: tuple[str, ...] = (), pack_name: str = "no-harm") -> ListedPack:
    file = ListedFile(pack_path(pack_name, version), 100, digest(version))
    return ListedPack(pack_name, version, file, (), "tiny/llama", digest("base"), supersedes)


def digest(version: str) -> str:
    return sha256(version.encode()).hexdigest()


def channel_of(key: PrivateKey, *versions: str) -> Channel:
    channel = Channel("acme/no-harm", key.public)
    for version in versions:
        channel = add(channel, patch(version))
    return channel


def trusting(*keys: PrivateKey, models: tuple[str, ...] = ("*",)) -> Policy:
    return Policy(tuple(TrustedKey(f"key {number}", key.public, models) for number, key in enumerate(keys)))


def admit(data: bytes, policy: Policy, after: AcceptedChannel | None = None, **options: object) -> AcceptedChannel:
    return ChannelRules(policy, NOW, seen=after.seen if after else None, **options).accept(
        *parse(data, "the channel"), "the channel"
    )


def statuses(channel: Channel) -> dict[str, str]:
    return {p.version: p.status.value for p in channel.packs}


def test_what_is_written_is_read(keys: tuple[PrivateKey, ...]) -> None:
    channel = hand_over(mark_yanked(channel_of(keys[0], "1.0.0", "1.1.0"), "1.1.0", "why\nnot"), keys[0], keys[1])
    issued, data = issue(channel, keys[1], NOW)
    envelope, read = parse(data, "it")
    assert read == issued
    assert envelope.signed_by(keys[1].public)
    assert (read.serial, read.issued, read.expires) == (1, NOW, "2026-12-23T12:00:00Z")


def test_versions_follow_each_other(keys: tuple[PrivateKey, ...]) -> None:
    channel = channel_of(keys[0], "1.0.0", "1.10.0", "1.9.0", "2.0.0-rc.1")
    assert statuses(channel) == {"1.0.0": "superseded", "1.9.0": "active", "1.10.0": "active", "2.0.0-rc.1": "active"}
    assert [p.version for p in channel.packs] == ["1.0.0", "1.9.0", "1.10.0", "2.0.0-rc.1"]
    best = latest(channel)
    assert best is not None
    assert best.version == "1.10.0", "a prerelease is nobody's update"
    only = latest(channel_of(keys[0], "1.0.0-rc.1", "1.0.0-rc.2"))
    assert only is not None
    assert only.version == "1.0.0-rc.2"
    assert latest(channel_of(keys[0])) is None


def test_what_supersedes_an_older_one_explicitly(keys: tuple[PrivateKey, ...]) -> None:
    channel = add(channel_of(keys[0], "1.0.0"), patch("1.1.0-rc.1", supersedes=(digest("1.0.0"),)))
    assert statuses(channel) == {"1.0.0": "superseded", "1.1.0-rc.1": "active"}


@pytest.mark.parametrize("new", [patch("1.0.0"), patch("1.0.0+other"), patch("2.0.0", pack_name="other")])
def test_what_cannot_be_added(keys: tuple[PrivateKey, ...], new: ListedPack) -> None:
    with pytest.raises(VersionError):
        add(channel_of(keys[0], "1.0.0"), new)


def test_yanking_makes_the_best_that_stands_active_again(keys: tuple[PrivateKey, ...]) -> None:
    channel = mark_yanked(channel_of(keys[0], "1.0.0", "1.1.0", "1.2.0"), "1.2.0", "bad")
    assert statuses(channel) == {"1.0.0": "superseded", "1.1.0": "active", "1.2.0": "yanked"}
    with pytest.raises(YankedError, match="bad"):
        mark_yanked(channel, "1.2.0", "again")
    with pytest.raises(VersionError, match=r"no version 3\.0\.0") as caught:
        mark_yanked(channel, "3.0.0", "x")
    assert "1.0.0, 1.1.0" in caught.value.advice
    nothing = mark_yanked(mark_yanked(channel, "1.1.0", "bad"), "1.0.0", "bad")
    assert latest(nothing) is None
    with pytest.raises(VersionError, match="no version of acme/no-harm is active"):
        choose(nothing)


@pytest.mark.parametrize(
    ("applied", "expected"),
    [
        (None, "1.1.0"),
        ("1.0.0", "1.1.0"),
        ("1.1.0", None),
        ("2.0.0", None),
        ("1.1.0-rc.1", "1.1.0"),
        ("1.2.0", "back to 1.1.0"),
    ],
)
def test_what_a_model_should_do(keys: tuple[PrivateKey, ...], applied: str | None, expected: str | None) -> None:
    channel = mark_yanked(channel_of(keys[0], "1.0.0", "1.1.0", "1.2.0"), "1.2.0", "bad")
    found = decide(channel, None if applied is None else (applied, digest(applied)))
    best = latest(channel)
    assert best is not None
    if expected is None:
        assert found == Stay()
    else:
        assert found == (GoBack(best, "bad") if "back" in expected else Upgrade(best))


def test_a_yanked_version_leads_up_where_there_is_a_higher_one_and_to_the_base_where_there_is_none(
    keys: tuple[PrivateKey, ...],
) -> None:
    up = mark_yanked(channel_of(keys[0], "1.0.0", "1.1.0"), "1.0.0", "bad")
    assert decide(up, ("1.0.0", digest("1.0.0"))) == Upgrade(up.packs[1])
    none = mark_yanked(channel_of(keys[0], "1.0.0"), "1.0.0", "bad")
    assert decide(none, ("1.0.0", digest("1.0.0"))) == GoBack(None, "bad")
    assert decide(none, None) == Stay()
    assert decide(none, ("1.0.0", digest("somebody else's 1.0.0"))) == Stay()


# Succession


def test_a_key_hands_the_channel_down(keys: tuple[PrivateKey, ...]) -> None:
    first, second, third, _ = keys
    channel, data = issue(channel_of(first, "1.0.0"), first, NOW)
    known = admit(data, trusting(first))
    channel, data = issue(hand_over(channel, first, second), second, NOW)
    then = admit(data, trusting(first), known)
    assert then.seen.roots == (first.public, second.public)
    assert then.policy.find(second.public.key_id) is not None
    channel, data = issue(hand_over(channel, second, third), third, NOW)
    assert admit(data, trusting(first), then).seen.roots == (first.public, second.public, third.public)
    # Who was away meanwhile, who comes new, and who trusts a later key.
    assert admit(data, trusting(first), known).seen.roots[-1] == third.public
    assert admit(data, trusting(first)).seen.roots == (first.public, second.public, third.public)
    assert admit(data, trusting(second)).seen.roots == (second.public, third.public)
    assert admit(data, trusting(third), then).seen.serial == 1, "each key counts anew"


def test_numbers_are_compared_within_one_time_in_office(keys: tuple[PrivateKey, ...]) -> None:
    first, second, _, _ = keys
    channel = replace(channel_of(first, "1.0.0"), serial=MAX_FIRST - 1)
    old, data = issue(channel, first, NOW)
    known = admit(data, trusting(first))
    assert known.seen.order == (0, MAX_FIRST)
    channel, handed = issue(hand_over(old, first, second), second, NOW)
    then = admit(handed, trusting(first), known)
    assert then.seen.order == (1, 1)
    _, same = issue(replace(channel, serial=0), second, NOW, days=3)
    with pytest.raises(EquivocationError):
        admit(same, trusting(first), then)
    with pytest.raises(RollbackError, match="from before that key handed the channel over"):
        admit(data, trusting(first), then)
    _, more = issue(channel, second, NOW)
    with pytest.raises(RollbackError, match=r"has number 1 of .*; 2 was seen before"):
        admit(handed, trusting(first), admit(more, trusting(first), then))


@pytest.mark.parametrize("before", [None, 1, 500])
def test_how_far_a_number_may_go_ahead(keys: tuple[PrivateKey, ...], before: int | None) -> None:
    channel, known = channel_of(keys[0], "1.0.0"), None
    if before is not None:
        known = admit(issue(replace(channel, serial=before - 1), keys[0], NOW)[1], trusting(keys[0]))
    most = MAX_FIRST if before is None else before + MAX_JUMP
    assert admit(issue(replace(channel, serial=most - 1), keys[0], NOW)[1], trusting(keys[0]), known).seen.serial == most
    for serial in (most, MAX_NUMBER - 2):
        with pytest.raises(SerialJumpError, match=f"has number {serial + 1}; .* at most {most} could follow"):
            admit(issue(replace(channel, serial=serial), keys[0], NOW)[1], trusting(keys[0]), known)


def test_a_number_after_a_hand_over_may_not_run_ahead_either(keys: tuple[PrivateKey, ...]) -> None:
    first, second, _, _ = keys
    channel, data = issue(channel_of(first, "1.0.0"), first, NOW)
    known = admit(data, trusting(first))
    ahead = replace(hand_over(channel, first, second), serial=MAX_FIRST)
    with pytest.raises(SerialJumpError, match="none was seen before"):
        admit(issue(ahead, second, NOW)[1], trusting(first), known)


def test_a_publisher_hands_over_before_the_numbers_end(keys: tuple[PrivateKey, ...]) -> None:
    channel = replace(channel_of(keys[0], "1.0.0"), serial=MAX_FIRST)
    with pytest.raises(PublishError, match="new readers take numbers up to 1000000") as caught:
        require_next_number(channel)
    assert "--new-key" in caught.value.advice
    require_next_number(hand_over(channel, keys[0], keys[1]))


@pytest.mark.parametrize(
    ("now", "ahead"),
    [("2026-11-23T11:55:00Z", False), ("2026-11-23T11:54:59Z", True), ("2025-11-23T12:00:00Z", True), (NOW, False)],
)
def test_a_clock_may_be_five_minutes_behind(keys: tuple[PrivateKey, ...], now: str, ahead: bool) -> None:
    _, data = issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)
    for gate in (ChannelRules(trusting(keys[0]), now), ChannelRules(trusting(keys[0]), now, allow_expired=True)):
        if not ahead:
            assert gate.accept(*parse(data, "it"), "it").channel.issued == NOW
            continue
        with pytest.raises(ClockError, match=f"was issued at {NOW}; this machine's clock says that it is {now}") as caught:
            gate.accept(*parse(data, "it"), "it")
        assert "clock" in caught.value.advice


def test_of_two_heirs_of_one_key_the_first_that_was_seen_stays(keys: tuple[PrivateKey, ...]) -> None:
    first, second, third, evil = keys
    channel, data = issue(channel_of(first, "1.0.0"), first, NOW)
    _, good = issue(hand_over(channel, first, second), second, NOW)
    _, forged = issue(replace(hand_over(channel, first, evil), serial=70), evil, NOW)
    known = admit(data, trusting(first))
    for one, other in ((good, forged), (forged, good)):
        with pytest.raises(ChannelKeyError, match="is not signed by its root key"):
            admit(other, trusting(first), admit(one, trusting(first), known))
    # Nor does the heir of the one that came second.
    _, heir = issue(hand_over(hand_over(channel, first, evil), evil, third), third, NOW)
    with pytest.raises(ChannelKeyError, match="is not signed by its root key"):
        admit(heir, trusting(first), admit(good, trusting(first), known))


def test_an_old_key_is_out_of_office(keys: tuple[PrivateKey, ...]) -> None:
    first, second, _, evil = keys
    channel, data = issue(hand_over(channel_of(first), first, second), second, NOW)
    known = admit(data, trusting(first))
    for forged in (issue(channel, first, NOW), issue(hand_over(replace(channel, successions=()), first, evil), evil, NOW)):
        with pytest.raises(ChannelKeyError, match="is not signed by its root key"):
            admit(forged[1], trusting(first), known)


def test_a_succession_counts_for_its_own_channel_and_its_own_key(keys: tuple[PrivateKey, ...]) -> None:
    first, second, _, evil = keys
    other = hand_over(Channel("acme/other", first.public), first, second)
    stolen = replace(channel_of(first, "1.0.0"), successions=other.successions)
    with pytest.raises(ChannelKeyError):
        admit(issue(stolen, second, NOW)[1], trusting(first))
    with pytest.raises(ChannelKeyError):
        admit(issue(hand_over(channel_of(evil, "1.0.0"), evil, second), second, NOW)[1], trusting(first))
    lie = hand_over(channel_of(first), evil, second)
    named = replace(lie, successions=tuple(replace(s, old=first.public.key_id) for s in lie.successions))
    with pytest.raises(ChannelKeyError):
        admit(issue(named, second, NOW)[1], trusting(first))


def test_an_heir_counts_once_and_under_the_same_rules(keys: tuple[PrivateKey, ...]) -> None:
    first, second, audit, _ = keys
    rules = (Rule("*", 2, ("key 0", audit.public.key_id)), Rule("x", 1, (first.public.key_id,)))
    policy = replace(trusting(first, audit), rules=rules)
    after = inherit(policy, (first.public, second.public)).checked()
    assert {t.name: t.key for t in after.keys} == {"key 0": second.public, "key 1": audit.public}
    assert after.rules[0].keys == ("key 0", audit.public.key_id)
    assert after.rules[1].keys == (second.public.key_id,)
    both = trusting(first, second)
    assert inherit(both, (first.public, second.public)) == both
    assert inherit(trusting(audit), (first.public, second.public)) == trusting(audit)


def test_a_key_is_trusted_for_some_models_only(keys: tuple[PrivateKey, ...]) -> None:
    _, data = issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)
    policy = trusting(keys[0], models=("/srv/models/*",))
    assert admit(data, policy, subject=MODEL).channel.serial == 1
    with pytest.raises(ChannelKeyError, match="is not trusted here"):
        admit(data, policy, subject=OTHER)
    known = admit(data, policy, subject=MODEL)
    with pytest.raises(ChannelKeyError, match="not, or no longer, trusted here for this model"):
        admit(data, policy, known, subject=OTHER)


def test_an_unknown_key_that_is_let_in_has_to_stay(keys: tuple[PrivateKey, ...]) -> None:
    channel, data = issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)
    known = admit(data, Policy(), allow_unsigned=True)
    with pytest.raises(ChannelKeyError, match="not signed by its root key"):
        admit(issue(channel, keys[1], NOW)[1], Policy(), known, allow_unsigned=True)


def test_the_same_content_signed_twice_is_the_same_channel(keys: tuple[PrivateKey, ...]) -> None:
    channel = channel_of(keys[0], "1.0.0")
    (_, data), (_, again) = issue(channel, keys[0], NOW), issue(channel, keys[0], NOW)
    assert data != again, "ECDSA signatures differ"
    assert admit(again, trusting(keys[0]), admit(data, trusting(keys[0]))).seen == admit(data, trusting(keys[0])).seen


@pytest.mark.parametrize(
    "change",
    [{"name": "../x"}, {"name": "a/b/c"}, {"serial": -1}, {"serial": 1 << 60},
     {"packs": (patch("1.0.0"), patch("1.0.0+x"))}, {"packs": (patch("1.0.0"), patch("2.0.0", pack_name="b"))},
     {"packs": (replace(patch("1.0.0"), base_sha256="0"),)}, {"packs": (replace(patch("1.0.0"), supersedes=("x",)),)},
     {"packs": (replace(patch("1.0.0"), file=replace(patch("1.0.0").file, size=0)),)}],
)  # fmt: skip
def test_what_makes_no_sense(keys: tuple[PrivateKey, ...], change: dict[str, object]) -> None:
    _, data = issue(replace(channel_of(keys[0], "1.0.0"), **change), keys[0], NOW)  # type: ignore[arg-type]
    with pytest.raises(ChannelFormatError, match="is invalid"):
        parse(data, "it")


def test_times_that_are_none(keys: tuple[PrivateKey, ...]) -> None:
    with pytest.raises(ChannelFormatError, match="expires before it was issued"):
        parse(issue(channel_of(keys[0]), keys[0], NOW, days=0)[1], "it")


def test_a_newer_format_says_so(keys: tuple[PrivateKey, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestpatch.channels.listing.FORMAT", "nestpatch-channel/2")
    _, data = issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)
    monkeypatch.undo()
    with pytest.raises(ChannelFormatError, match="has the format 'nestpatch-channel/2'") as caught:
        parse(data, "it")
    assert "Upgrade nestpatch" in caught.value.advice


def test_only_three_statuses() -> None:
    assert {status.value for status in ListedStatus} == {"active", "superseded", "yanked"}


def test_the_document_names_errors_and_fields_that_exist(keys: tuple[PrivateKey, ...]) -> None:
    document = Path(__file__).parents[2] / "docs" / "fleet.md"
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+Error)`", text))
    assert len(named) > 12
    assert all(issubclass(getattr(errors, name), errors.NestpatchError) for name in named)
    facts = json.loads(payload(issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)[0]))
    for field in (*facts, *facts["packs"][0]):
        assert f"`{field}" in text or f".{field}`" in text or f"[].{field}" in text, field


def signed(key: PrivateKey, value: object) -> bytes:
    return write_envelope(Envelope.sealed(PAYLOAD_TYPE, canonical_json(value).encode("utf-8"), [key]))


def places_in(value: object, path: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The path of every value inside a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places_in(entry, (*path, key))


def test_no_value_of_another_kind_is_more_than_refused(keys: tuple[PrivateKey, ...]) -> None:
    """VerifiedPack by the root key, so that nothing but the reader stands in between."""
    channel = hand_over(channel_of(keys[0], "1.0.0", "1.1.0"), keys[0], keys[1])
    good = json.loads(payload(issue(channel, keys[1], NOW)[0]))
    odd = (None, True, 0, -1, 1 << 70, 1.5, "", "x" * 300, "\x00", [], {}, [[]], {"a": 1}, "9" * 5000 + ".0.0", "\ud83d")
    for path in places_in(good):
        for value in odd:
            if path:
                changed_value = changed(good, partial(put_at, path=path, value=value))
                with suppress(UnicodeEncodeError, PackContentError):
                    data = signed(keys[1], changed_value)
                    check_refused_or_equal(data)


def put_at(target: Any, path: tuple[Any, ...], value: object) -> None:
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value


def check_refused_or_equal(data: bytes) -> None:
    try:
        envelope, channel = parse(data, "it")
    except ChannelError:
        return
    assert payload(channel) == envelope.payload


@pytest.mark.parametrize(
    "text",
    [
        lambda good: good.replace(b'"serial":1', b'"serial": 1'),
        lambda good: good.replace(b'"serial":1', b'"serial":1,"serial":1'),
        lambda good: good.replace(b'"reason":""', b'"reason":"\\ud83d"'),
        lambda good: good.replace(b'"reason":""', b'"reason":"\\u0041"'),
        lambda good: good.replace(b'"serial":1', b'"serial":1e0'),
        lambda good: good + b" ",
        lambda good: good.decode().encode("utf-16"),
    ],
)
def test_only_the_canonical_form_is_read(keys: tuple[PrivateKey, ...], text: Callable[[bytes], bytes]) -> None:
    good = payload(issue(channel_of(keys[0], "1.0.0"), keys[0], NOW)[0])
    assert text(good) != good
    with pytest.raises(ChannelFormatError):
        parse(write_envelope(Envelope.sealed(PAYLOAD_TYPE, text(good), [keys[0]])), "it")


def test_a_channel_that_nobody_could_read_is_not_issued(keys: tuple[PrivateKey, ...]) -> None:
    channel = mark_yanked(channel_of(keys[0], "1.0.0"), "1.0.0", "x" * (1 << 20))
    with pytest.raises(PublishError, match="readers take 1048576"):
        issue(channel, keys[0], NOW)
