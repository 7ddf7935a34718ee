"""Which patterns match which model: the user's paths, and the base in the pack. Names of folders say nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from nestpatch.errors import BadSignatureError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.subject import NO_MODEL, Subject, is_path
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from nestpatch.signing.verify import UnverifiedPack, VerifiedPack, sign_pack, verify_signature
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.signing.conftest import People

HERE = Subject(("/srv/models/x",), base="team/z")


def for_base(model_id: str, folder: Path) -> Path:
    """A pack file that says it is for this base."""
    pack = tiny_pack(tiny_checkpoint(folder / "source"))
    file = folder / "lying.nest"
    base = replace(pack.manifest.base, model_id=model_id)
    nest.write(Pack(replace(pack.manifest, base=base), tuple(pack)), file)
    return file


@pytest.mark.parametrize("pattern", ["/srv/*", "~/models/*", "C:/models/*", "c:\\models", "*/models/*", "**/x", "./x", "../x"])
def test_what_is_a_path_pattern(pattern: str) -> None:
    assert is_path(pattern)


@pytest.mark.parametrize("pattern", ["*", "team/*", "team/z", "z", "t*/z", "*z", "C:x"])
def test_what_is_a_model_id(pattern: str) -> None:
    assert not is_path(pattern)


@pytest.mark.parametrize("pattern", ["./models/*", "../x", ".", ".."])
def test_a_relative_path_is_refused_instead_of_never_matching(pattern: str) -> None:
    with pytest.raises(Exception, match="relative path"):
        TrustedKey.of("acme", PrivateKey.generate().public, [pattern])


def test_paths_match_what_the_user_names_and_ids_what_the_pack_says() -> None:
    assert all(HERE.fits(pattern) for pattern in ("*", "/srv/*", "*/models/x", "team/*", "team/z"))
    assert not any(HERE.fits(pattern) for pattern in ("/opt/*", "Team/*", "team/", "x", "srv/*"))
    lying = Subject(("/srv/models/x",), base="/opt/models/y")
    assert not lying.fits("/opt/*"), "a pack cannot name a path"
    assert not Subject(base="team/z").fits("/srv/*"), "without a model no path rule holds"


def test_the_home_folder_in_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a[b]"))
    (tmp_path / "a[b]" / "m").mkdir(parents=True)
    (tmp_path / "ab" / "m").mkdir(parents=True)
    assert Subject.of(tmp_path / "a[b]" / "m").fits("~/*")
    assert not Subject.of(tmp_path / "ab" / "m").fits("~/*")


def test_a_key_needs_every_id_that_is_known() -> None:
    assert Subject((), "team/z", "team/y").is_covered(["team/*"])
    assert not Subject((), "team/z", "other/y").is_covered(["team/*"])
    assert not Subject((), "other/z", "team/y").is_covered(["team/*"])
    assert Subject((), "other/z", "team/y").is_covered(["team/*", "other/*"])
    assert not replace(HERE, base="").is_covered(["team/*"]), "an empty name is a name, not an unknown one"
    assert replace(HERE, base="").is_covered(["team/*", "/srv/*"])


def test_without_a_model_a_key_for_paths_counts_and_without_a_pack_one_for_ids() -> None:
    assert NO_MODEL.is_covered(["/srv/*"])
    assert NO_MODEL.is_covered(["team/*"])
    assert Subject(base="other/x").is_covered(["/srv/*", "team/*"])
    assert not Subject(base="other/x").is_covered(["team/*"])
    assert not Subject((), "team/z").is_covered(["/srv/*"]), "a Hub id is on no path"


@pytest.mark.parametrize("inside", ["models--team--z", "models--team--z/snapshots/0123", "team/z"])
def test_a_folder_that_is_called_like_another_teams_model_does_not_pick_their_rule(
    tmp_path: Path, people: People, inside: str
) -> None:
    model = tiny_checkpoint(tmp_path / inside)
    assert Subject.of(model).ids == ()
    policy = Policy(people.policy("acme").keys, (Rule("team/*", 0), Rule("*", 1)))
    file = for_base("other/x", tmp_path)
    with pytest.raises(UnsignedError):
        verify_signature(file, policy, model)
    # Nor does the folder's name make a key count.
    sign_pack(file, people.acme)
    theirs = Policy((TrustedKey("acme", people.acme.public, ("team/*",)),))
    with pytest.raises(UntrustedError, match="who is not trusted for this model"):
        verify_signature(file, theirs, model)


def test_an_unsigned_pack_does_not_choose_a_lenient_rule_by_its_own_word(tmp_path: Path, people: People) -> None:
    """It may say that it is for any base: nobody has signed that."""
    model = tiny_checkpoint(tmp_path / "model")
    policy = Policy(people.policy("acme").keys, (Rule("scratch/*", 0),))
    file = for_base("scratch/x", tmp_path)
    with pytest.raises(UnsignedError, match=r"lying\.nest is not signed"):
        verify_signature(file, policy, model)
    # A stranger's signature vouches for nothing either.
    sign_pack(file, people.evil)
    with pytest.raises(UntrustedError, match="not trusted here"):
        verify_signature(file, policy, model)


def test_an_unsigned_pack_does_not_dodge_a_strict_rule_by_its_own_word(tmp_path: Path, people: People) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    policy = Policy(people.policy("acme").keys, (Rule("team/*", 1), Rule("*", 0)))
    file = for_base("other/x", tmp_path)
    with pytest.raises(
        UnsignedError, match=r"requires 1 signature for 'team/\*'.*statement that it is for 'other/x'"
    ) as caught:
        verify_signature(file, policy, model)
    assert "rule for paths" in caught.value.advice
    # The user's own word does count: a rule for the path, before the other.
    mine = replace(policy, rules=(Rule(f"{tmp_path}/*", 0), *policy.rules))
    assert isinstance(verify_signature(file, mine, model), UnverifiedPack)
    # And so does that of a key that is trusted.
    sign_pack(file, people.acme)
    assert isinstance(verify_signature(file, policy, model), VerifiedPack)


def test_a_strict_rule_for_a_path_holds_whatever_a_signed_pack_says(tmp_path: Path, people: People) -> None:
    model = tiny_checkpoint(tmp_path / "production" / "model")
    keys = people.policy("acme", "audit").keys
    policy = Policy(keys, (Rule(f"{tmp_path}/production/*", 2), Rule("scratch/*", 0)))
    file = for_base("scratch/x", tmp_path)
    sign_pack(file, people.acme)
    with pytest.raises(UntrustedError, match="signed by 1 of the 2 keys"):
        verify_signature(file, policy, model)


def test_a_key_for_one_team_signs_nothing_for_the_base_of_another(tmp_path: Path, people: People) -> None:
    policy = Policy((TrustedKey("acme", people.acme.public, ("team/*",)),))
    for base, fits in (("team/z", True), ("other/x", False), ("Team/z", False), ("x/team/z", False), ("/team/z", False)):
        folder = tmp_path / base.replace("/", "_")
        folder.mkdir()
        file = for_base(base, folder)
        sign_pack(file, people.acme)
        if fits:
            assert isinstance(verify_signature(file, policy, folder), VerifiedPack)
        else:
            with pytest.raises(UntrustedError, match="who is not trusted for this model"):
                verify_signature(file, policy, folder)


def test_a_wrong_signature_is_named_before_a_broken_pack(pack: Path, people: People) -> None:
    """The pack is only decoded when its signatures are known to be of its bytes."""
    sign_pack(pack, people.acme)
    pack.write_bytes(save({"no": np.zeros(3, np.float32)}))  # a model, whose length its header tells
    for policy in (Policy(), people.policy("acme"), Policy(rules=(Rule("*", 0),))):
        with pytest.raises(BadSignatureError, match="made for other bytes"):
            verify_signature(pack, policy, allow_unsigned=True)


def test_a_key_that_is_called_like_the_id_of_another_does_not_count_for_it(people: People) -> None:
    audit = people.audit.public.key_id
    policy = Policy((TrustedKey(audit, people.evil.public), TrustedKey("audit", people.audit.public)))
    assert [t.key for t in policy.counting(Rule("*", 1, (audit,)), NO_MODEL)] == [people.audit.public]
