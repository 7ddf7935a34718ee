"""Key files: their permissions, their passwords, and what is no key."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from nestpatch.errors import KeyFileError, OutputError
from nestpatch.signing import keys

PASSWORD = b"correct horse \xf0\x9f\x94\x8b"


def test_a_pair_is_written_and_read(tmp_path: Path) -> None:
    pair = keys.keygen(tmp_path / "acme", PASSWORD)
    assert (pair.private, pair.public) == (tmp_path / "acme.key", tmp_path / "acme.pub")
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    assert keys.needs_password(pair.private)
    private, public = keys.read_private(pair.private, PASSWORD), keys.PublicKey.read(pair.public)
    assert private.public == public
    assert public.key_id == pair.key_id
    assert public.verifies(private.sign(b"message"), b"message")
    assert not public.verifies(private.sign(b"message"), b"massage")
    assert not public.verifies(b"", b"message")
    assert not keys.PrivateKey.generate().public.verifies(private.sign(b"message"), b"message")


def test_a_key_without_password(tmp_path: Path) -> None:
    pair = keys.keygen(tmp_path / "ci", None)
    assert not keys.needs_password(pair.private)
    assert stat.S_IMODE(pair.private.stat().st_mode) == 0o600
    # A password that nobody needs does no harm: scripts pass it always.
    assert keys.read_private(pair.private, PASSWORD).public.key_id == pair.key_id


@pytest.mark.parametrize("taken", ["acme.key", "acme.pub"])
def test_nothing_is_overwritten_and_nothing_left(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).write_text("precious", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        keys.keygen(tmp_path / "acme", None)
    assert [file.name for file in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("password", [None, b"", b"hunter2", PASSWORD + b"\n"])
def test_no_password_or_a_wrong_one(tmp_path: Path, password: bytes | None) -> None:
    pair = keys.keygen(tmp_path / "acme", PASSWORD)
    with pytest.raises(KeyFileError) as caught:
        keys.read_private(pair.private, password)
    told = f"{caught.value!r} {caught.value.advice} {caught.value.__cause__}"
    assert "horse" not in told
    assert "hunter2" not in told


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    key = keys.PrivateKey.generate()
    number = key._key.private_numbers().private_value
    assert str(number) not in repr(key)
    assert f"{number:x}" not in repr(key)
    assert "PRIVATE" not in repr(key)


def other_keys() -> dict[str, bytes]:
    pem, plain = s.Encoding.PEM, s.NoEncryption()
    p384 = ec.generate_private_key(ec.SECP384R1()).private_bytes(pem, s.PrivateFormat.PKCS8, plain)
    small = rsa.generate_private_key(65537, 2048).private_bytes(pem, s.PrivateFormat.PKCS8, plain)
    edwards = ed25519.Ed25519PrivateKey.generate().private_bytes(pem, s.PrivateFormat.PKCS8, plain)
    good = keys.PrivateKey.generate().pem(None)
    return {"p384": p384, "rsa": small, "ed25519": edwards, "cut": good[:100], "empty": b"", "bytes": bytes(range(256))}


@pytest.mark.parametrize("kind", ["p384", "rsa", "ed25519", "cut", "empty", "bytes"])
def test_other_files_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.key"
    file.write_bytes(other_keys()[kind])
    with pytest.raises(KeyFileError, match=r"x\.key"):
        keys.read_private(file)
    with pytest.raises(KeyFileError, match=r"x\.key"):
        keys.PublicKey.read(file)


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP256K1()])
def test_public_keys_of_other_curves_are_refused(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    file = tmp_path / "x.pub"
    public = ec.generate_private_key(curve).public_key()
    file.write_bytes(public.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(KeyFileError, match="no ECDSA P-256 public key"):
        keys.PublicKey.read(file)


def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    pair = keys.keygen(tmp_path / "acme", None)
    with pytest.raises(KeyFileError, match="is a private key") as caught:
        keys.PublicKey.read(pair.private)
    assert ".pub" in caught.value.advice
    with pytest.raises(KeyFileError, match="cannot read"):
        keys.PublicKey.read(tmp_path / "none.pub")


def test_keys_of_openssl_are_read(tmp_path: Path) -> None:
    """SEC 1, as `openssl ecparam -genkey` writes it; line ends of another system do not change the id."""
    key = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "sec1.pem"
    file.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.TraditionalOpenSSL, s.NoEncryption()))
    private = keys.read_private(file)
    (tmp_path / "dos.pub").write_bytes(private.public.pem.replace("\n", "\r\n").encode())
    assert keys.PublicKey.read(tmp_path / "dos.pub").key_id == private.public.key_id
    file.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.TraditionalOpenSSL, s.BestAvailableEncryption(b"x")))
    assert keys.needs_password(file)
    assert keys.read_private(file, b"x").public == private.public
