"""ECDSA P-256 keys in PEM files.

Secrets stay inside `PrivateKey`: no message, repr or log contains them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch.errors import KeyFileError, OutputError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

_MAX_KEY_FILE = 64 << 10
_ENCRYPTED = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")


@dataclass(frozen=True)
class PublicKey:
    """The half of a key pair that may be published."""

    pem: str
    """PEM text as `cryptography` writes it, so that equal keys have equal texts."""

    @classmethod
    def read(cls, path: Path) -> PublicKey:
        """Reads a public key file.

        Args:
            path: The .pub file.

        Returns:
            The key.

        Raises:
            KeyFileError: The file is missing or broken, or holds a private or another kind of key.
        """
        data = _read(path)
        if b"PRIVATE KEY" in data:
            raise KeyFileError(f"{path} is a private key", advice="Give the public half, which may be shown: the .pub file.")
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: bytes, source: str) -> PublicKey:
        """Reads the PEM text of a public key.

        Args:
            data: The PEM text.
            source: Name of the file, for messages.

        Returns:
            The key, in canonical PEM.

        Raises:
            KeyFileError: The text is not an ECDSA P-256 public key.
        """
        from cryptography.exceptions import UnsupportedAlgorithm

        try:
            return _public(_load_public(data))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise KeyFileError(f"{source} contains no ECDSA P-256 public key: {error}") from error

    @property
    def key_id(self) -> str:
        """SHA-256 (hex) of the PEM text: how OMS bundles name a key."""
        return sha256(self.pem.encode("ascii")).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Checks a signature.

        Args:
            signature: ECDSA with SHA-256, DER.
            message: The signed bytes.

        Returns:
            True when it was made with the private half of this key.
        """
        return _verifies(self.pem, signature, message)


@lru_cache(maxsize=32)
def _verifies(pem: str, signature: bytes, message: bytes) -> bool:
    """The rules of channels ask for the same signature several times, and so do models that follow one channel."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        _load_public(pem.encode("ascii")).verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


@dataclass(frozen=True)
class PrivateKey:
    """The half of a key pair that signs. `read_private` reads one from a file."""

    _key: EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> PrivateKey:
        """A new random key."""
        from cryptography.hazmat.primitives.asymmetric import ec

        return cls(ec.generate_private_key(ec.SECP256R1()))

    @property
    def public(self) -> PublicKey:
        """The public half."""
        return _public(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Signs a message.

        Args:
            message: The bytes to sign.

        Returns:
            The signature: ECDSA with SHA-256, DER.
        """
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self._key.sign(message, ec.ECDSA(hashes.SHA256()))

    def pem(self, password: bytes | None) -> bytes:
        """Writes the key as text.

        Args:
            password: Encrypts the text; None leaves it unencrypted.

        Returns:
            The content of a key file: PKCS #8 in PEM.
        """
        from cryptography.hazmat.primitives import serialization as s

        encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
        return self._key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)


@dataclass(frozen=True)
class KeyPair:
    """The two files that `keygen` wrote."""

    private: Path
    public: Path
    key_id: str

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {"private": str(self.private), "public": str(self.public), "key_id": self.key_id}


def keygen(path: str | Path, password: bytes | None = None) -> KeyPair:
    """Writes a new key pair: `path`.key, readable by its owner only (0600), and `path`.pub.

    Args:
        path: Path of the two files without the suffix.
        password: Encrypts the private key; None leaves it unencrypted.

    Returns:
        The two files and the key's id.

    Raises:
        OutputError: One of the files exists or cannot be written. Neither is left behind.
    """
    path = Path(path)
    if path.name in {"", ".."}:
        raise OutputError(f"{path} is a folder", advice="Give a name for the key files: nestpatch keygen NAME")
    private, public = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    taken = next((file for file in (private, public) if os.path.lexists(file)), None)
    if taken is not None:
        advice = f"Use the key that is there (nestpatch sign PACK --key {private}), or give another name: nestpatch keygen NAME"
        raise OutputError(f"{taken} exists already; keys are never overwritten", advice=advice)
    key = PrivateKey.generate()
    write_bytes(private, key.pem(password), mode=0o600)
    try:
        write_bytes(public, key.public.pem.encode("ascii"))
    except OutputError:
        private.unlink()
        raise
    return KeyPair(private, public, key.public.key_id)


def needs_password(path: Path) -> bool:
    """Whether a private key file is encrypted.

    Args:
        path: The key file.

    Returns:
        True when `read_private` needs a password for it.

    Raises:
        KeyFileError: The file cannot be read.
    """
    data = _read(path)
    return any(mark in data for mark in _ENCRYPTED)


def read_private(path: str | Path, password: bytes | None = None) -> PrivateKey:
    """Reads a private key file, PKCS #8 or SEC 1.

    Args:
        path: The .key file.
        password: Its password; ignored when the file is not encrypted.

    Returns:
        The key.

    Raises:
        KeyFileError: The file is missing or broken, holds another kind of key, or the password is missing or wrong. The message
            never contains the password.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(Path(path))
    encrypted = any(mark in data for mark in _ENCRYPTED)
    if encrypted and not password:
        raise KeyFileError(f"{path} is encrypted", advice="Give its password: at the prompt, or with --password-file.")
    try:
        key = load_pem_private_key(data, password if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The cause is dropped on purpose: it may quote the file's content or the password.
        raise KeyFileError(f"{path} is not a private key, or the password is wrong") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFileError(f"the key in {path} is not ECDSA P-256")
    return PrivateKey(key)


def _load_public(data: bytes) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(data)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("another kind of key")
    return key


def _public(key: EllipticCurvePublicKey) -> PublicKey:
    from cryptography.hazmat.primitives import serialization as s

    return PublicKey(key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo).decode("ascii"))


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _MAX_KEY_FILE)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror or error}", advice="Check the path.") from error
