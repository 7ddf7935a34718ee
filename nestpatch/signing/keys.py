"""ECDSA P-256 keys in PEM files. Secrets stay inside PrivateKey: they are in no message, no repr and no log."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.errors import KeyFileError, OutputError
from nestpatch.files.atomic import write_bytes
from nestpatch.files.reading import read_bounded

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

MAX_KEY_FILE = 64 << 10
_ENCRYPTED = (b"BEGIN ENCRYPTED PRIVATE KEY", b"Proc-Type: 4,ENCRYPTED")


@dataclass(frozen=True)
class PublicKey:
    """The half that everybody may have."""

    pem: str
    """As cryptography writes it, so that equal keys have equal texts."""

    @property
    def key_id(self) -> str:
        """SHA-256 (hex) of the PEM text: how OMS bundles name a key."""
        return sha256(self.pem.encode("ascii")).hexdigest()

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether the signature (DER) of the message was made with the other half."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        try:
            _load_public(self.pem.encode("ascii")).verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class PrivateKey:
    """The half that signs."""

    _key: EllipticCurvePrivateKey = field(repr=False)

    @property
    def public(self) -> PublicKey:
        return _public(self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """The signature of a message, DER."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        return self._key.sign(message, ec.ECDSA(hashes.SHA256()))

    def pem(self, password: bytes | None) -> bytes:
        """The content of a key file: PKCS #8, encrypted when there is a password."""
        from cryptography.hazmat.primitives import serialization as s

        encryption = s.BestAvailableEncryption(password) if password else s.NoEncryption()
        return self._key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)


def generate() -> PrivateKey:
    """A new key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return PrivateKey(ec.generate_private_key(ec.SECP256R1()))


@dataclass(frozen=True)
class KeyPair:
    """The files that `keygen` wrote."""

    private: Path
    public: Path
    key_id: str


def keygen(path: Path, password: bytes | None) -> KeyPair:
    """Writes a new key to `path`.key, for its owner's eyes alone (0600), and its public half to `path`.pub.

    Raises OutputError when one of them exists or cannot be written; then neither is left behind.
    """
    if path.name in {"", ".."}:
        raise OutputError(f"{path} is a folder", advice="Give a name for the key files: nestpatch keygen NAME")
    private, public = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    key = generate()
    write_bytes(private, key.pem(password), mode=0o600)
    try:
        write_bytes(public, key.public.pem.encode("ascii"))
    except OutputError:
        private.unlink()
        raise
    return KeyPair(private, public, key.public.key_id)


def needs_password(path: Path) -> bool:
    """Whether a private key file is encrypted. Raises KeyFileError when it cannot be read."""
    data = _read(path)
    return any(mark in data for mark in _ENCRYPTED)


def read_private(path: Path, password: bytes | None = None) -> PrivateKey:
    """Reads a private key file, PKCS #8 or SEC 1.

    Raises KeyFileError: missing, broken, another kind of key, no or a wrong password. The message never holds the password.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path)
    if needs_password(path) and not password:
        raise KeyFileError(f"{path} is encrypted", advice="Give its password: at the prompt, or with --password-file.")
    try:
        key = load_pem_private_key(data, password if needs_password(path) else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # The cause is left out on purpose: what it says of the content or of the password is nobody's business.
        raise KeyFileError(f"{path} is no private key, or its password is another one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise KeyFileError(f"the key in {path} is not ECDSA P-256")
    return PrivateKey(key)


def read_public(path: Path) -> PublicKey:
    """Reads a public key file. Raises KeyFileError."""
    data = _read(path)
    if b"PRIVATE KEY" in data:
        raise KeyFileError(f"{path} is a private key", advice="Give the public half, which may be shown: the .pub file.")
    return parse_public(data, str(path))


def parse_public(data: bytes, source: str) -> PublicKey:
    """The key of a PEM text; `source` is for messages. Raises KeyFileError."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return _public(_load_public(data))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{source} holds no ECDSA P-256 public key: {error}") from error


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
        return read_bounded(path, MAX_KEY_FILE)
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror or error}", advice="Check the path.") from error
