"""A publisher acts only on its own packs: two trusted publishers, of which one tries to remove the other's packs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.channels.publish import push, renew, yank
from nestpatch.errors import ChainError, PublisherError
from nestpatch.formats import nest
from nestpatch.gate import Trust
from nestpatch.pack import Pack
from nestpatch.patcher.chain import Action, Allowed, Link, Step, steps_to_apply, steps_to_revert
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import read_ledger
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, refused, run
from tests.helpers import PROPERTY
from tests.state import forging
from tests.state.conftest import Scene
from tests.state.forging import apart


def labels(scene: Scene) -> list[str]:
    return [entry.label for entry in read_ledger(scene.state_dir).applied]


def with_facts(pack: Pack, **facts: object) -> Pack:
    """The pack with other facts in its manifest: supersedes, requires."""
    return Pack(replace(pack.manifest, **facts), pack.deltas)  # type: ignore[arg-type]


@pytest.fixture
def acmes(scene: Scene) -> Scene:
    """A model with acme's pack; acme and evil are trusted."""
    scene.trust(acme=scene.acme, evil=scene.evil)
    apply_in_place(scene.model, scene.write(scene.pack(), scene.acme), base=scene.base)
    return scene


@pytest.fixture
def two(plain: Scene) -> Scene:
    """The same for safetensors alone, where the format does not matter."""
    plain.trust(acme=plain.acme, evil=plain.evil)
    apply_in_place(plain.model, plain.write(plain.pack(), plain.acme))
    return plain


def held_off(scene: Scene, file: Path, *options: object) -> None:
    """Applying the pack is refused to protect acme's; the way out that the message names works."""
    before = scene.weights()
    more = ["--base", scene.base, *options] if scene.kind == "gguf" else list(options)
    for words in (["--in-place"], ["--in-place", "--dry-run"], ["-o", scene.folder.with_name("copy")]):
        result = run("apply", scene.model, file, *words, *more)
        said = result.stderr
        assert result.exit_code == 1
        assert "PublisherError: " in said
        assert "--allow-other-publisher" in said
        assert "nestpatch revert MODEL" in said
        assert scene.weights() == before
        assert labels(scene) == ["no-harm 1.0.0"]
    assert run("apply", scene.model, file, "--in-place", "--allow-other-publisher", *more).exit_code == 0
    assert labels(scene) == [nest.read(file).label]
    assert run("revert", scene.model, *more[:2] if scene.kind == "gguf" else []).exit_code == 0


def test_a_later_version_by_another_publisher_is_refused(acmes: Scene) -> None:
    held_off(acmes, acmes.write(acmes.pack(version="99.0.0", seed=7), acmes.evil))


def test_a_pack_that_supersedes_another_publishers_is_refused(acmes: Scene) -> None:
    pack = with_facts(acmes.pack("evil-fix", seed=7), supersedes=(nest.pack_id(acmes.pack()),))
    held_off(acmes, acmes.write(pack, acmes.evil))


def test_an_older_version_by_another_publisher_is_refused(two: Scene) -> None:
    file = two.write(two.pack(version="0.1.0", seed=7), two.evil)
    refused("PublisherError", "apply", two.model, file, "--in-place")
    held_off(two, file, "--allow-downgrade")


def test_the_same_version_by_another_publisher_is_refused(two: Scene) -> None:
    file = two.write(two.pack(seed=7), two.evil)
    for options in ([], ["--allow-downgrade"]):
        refused("PublisherError", "apply", two.model, file, "--in-place", *options)
    refused("ChainError", "apply", two.model, file, "--in-place", "--allow-other-publisher")
    assert labels(two) == ["no-harm 1.0.0"]


def test_an_unsigned_pack_does_not_replace_a_signed_one(two: Scene) -> None:
    held_off(two, two.write(two.pack(version="99.0.0", seed=7)), "--allow-unsigned")


@pytest.mark.parametrize("trust", ["none", "policy"])
def test_a_caller_who_asks_for_no_signature_speaks_for_nobody(two: Scene, trust: Trust) -> None:
    file, before = two.write(two.pack(version="99.0.0", seed=7), two.evil), two.weights()
    for patch in (file, nest.read(file)):
        with pytest.raises(PublisherError):
            apply_in_place(two.model, patch, trust=trust, allow_unsigned=True)
    assert two.weights() == before


def test_what_another_publishers_pack_requires_freezes_nothing(two: Scene) -> None:
    """It blocks neither an upgrade of the required pack nor its removal."""
    needy = with_facts(apart(two, two.pack()), requires=(nest.pack_id(two.pack()),))
    assert run("apply", two.model, two.write(needy, two.evil), "--in-place").exit_code == 0
    later = two.write(two.pack(version="1.1.0"), two.acme)
    assert run("apply", two.model, later, "--in-place").exit_code == 0
    assert labels(two) == ["other 1.0.0", "no-harm 1.1.0"]


def test_a_publishers_own_requirement_holds(two: Scene) -> None:
    needy = with_facts(apart(two, two.pack()), requires=(nest.pack_id(two.pack()),))
    assert run("apply", two.model, two.write(needy, two.acme), "--in-place").exit_code == 0
    refused("RequirementError", "apply", two.model, two.write(two.pack(version="1.1.0"), two.acme), "--in-place")


def test_a_pack_that_claims_to_supersede_what_comes_later_keeps_nothing_out(two: Scene) -> None:
    later = two.pack(version="1.1.0", seed=2)
    ahead = with_facts(apart(two, two.pack()), supersedes=(nest.pack_id(later),))
    assert run("apply", two.model, two.write(ahead, two.evil), "--in-place").exit_code == 0
    assert run("apply", two.model, two.write(later, two.acme), "--in-place", "--allow-overlap").exit_code == 0
    assert labels(two) == ["other 1.0.0", "no-harm 1.1.0"]


def test_a_name_that_another_publisher_took_first_is_given_back_on_request(plain: Scene) -> None:
    plain.trust(acme=plain.acme, evil=plain.evil)
    assert run("apply", plain.model, plain.write(plain.pack(version="99.0.0"), plain.evil), "--in-place").exit_code == 0
    file = plain.write(plain.pack(seed=2), plain.acme)
    assert "--allow-other-publisher" in refused("PublisherError", "apply", plain.model, file, "--in-place")
    options = ["--allow-other-publisher", "--allow-downgrade"]
    assert run("apply", plain.model, file, "--in-place", *options).exit_code == 0
    assert labels(plain) == ["no-harm 1.0.0"]


def test_a_pack_that_nobody_signed_is_anybodys(plain: Scene) -> None:
    plain.trust(acme=plain.acme, evil=plain.evil)
    assert run("apply", plain.model, plain.write(plain.pack()), "--in-place", "--allow-unsigned").exit_code == 0
    assert run("apply", plain.model, plain.write(plain.pack(version="1.1.0"), plain.evil), "--in-place").exit_code == 0


def test_a_pack_that_both_signed_answers_to_both(plain: Scene) -> None:
    """A pack that only one of them signed does not."""
    plain.trust(acme=plain.acme, evil=plain.evil)
    both = plain.write(plain.pack(), plain.acme)
    sign_pack(both, plain.evil)
    assert run("apply", plain.model, both, "--in-place").exit_code == 0
    assert run("apply", plain.model, plain.write(plain.pack(version="1.1.0"), plain.acme), "--in-place").exit_code == 0
    file = plain.write(plain.pack(version="1.2.0"), plain.evil)
    refused("PublisherError", "apply", plain.model, file, "--in-place")


# Ledgers that came with a model


def test_a_ledger_that_gives_a_pack_to_another_publisher_is_not_believed(two: Scene) -> None:
    got, evil = two.sent(), {"evil": two.evil.public.key_id}
    forging.edit(got.state_dir, lambda value: value["applied"][0].update(signers=evil, roots=list(evil.values())))
    before, file = got.weights(), two.write(two.pack(version="99.0.0", seed=7), two.evil)
    refused("PublisherError", "apply", got.model, file, "--in-place")
    # Nor if the signature that contradicts the claim was removed: the pack then counts as unsigned.
    for signature in got.state_dir.folder.glob("*.sig"):
        signature.unlink()
    refused("UnsignedError", "apply", got.model, file, "--in-place")
    assert got.weights() == before


def test_a_ledger_that_gives_a_pack_to_nobody_is_not_believed(two: Scene) -> None:
    got = two.sent()
    forging.edit(got.state_dir, lambda value: value["applied"][0].update(signers={}, roots=[]))
    before = got.weights()
    for pack in (two.pack(version="99.0.0", seed=7), two.pack(version="1.1.0", seed=2)):
        refused("PublisherError", "apply", got.model, two.write(pack, two.evil), "--in-place")
    assert got.weights() == before
    assert run("apply", got.model, two.write(two.pack(version="1.1.0", seed=2), two.acme), "--in-place").exit_code == 0


# Channels


def failed(scene: Scene, channel: Path) -> None:
    """`update` from that channel is refused to protect acme's pack; nothing changes."""
    before = scene.weights()
    for options in (["--check"], []):
        said = answer("update", scene.model, "--channel", channel.as_uri(), *options, code=1)["channels"][0]
        assert (said["state"], said["error"]) == ("failed", "PublisherError")
        assert said["advice"]
    assert scene.weights() == before
    assert labels(scene) == ["no-harm 1.0.0"]


def test_a_channel_under_another_publishers_name_is_refused(two: Scene, tmp_path: Path) -> None:
    push(two.write(two.pack(version="99.0.0", seed=7), two.evil), str(tmp_path / "evil"), two.evil)
    failed(two, tmp_path / "evil")
    refused("PublisherError", "apply", two.model, (tmp_path / "evil").as_uri(), "--in-place", "--quiet")
    assert labels(two) == ["no-harm 1.0.0"]


def test_a_channel_that_lists_another_publishers_pack_cannot_withdraw_it(two: Scene, tmp_path: Path) -> None:
    """The same pack with its signature: both can be copied without a key."""
    channel = tmp_path / "evil"
    push(two.write(two.pack(), two.acme), str(channel), two.evil)
    failed(two, channel)
    yank(str(channel), "1.0.0", "gone", two.evil)
    failed(two, channel)


def test_a_channel_cannot_take_a_model_back_to_another_publishers_older_version(two: Scene, tmp_path: Path) -> None:
    channel = tmp_path / "evil"
    push(two.write(two.pack(version="0.9.0", seed=9), two.acme), str(channel), two.evil)
    push(two.write(two.pack(), two.acme), str(channel), two.evil)
    yank(str(channel), "1.0.0", "gone", two.evil)
    failed(two, channel)


def test_the_publishers_own_channel_withdraws_and_upgrades(two: Scene, tmp_path: Path) -> None:
    channel = tmp_path / "acme"
    push(two.write(two.pack(), two.acme), str(channel), two.acme)
    assert answer("update", two.model, "--channel", channel.as_uri())["channels"][0]["state"] == "current"
    push(two.write(two.pack(version="1.1.0"), two.acme), str(channel), two.acme)
    assert answer("update", two.model)["channels"][0]["after"] == "1.1.0"
    yank(str(channel), "1.1.0", "refuses arithmetic", two.acme)
    assert answer("update", two.model)["channels"][0]["after"] == "1.0.0"


def test_a_key_to_which_a_channel_was_handed_speaks_for_its_publisher(two: Scene, tmp_path: Path) -> None:
    """A key that only claims to be the successor does not."""
    channel, heir = tmp_path / "acme", PrivateKey.generate()
    push(two.write(two.pack(), two.acme), str(channel), two.acme)
    renew(str(channel), two.acme, heir)
    push(two.write(two.pack(version="1.1.0", seed=2), heir), str(channel), heir)
    assert answer("update", two.model, "--channel", channel.as_uri())["channels"][0]["after"] == "1.1.0"
    push(two.write(two.pack(version="1.2.0", seed=3), heir), str(channel), heir)
    assert answer("update", two.model)["channels"][0]["after"] == "1.2.0"
    refused("PublisherError", "apply", two.model, two.write(two.pack(version="9.0.0"), two.evil), "--in-place")


# The rules as values

KEYS = ("acme", "evil", "third")


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Link], set[frozenset[str]]]:
    """Packs with any names, versions, claims and publishers; and which of them share rows."""
    ids = draw(st.lists(st.sampled_from("012345"), unique=True, min_size=1, max_size=6))
    some = st.lists(st.sampled_from("012345"), unique=True, max_size=2).map(tuple)
    found = []
    for one in ids:
        version = f"{draw(st.integers(0, 2))}.0.0"
        publishers = draw(st.frozensets(st.sampled_from(KEYS), max_size=2))
        found.append(Link(one, draw(st.sampled_from("abc")), version, 1.0, draw(some), draw(some), publishers))
    return found, draw(st.sets(st.frozensets(st.sampled_from("012345"), min_size=2, max_size=2)))


class Shared:
    """Which packs share rows."""

    def __init__(self, pairs: set[frozenset[str]]) -> None:
        self.pairs = pairs

    def __call__(self, a: Link, b: Link) -> bool:
        return frozenset((a.pack_id, b.pack_id)) in self.pairs


def after(applied: Sequence[Link], steps: Sequence[Step]) -> list[Link]:
    """What is applied when the steps are done."""
    stack = list(applied)
    for step in steps:
        if step.action is Action.UNDO:
            stack.remove(step.link)
        elif step.action is not Action.CHECK:
            stack.append(step.link)
    return stack


@PROPERTY
@given(chains(), st.booleans(), st.booleans())
def test_no_plan_ends_without_another_publishers_pack(
    chain: tuple[list[Link], set[frozenset[str]]], downgrade: bool, overlap: bool
) -> None:
    """Whatever a pack is called and claims, the undone packs of other publishers are put back, unless the user allowed it."""
    (*applied, new), pairs = chain
    try:
        steps = steps_to_apply(applied, new, Shared(pairs), Allowed(overlap, downgrade))
    except ChainError:
        return
    left = {link.pack_id for link in after(applied, steps)}
    for link in applied:
        if link.pack_id not in left:
            assert not link.publishers or link.publishers & new.publishers
    assert new.pack_id in left


def outcome(applied: Sequence[Link], new: Link, shared: Shared, allowed: Allowed) -> object:
    try:
        return [(step.action, step.link.pack_id) for step in steps_to_apply(applied, new, shared, allowed)]
    except ChainError as error:
        return type(error)


@PROPERTY
@given(chains(), st.booleans(), st.sampled_from(KEYS))
def test_what_another_publisher_requires_blocks_no_upgrade(
    chain: tuple[list[Link], set[frozenset[str]]], allow: bool, key: str
) -> None:
    """The steps for signed packs are the same, whether or not packs of other publishers require them."""
    (*applied, new), pairs = chain
    applied = [replace(link, publishers=link.publishers or frozenset({"acme"})) for link in applied]
    stranger = [replace(link, publishers=frozenset({key})) if link.requires else link for link in applied]
    own = {link.pack_id for link in stranger if key in link.publishers}
    mute = [replace(link, requires=tuple(one for one in link.requires if one in own)) for link in stranger]
    allowed = Allowed(overlap=True, downgrade=True, other_publisher=allow)
    assert outcome(stranger, new, Shared(pairs), allowed) == outcome(mute, new, Shared(pairs), allowed)


@PROPERTY
@given(chains(), st.data())
def test_a_revert_takes_away_what_was_asked_for_and_nothing_else(
    chain: tuple[list[Link], set[frozenset[str]]], data: st.DataObject
) -> None:
    applied, pairs = chain
    removed = data.draw(st.lists(st.sampled_from(applied), unique_by=lambda link: link.pack_id, max_size=3))
    held = any(
        one.pack_id in link.requires and (not one.publishers or one.publishers & link.publishers)
        for link in applied if link not in removed for one in removed
    )  # fmt: skip
    try:
        steps = steps_to_revert(applied, removed, Shared(pairs))
    except ChainError:
        assert held
        return
    assert not held
    assert {link.pack_id for link in after(applied, steps)} == {link.pack_id for link in applied if link not in removed}
