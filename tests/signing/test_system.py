"""The administrator's policy: what a user cannot lower, and which file is the administrator's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nestpatch
from nestpatch.errors import TrustError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.signing import keys, store
from nestpatch.signing.store import load_policy, save_policy
from nestpatch.signing.subject import Subject
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from nestpatch.signing.verify import UnverifiedPack, VerifiedPack, sign_pack, verify_signature
from tests.calls import run
from tests.helpers import PROPERTY, tiny_checkpoint, tiny_pack, tree_digest
from tests.signing.conftest import People

pytestmark = pytest.mark.usefixtures("own_home")
FILE = "/etc/nestpatch/trust.json"


def administer(policy: Policy | Any) -> Path:
    """The administrator writes a policy."""
    file = store.SYSTEM_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    value = policy.content() if isinstance(policy, Policy) else policy
    file.write_text(json.dumps(value), encoding="utf-8")
    file.chmod(0o644)
    return file


@pytest.fixture(autouse=True)
def administrator(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests."""
    monkeypatch.setattr(store, "SYSTEM_OWNER", os.getuid())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and an unsigned pack for it."""
    folder = tmp_path / "place"
    nest.write(tiny_pack(tiny_checkpoint(folder / "model")), folder / "no-harm.nest")
    return folder


def test_the_administrators_keys_count_for_every_user(people: People, pack: Path) -> None:
    administer(people.policy("acme"))
    with pytest.raises(UnsignedError):
        verify_signature(pack, load_policy())
    sign_pack(pack, people.acme)
    assert isinstance(verify_signature(pack, load_policy()), VerifiedPack)


def test_no_rule_of_a_user_lifts_one_of_the_administrator(people: People, place: Path, tmp_path: Path) -> None:
    file = administer(Policy(people.policy("audit").keys, (Rule("*", 1),)))
    save_policy(Policy(people.policy("evil").keys, (Rule("*", 0),)))
    sign_pack(place / "no-harm.nest", people.evil)
    named = tmp_path / "mine.json"
    named.write_text(json.dumps(Policy(rules=(Rule("*", 0),)).content()), encoding="utf-8")
    before = tree_digest(place)
    for more in ([], ["--allow-unsigned"], ["--policy", named], ["--policy", named, "--allow-unsigned"]):
        refused = run("apply", place / "model", place / "no-harm.nest", "--in-place", *more)
        assert refused.exit_code == 1
        said = " ".join(refused.stderr.split())
        assert said.startswith("UntrustedError: no-harm.nest is signed by ")
        assert f"{file} requires 1 signature for '*'" in said
        assert ("which allowing unsigned packs does not lift" in said) is ("--allow-unsigned" in more)
        assert "can only be changed in that file" in said
    exported = run("export", place / "model", place / "no-harm.nest", "--to", "lora", "--allow-unsigned")
    assert (exported.exit_code, exported.stderr.startswith("UntrustedError")) == (1, True)
    with pytest.raises(UntrustedError):
        nestpatch.apply_in_place(place / "model", place / "no-harm.nest", allow_unsigned=True)
    assert tree_digest(place) == before
    sign_pack(place / "no-harm.nest", people.audit)
    assert run("apply", place / "model", place / "no-harm.nest", "--in-place").exit_code == 0


def test_an_administrator_who_only_lists_keys_asks_for_one_of_them(people: People, pack: Path) -> None:
    administer(people.policy("audit"))
    save_policy(Policy(people.policy("evil").keys, (Rule("*", 0),)))
    sign_pack(pack, people.evil)
    with pytest.raises(UntrustedError, match=r"trust\.json requires 1 signature for '\*'"):
        verify_signature(pack, load_policy(), allow_unsigned=True)


def test_an_administrator_who_asks_for_nothing_leaves_the_user_as_strict_as_before(people: People, pack: Path) -> None:
    administer(Policy(people.policy("audit").keys, (Rule("*", 0),)))
    assert isinstance(verify_signature(pack, load_policy()), UnverifiedPack)
    save_policy(people.policy("acme"))
    with pytest.raises(UnsignedError):
        verify_signature(pack, load_policy())
    assert isinstance(verify_signature(pack, load_policy(), allow_unsigned=True), UnverifiedPack), "the user's own rule"
    sign_pack(pack, people.audit)
    assert isinstance(verify_signature(pack, load_policy()), VerifiedPack), "the administrator's keys count for user rules"


def test_a_user_asks_for_more_than_the_administrator(people: People, pack: Path) -> None:
    administer(people.policy("audit"))
    save_policy(Policy(people.policy("acme", "third").keys, (Rule("*", 2, ("acme", "third")),)))
    for person in (people.audit, people.acme):
        sign_pack(pack, person)
        with pytest.raises(UntrustedError):
            verify_signature(pack, load_policy())
    sign_pack(pack, people.third)
    found = verify_signature(pack, load_policy())
    assert isinstance(found, VerifiedPack)
    assert {signer.name for signer in found.signers} == {"audit", "acme", "third"}


def test_a_user_does_not_widen_a_key_of_the_administrator(people: People, pack: Path) -> None:
    administer(Policy((TrustedKey("audit", people.audit.public, ("other/*",)),), (Rule("*", 0),)))
    save_policy(people.policy("audit"))
    sign_pack(pack, people.audit)
    with pytest.raises(UntrustedError, match="audit, who is not trusted for this model"):
        verify_signature(pack, load_policy())


def test_a_users_key_with_the_administrators_name_or_id_as_name_does_not_count_as_theirs(people: People, pack: Path) -> None:
    administer(Policy(people.policy("audit", "acme").keys, (Rule("*", 1, ("audit",)),)))
    sign_pack(pack, people.evil)
    for name in ("audit", people.audit.public.key_id):
        save_policy(Policy((TrustedKey(name, people.evil.public),)))
        policy = load_policy()
        assert len({trusted.name for trusted in policy.keys}) == 3
        with pytest.raises(UntrustedError):
            verify_signature(pack, policy, allow_unsigned=True)


def test_two_names_that_meet_both_stay_signers(people: People, pack: Path) -> None:
    administer(Policy(people.policy("acme").keys))
    save_policy(Policy((TrustedKey("acme", people.third.public),)))
    for person in (people.acme, people.third):
        sign_pack(pack, person)
    found = verify_signature(pack, load_policy())
    assert isinstance(found, VerifiedPack)
    assert [s.name for s in found.signers] == ["acme", f"acme ({people.third.public.key_id[:12]})"]


# The file itself


def test_only_the_administrator_may_own_the_file(people: People, monkeypatch: pytest.MonkeyPatch) -> None:
    file = administer(people.policy("acme"))
    assert load_policy().keys
    monkeypatch.setattr(store, "SYSTEM_OWNER", os.getuid() + 1)
    with pytest.raises(TrustError, match="is not the administrator's alone") as caught:
        load_policy()
    assert f"chown root {file}" in caught.value.advice


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o777])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_a_system_policy_that_others_can_write_stops_everything(people: People, place: Path, mode: int, which: str) -> None:
    file = administer(people.policy("acme"))
    spoiled = file if which == "file" else file.parent
    spoiled.chmod(mode | (0o111 if which == "folder" else 0))
    refused = run("apply", place / "model", place / "no-harm.nest", "--in-place", "--allow-unsigned")
    assert refused.exit_code == 1
    assert f"TrustError: {spoiled} is not the administrator's alone" in " ".join(refused.stderr.split())


def test_a_link_leads_to_no_folder_that_others_can_write(people: People, tmp_path: Path) -> None:
    file = administer(people.policy("acme"))
    shared = tmp_path / "shared"
    shared.mkdir()
    file.rename(shared / "trust.json")
    file.symlink_to(shared / "trust.json")
    assert load_policy().keys
    shared.chmod(0o777)
    with pytest.raises(TrustError, match="shared is not the administrator's alone"):
        load_policy()


@pytest.mark.parametrize("how", ["directory", "pipe", "link", "empty", "json", "folder is a file"])
def test_a_system_policy_that_is_none_stops_everything(how: str) -> None:
    file = store.SYSTEM_FILE
    if how == "folder is a file":
        file.parent.parent.mkdir()
        file.parent.touch()
    else:
        file.parent.mkdir(parents=True)
        {
            "directory": file.mkdir,
            "pipe": lambda: os.mkfifo(file),
            "link": lambda: file.symlink_to("gone"),
            "empty": file.touch,
            "json": lambda: file.write_text("[]", encoding="utf-8"),
        }[how]()
    with pytest.raises(TrustError, match=r"trust\.json"):
        load_policy()
    assert run("trust", "list").exit_code == 1


def test_no_variable_names_another_system_policy(people: People, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    administer(people.policy("acme"))
    for name in ("NESTPATCH_HOME", "XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", "HOME", "PROGRAMDATA", "APPDATA"):
        monkeypatch.setenv(name, str(pack.parent))
    with pytest.raises(UnsignedError):
        verify_signature(pack, load_policy(), allow_unsigned=True)


def test_a_system_rule_does_not_follow_the_users_home(people: People) -> None:
    administer(Policy(people.policy("acme").keys, (Rule("~/models/*", 1), Rule("*", 0))))
    with pytest.raises(TrustError, match="each user decides where a home folder is"):
        load_policy()


# What is shown, and what is removed


def test_the_list_shows_both_files(people: People, tmp_path: Path) -> None:
    file = administer(Policy(people.policy("audit").keys, (Rule("/srv/*", 1, ("audit",)),)))
    save_policy(people.policy("acme"))
    shown = run("trust", "list").stdout
    assert shown.index("acme") < shown.index("administrator of this machine") < shown.index("audit")
    assert "packs for /srv/* need 1 signatures of audit" in shown
    facts = json.loads(run("trust", "list", "--json").stdout)
    assert [key["name"] for key in facts["keys"]] == ["acme"]
    assert (facts["system"]["file"], [key["name"] for key in facts["system"]["keys"]]) == (str(file), ["audit"])


def test_adding_a_key_copies_none_of_the_administrators(people: People, tmp_path: Path) -> None:
    administer(people.policy("audit"))
    pair = keys.keygen(tmp_path / "acme", None)
    assert run("trust", "add", pair.public).exit_code == 0
    own = json.loads(store.trust_file().read_text(encoding="utf-8"))
    assert [key["name"] for key in own["keys"]] == ["acme"]
    assert own["rules"] == []


def test_a_system_key_is_not_removed_by_a_user(people: People) -> None:
    file = administer(people.policy("audit"))
    for text in ("audit", people.audit.public.key_id[:12]):
        refused = run("trust", "remove", text)
        said = " ".join(refused.stderr.split())
        assert refused.exit_code == 1
        assert f"TrustError: {text!r} is a key of this machine's administrator, in {file}" in said
        assert f"Ask the administrator to remove it from {file}" in said


# The combination is a pure function

KEYS = [keys.PrivateKey.generate().public for _ in range(4)]
PATTERNS = st.sampled_from(["*", "/srv/*", "/srv/models/x", "team/*", "team/z", "other/*"])


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that a file can hold."""
    chosen = draw(st.lists(st.sampled_from(range(4)), unique=True))
    trusted = tuple(
        TrustedKey(draw(st.sampled_from(["a", "b"])) + str(i), KEYS[i], tuple(draw(st.lists(PATTERNS, min_size=1, max_size=2))))
        for i in chosen
    )
    rules = []
    for _ in range(draw(st.integers(0, 3))):
        named = draw(st.lists(st.sampled_from([t.name for t in trusted]), unique=True)) if trusted else []
        most = len(named) or len(trusted)
        rules.append(Rule(draw(PATTERNS), draw(st.integers(0, most)), tuple(named)))
    return Policy(trusted, tuple(rules)).checked()


SUBJECTS = st.builds(
    Subject,
    st.sampled_from([None, (), ("/srv/models/x",), ("/home/me/x",)]),
    st.sampled_from(["", "team/z", "other/x"]),
    st.sampled_from(["team/z", "team/y", "other/x", "x", ""]),
)
SIGNED = st.sets(st.sampled_from([key.key_id for key in KEYS]))


@PROPERTY
@given(policies(), policies(), SUBJECTS, SIGNED)
def test_a_user_never_lowers_what_the_system_asks_for(system: Policy, user: Policy, subject: Subject, signed: set[str]) -> None:
    known = {trusted.key.key_id for trusted in system.keys} & signed
    alone = system.weigh(subject, known)
    both = user.under(system, FILE).checked().weigh(subject, signed)
    above = [rule for rule in both.unmet if rule.source]
    assert bool(above) == bool(alone.unmet)
    assert [replace(rule, keys=(), source="") for rule in above] == [replace(rule, keys=()) for rule in alone.unmet]


@PROPERTY
@given(policies(), policies(), SUBJECTS)
def test_an_unsigned_pack_passes_both_or_neither(system: Policy, user: Policy, subject: Subject) -> None:
    """Neither of the two lowers what the other asks for."""
    both = user.under(system, FILE).weigh(subject, ())
    assert bool(both.unmet) is bool(system.weigh(subject, ()).unmet or user.weigh(subject, ()).unmet)


@PROPERTY
@given(policies(), SUBJECTS, SIGNED, SIGNED)
def test_more_signatures_never_hurt(policy: Policy, subject: Subject, signed: set[str], more: set[str]) -> None:
    less, all_of_them = policy.weigh(subject, signed), policy.weigh(subject, signed | more)
    if not less.unmet and less.counting:
        assert not all_of_them.unmet
    assert less.counting <= all_of_them.counting or not less.unmet


@PROPERTY
@given(policies(), SUBJECTS, st.sampled_from(["team/z", "team/y", "other/x", "", "x"]))
def test_what_an_unsigned_pack_says_of_its_base_changes_nothing(policy: Policy, subject: Subject, claim: str) -> None:
    """Neither whether it passes nor what it lacks."""
    assert policy.weigh(subject, ()) == policy.weigh(replace(subject, base=claim), ())


@PROPERTY
@given(policies())
def test_without_a_system_policy_the_users_is_taken_as_it_is(user: Policy) -> None:
    assert user.under(Policy(), FILE) is user
