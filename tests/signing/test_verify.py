"""Signing pack files and judging what lies beside them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from nestpatch.errors import BadSignatureError, OutputError, PackError, SignatureFormatError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from nestpatch.signing.verify import UnverifiedPack, VerifiedPack, sign_pack, signature_files, verify_signature
from tests.signing.conftest import People, spoil


def test_signed_by_a_trusted_key(pack: Path, people: People) -> None:
    done = sign_pack(pack, people.acme)
    assert done.file == pack.with_name("no-harm.nest.sig")
    found = verify_signature(pack, people.policy("acme", "audit"))
    assert isinstance(found, VerifiedPack)
    assert [(s.name, s.file) for s in found.signers] == [("acme", "no-harm.nest.sig")]
    assert found.pack_id == done.pack_id == nest.pack_id(found.pack) == nest.pack_id(nest.read(pack))
    assert found.as_json()["verdict"] == "signed"


def test_without_trusted_keys_nothing_is_needed_and_nothing_proven(pack: Path, people: People) -> None:
    found = verify_signature(pack, Policy())
    assert isinstance(found, UnverifiedPack)
    assert found.reason == "no-harm.nest is not signed"
    sign_pack(pack, people.acme)
    found = verify_signature(pack, Policy())
    assert isinstance(found, UnverifiedPack)
    assert f"{people.acme.public.key_id[:12]}.., which is not trusted here" in found.reason


def test_unsigned_and_untrusted(pack: Path, people: People) -> None:
    policy = people.policy("acme")
    with pytest.raises(UnsignedError, match=r"no-harm\.nest is not signed"):
        verify_signature(pack, policy)
    assert isinstance(verify_signature(pack, policy, allow_unsigned=True), UnverifiedPack)
    sign_pack(pack, people.evil)
    with pytest.raises(UntrustedError, match="is not trusted here") as caught:
        verify_signature(pack, policy)
    assert "nestpatch trust add" in caught.value.advice
    assert isinstance(verify_signature(pack, policy, allow_unsigned=True), UnverifiedPack)


def test_a_wrong_signature_is_never_forgiven(pack: Path, people: People) -> None:
    sign_pack(pack, people.acme)
    spoil(pack)
    for policy in (Policy(), people.policy("acme"), people.policy("audit"), Policy(rules=(Rule("*", 0),))):
        with pytest.raises(BadSignatureError, match="made for other bytes"):
            verify_signature(pack, policy, allow_unsigned=True)
    pack.with_name("no-harm.nest.sig").write_bytes(b"junk")
    with pytest.raises(SignatureFormatError, match=r"no-harm\.nest\.sig"):
        verify_signature(pack, Policy(), allow_unsigned=True)


def test_k_of_n(pack: Path, people: People) -> None:
    keys = people.policy("acme", "audit", "third").keys
    policy = Policy(keys, (Rule("*", 2, ("acme", "audit")),))
    sign_pack(pack, people.acme)
    # Further signatures do not help: of somebody who does not count, of a stranger, and of the same key again.
    for person in (people.third, people.evil):
        sign_pack(pack, person)
    again = sign_pack(pack, people.acme, pack.with_name("no-harm.nest.0123456789ab.sig"))
    assert again.file in signature_files(pack)
    with pytest.raises(UntrustedError, match="signed by 1 of the 2 keys that the policy requires: acme") as caught:
        verify_signature(pack, policy)
    assert "third, who is not trusted for this model" in str(caught.value)
    second = sign_pack(pack, people.audit)
    assert second.file.name == f"no-harm.nest.{people.audit.public.key_id[:12]}.sig"
    found = verify_signature(pack, policy)
    assert isinstance(found, VerifiedPack)
    assert sorted(s.name for s in found.signers) == ["acme", "audit"]
    assert found.required == 2
    # One altered signature of many spoils it: somebody tampered with what belongs to the pack.
    second.file.write_bytes(second.file.read_bytes().replace(b'"payload":"', b'"payload":"AAAA', 1))
    with pytest.raises((BadSignatureError, SignatureFormatError)):
        verify_signature(pack, policy)


def test_a_key_for_other_models_does_not_count(pack: Path, people: People, tmp_path: Path) -> None:
    """A path decides, or the base that the pack names; where the user types an id, both have to fit."""
    policy = Policy((TrustedKey("acme", people.acme.public, ("tiny/*", str(tmp_path / "team" / "*"))),))
    sign_pack(pack, people.acme)
    (tmp_path / "team" / "a").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    assert isinstance(verify_signature(pack, policy, tmp_path / "team" / "a"), VerifiedPack)
    assert isinstance(verify_signature(pack, policy, "tiny/llama@main"), VerifiedPack)
    assert isinstance(verify_signature(pack, policy, tmp_path / "b"), VerifiedPack), "by the base that acme signed"
    there = Policy((TrustedKey("acme", people.acme.public, (str(tmp_path / "team" / "*"),)),))
    for trusting, other in ((policy, "other/llama"), (there, tmp_path / "b"), (there, "tiny/llama")):
        with pytest.raises(UntrustedError, match="signed by acme, who is not trusted for this model"):
            verify_signature(pack, trusting, other)


def test_optional_signatures_are_still_told(pack: Path, people: People) -> None:
    policy = Policy(people.policy("acme").keys, (Rule("*", 0),))
    assert isinstance(verify_signature(pack, policy), UnverifiedPack)
    sign_pack(pack, people.acme)
    assert isinstance(verify_signature(pack, policy), VerifiedPack)


def test_signing_twice(pack: Path, people: People) -> None:
    first = sign_pack(pack, people.acme)
    before = first.file.read_bytes()
    with pytest.raises(OutputError, match="exists already, by the same key"):
        sign_pack(pack, people.acme)
    assert first.file.read_bytes() == before
    assert sign_pack(pack, people.acme, overwrite=True).file == first.file
    assert first.file.read_bytes() != before
    other = sign_pack(pack, people.audit)
    assert sign_pack(pack, people.audit, overwrite=True).file == other.file
    assert len(signature_files(pack)) == 2


def test_only_packs_are_signed_and_only_packs_pass(tmp_path: Path, people: People) -> None:
    file = tmp_path / "x.nest"
    file.write_bytes(b"no pack")
    with pytest.raises(PackError):
        sign_pack(file, people.acme)
    assert not signature_files(file)
    with pytest.raises(PackError):
        verify_signature(file, Policy())
    with pytest.raises(PackError, match="cannot read the pack"):
        verify_signature(tmp_path / "none.nest", Policy())


def test_signatures_of_other_files_are_not_looked_at(pack: Path, people: People) -> None:
    for name in ("no-harm.sig", "no-harm.nest.x.sig", "no-harm.nest.sig.bak", "no-harmXnest.sig", "other.nest.sig"):
        pack.with_name(name).write_bytes(b"junk")
    assert signature_files(pack) == []
    for number in range(65):
        pack.with_name(f"no-harm.nest.{number:012x}.sig").write_bytes(b"junk")
    with pytest.raises(SignatureFormatError, match="65 signatures"):
        verify_signature(pack, Policy())


def test_a_huge_signature_is_refused_unread(pack: Path) -> None:
    with pack.with_name("no-harm.nest.sig").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SignatureFormatError, match="too long"):
        verify_signature(pack, Policy())


def test_it_takes_milliseconds(pack: Path, people: People) -> None:
    sign_pack(pack, people.acme)
    policy = people.policy("acme")
    verify_signature(pack, policy)
    began = time.perf_counter()
    for _ in range(10):
        verify_signature(pack, policy)
    assert (time.perf_counter() - began) / 10 < 0.1


def test_cryptography_alone_is_loaded(pack: Path, people: People) -> None:
    sign_pack(pack, people.acme)
    code = """
import sys
from pathlib import Path
from nestpatch.signing.keys import PublicKey
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import verify_signature
print(type(verify_signature(sys.argv[1], Policy((TrustedKey("acme", PublicKey(sys.argv[2])),)))).__name__)
heavy = {"torch", "transformers", "click", "rich", "huggingface_hub", "model_signing", "sigstore", "requests"}
assert "cryptography" in sys.modules and not heavy & set(sys.modules)
"""
    command = [sys.executable, "-c", code, str(pack), people.acme.public.pem]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("VerifiedPack\n", "")
