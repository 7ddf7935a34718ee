"""Whom to trust for what: the policy as a value, and its file."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from nestpatch.errors import TrustError
from nestpatch.signing.store import load_policy, save_policy, trust_file
from nestpatch.signing.subject import NO_MODEL, Subject
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from tests.helpers import changed, tiny_checkpoint
from tests.signing.conftest import People

MODEL = Subject(("/srv/models/acme",), base="acme/llama")


def test_who_trusts_nobody_needs_nothing_who_trusts_somebody_needs_one(people: People) -> None:
    assert [rule.require for rule in Policy().rules_for(MODEL)] == [0]
    assert [rule.require for rule in people.policy("acme").rules_for(MODEL)] == [1]
    # Also for models that the key does not count for: no pack is left over that nobody needs to sign.
    scoped = Policy((TrustedKey("acme", people.acme.public, ("other/*",)),))
    (rule,) = scoped.rules_for(MODEL)
    assert rule.require == 1
    assert scoped.counting(rule, MODEL) == ()


def test_the_first_rule_that_fits_decides(people: People) -> None:
    rules = (Rule("/srv/models/*", 2), Rule("acme/*", 1), Rule("*", 0))
    policy = Policy(people.policy("acme", "audit").keys, rules)
    assert policy.rules_for(MODEL) == rules[:1]
    assert policy.rules_for(Subject(base="acme/llama")) == rules[1:2]
    assert policy.rules_for(Subject(base="other/llama")) == rules[2:]
    assert policy.rules_for(NO_MODEL) == rules[2:], "without a model only the rule for all models speaks"


def test_keys_count_for_their_models_and_for_the_rules_that_name_them(people: People) -> None:
    acme = TrustedKey("acme", people.acme.public, ("acme/*", "/srv/*"))
    audit = TrustedKey("audit", people.audit.public)
    policy = Policy((acme, audit))
    assert policy.counting(Rule("*", 1), MODEL) == (acme, audit)
    assert policy.counting(Rule("*", 1), Subject((), base="acme-evil/x")) == (audit,)
    assert policy.counting(Rule("*", 1, ("acme",)), MODEL) == (acme,)
    assert policy.counting(Rule("*", 1, (people.audit.public.key_id,)), MODEL) == (audit,)
    assert policy.counting(Rule("*", 1), NO_MODEL) == (acme, audit)


def test_keys_are_added_renamed_and_removed(people: People) -> None:
    policy = Policy().with_key(TrustedKey("acme", people.acme.public)).with_key(TrustedKey("audit", people.audit.public))
    again = policy.with_key(TrustedKey("acme 2026", people.acme.public, ("acme/*",)))
    assert [(t.name, t.models) for t in again.keys] == [("audit", ("*",)), ("acme 2026", ("acme/*",))]
    with pytest.raises(TrustError, match="duplicate name 'audit'"):
        policy.with_key(TrustedKey("audit", people.evil.public))
    assert [t.name for t in policy.without_key("acme").keys] == ["audit"]
    assert [t.name for t in policy.without_key(people.audit.public.key_id[:8]).keys] == ["acme"]
    for nobody in ("nobody", "", people.audit.public.key_id[:7]):
        with pytest.raises(TrustError, match="0 trusted keys match"):
            policy.without_key(nobody)


def test_a_rule_keeps_its_keys(people: People) -> None:
    """Removing a key that a rule needs would turn the rule into another one."""
    policy = Policy(people.policy("acme", "audit").keys, (Rule("*", 2, ("acme", "audit")),))
    with pytest.raises(TrustError, match="names the unknown key 'acme'"):
        policy.without_key("acme")


@pytest.mark.parametrize("require", [3, 100])
def test_a_rule_that_cannot_be_met(people: People, require: int) -> None:
    with pytest.raises(TrustError, match=f"requires {require} signatures, but only 2 keys count"):
        Policy(people.policy("acme", "audit").keys, (Rule("*", require),)).checked()
    with pytest.raises(TrustError, match="requires 2 signatures, but only 1 keys count"):
        Policy(people.policy("acme", "audit").keys, (Rule("*", 2, ("acme", people.acme.public.key_id)),)).checked()


def test_what_the_user_says_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "real")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    real, link = folder.resolve().as_posix(), (tmp_path / "link").as_posix()
    assert set(Subject.of("link").paths or ()) == {link, real}
    assert set(Subject.of(Path("link/model.safetensors")).paths or ()) == {
        link, real, f"{link}/model.safetensors", f"{real}/model.safetensors",
    }  # fmt: skip
    assert Subject.of("acme/llama@v1") == Subject.of("hub://acme/llama") == Subject((), "acme/llama")
    assert Subject.of(None) == NO_MODEL
    assert Subject.of("/no/such/model").paths == ("/no/such/model",)


def test_the_file_keeps_the_value(people: People, own_home: Path) -> None:
    assert load_policy() == Policy()
    policy = Policy(
        (TrustedKey("acmé", people.acme.public, ("acme/*",)), TrustedKey("audit", people.audit.public)),
        (Rule("acme/*", 2, ("acmé", "audit")), Rule("*", 0)),
    )
    file = save_policy(policy)
    assert file == trust_file() == own_home / "trust.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(own_home.stat().st_mode) == 0o700
    assert load_policy() == load_policy(file) == policy
    assert "PRIVATE" not in file.read_text(encoding="utf-8")


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NESTPATCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert trust_file() == tmp_path / "xdg" / "nestpatch" / "trust.json"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trust_file() == tmp_path / ".config" / "nestpatch" / "trust.json"


def test_a_named_policy_must_exist(own_home: Path, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="there is no policy file"):
        load_policy(tmp_path / "none.json")
    with pytest.raises(TrustError, match="cannot read"):
        load_policy(tmp_path)


def test_a_file_that_cannot_be_read_is_not_an_empty_policy(own_home: Path) -> None:
    trust_file().mkdir()
    with pytest.raises(TrustError, match="cannot read"):
        load_policy()


def drop(name: str) -> Any:
    return lambda value: value.pop(name)


def put(place: str, name: str, new: Any) -> Any:
    def change(value: Any) -> None:
        (value if place == "" else value[place][0])[name] = new

    return change


@pytest.mark.parametrize(
    "change",
    [
        drop("format"),
        put("", "format", "nestpatch-trust/2"),
        put("", "more", 1),
        put("", "keys", {}),
        put("", "rules", None),
        put("keys", "pem", "x"),
        put("keys", "pem", 1),
        put("keys", "id", "0" * 64),
        put("keys", "name", ""),
        put("keys", "name", " acme"),
        put("keys", "name", "a\x1b[2J"),
        put("keys", "name", "a" * 97),
        put("keys", "name", "audit"),
        put("keys", "models", []),
        put("keys", "models", [""]),
        put("keys", "models", "*"),
        put("keys", "models", [1]),
        put("keys", "more", 1),
        put("rules", "require", -1),
        put("rules", "require", True),
        put("rules", "require", "1"),
        put("rules", "require", 3),
        put("rules", "model", 1),
        put("rules", "keys", [1]),
        put("rules", "keys", ["nobody"]),
        put("rules", "more", 1),
        lambda value: value["keys"].append(value["keys"][0]),
        lambda value: value["keys"].append(7),
        lambda value: value["rules"].append([]),
    ],
)
def test_broken_files_are_refused(people: People, change: Any) -> None:
    good = Policy(people.policy("acme", "audit").keys, (Rule("*", 1, ("acme",)),)).content()
    Policy.parse(json.dumps(good).encode(), "policy.json")
    with pytest.raises(TrustError):
        Policy.parse(json.dumps(changed(good, change)).encode(), "policy.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"format":"nestpatch-trust/1","format":"nestpatch-trust/1"}', b"\xff"])
def test_what_is_no_policy(data: bytes) -> None:
    with pytest.raises(TrustError, match=r"policy\.json is broken"):
        Policy.parse(data, "policy.json")


def test_the_document_shows_a_policy_that_works(people: People) -> None:
    text = (Path(__file__).parents[2] / "docs" / "signing.md").read_text(encoding="utf-8")
    example = json.loads(text.split("```json\n")[1].split("```")[0])
    for entry, key in zip(example["keys"], (people.acme, people.audit), strict=True):
        entry["pem"] = key.public.pem
    policy = Policy.parse(json.dumps(example).encode(), "example")
    assert [rule.require for rule in policy.rules_for(Subject(("/srv/models/production/x",)))] == [2]
    assert [rule.require for rule in policy.rules_for(Subject(("/srv/models/scratch/x",), base="acme/x"))] == [0]
