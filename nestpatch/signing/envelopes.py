"""Signed envelopes (DSSE 1.0), and the detached signatures that are made of them (OpenSSF Model Signing bundles).

Bytes in, values out: no files, no clock. An `Envelope` holds a payload, its type and signatures over both. A `Bundle` is a
Sigstore bundle 0.3 with one public key and one envelope, whose payload is an in-toto statement with the SHA-256 of one file; it
is the format that the model_signing tool reads and writes. docs/signing.md lists what is refused. Parsing proves nothing:
`Envelope.signed_by` does.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from nestpatch.errors import BadSignatureError, SignatureFormatError
from nestpatch.signing.keys import PrivateKey, PublicKey
from nestpatch.values import dataclass

MAX_BYTES = 1 << 20
"""Largest signed file that is read; in practice they are kilobytes."""
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope. Its content is unproven until `signed_by` returns True."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]
    """(key id as stated, signature) of each signer; the key id is only a hint."""

    @classmethod
    def sealed(cls, payload_type: str, payload: bytes, keys: Sequence[PrivateKey], *, name_keys: bool = True) -> Envelope:
        """Signs a payload with every key.

        Args:
            payload_type: Media type of the payload; it is covered by the signatures.
            payload: The bytes to sign.
            keys: The signers.
            name_keys: Whether to write the key ids into the envelope; otherwise they stay empty.

        Returns:
            The signed envelope.
        """
        message = _pae(payload_type, payload)
        signatures = tuple((key.public.key_id if name_keys else "", key.sign(message)) for key in keys)
        return cls(payload_type, payload, signatures)

    @classmethod
    def parse(cls, value: Any, source: str) -> Envelope:
        """Reads the JSON object of an envelope.

        Args:
            value: The parsed JSON.
            source: Name of the file, for messages.

        Returns:
            The envelope, unproven.

        Raises:
            SignatureFormatError: A member is missing, unknown or of the wrong type, or the base64 is not canonical.
        """
        facts = members(value, {"payload": str, "payloadType": str, "signatures": list}, source)
        signatures = []
        for entry in facts["signatures"]:
            signature = members(entry, {"sig": str, "keyid": str}, source, keyid="")
            signatures.append((signature["keyid"], _decode(signature["sig"], source)))
        return cls(facts["payloadType"], _decode(facts["payload"], source), tuple(signatures))

    def signed_by(self, key: PublicKey) -> bool:
        """Checks the signatures; the key ids that the envelope states are ignored.

        Args:
            key: The expected signer.

        Returns:
            True when one of the signatures was made with this key, over this payload and type.
        """
        message = _pae(self.payload_type, self.payload)
        return any(key.verifies(signature, message) for _, signature in self.signatures)

    def as_json(self) -> dict[str, Any]:
        """The envelope as a JSON object."""
        signatures = [{"sig": _encode(signature), "keyid": key_id} for key_id, signature in self.signatures]
        return {"payload": _encode(self.payload), "payloadType": self.payload_type, "signatures": signatures}


def _pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed: DSSE's pre-authentication encoding. It covers the type, so types cannot be exchanged."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def parse_json(data: bytes, source: str) -> Any:
    """Reads JSON strictly: UTF-8, at most MAX_BYTES, no duplicate keys.

    Args:
        data: The bytes of the file.
        source: Name of the file, for messages.

    Returns:
        The parsed value.

    Raises:
        SignatureFormatError: The data is too long or not such JSON.
    """
    if len(data) > MAX_BYTES:
        raise SignatureFormatError(f"{source} is too long: {len(data)} bytes, limit {MAX_BYTES}")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SignatureFormatError(f"{source} is not valid JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def members(value: Any, kinds: dict[str, type], source: str, **defaults: Any) -> dict[str, Any]:
    """Checks that a JSON value is an object with exactly these members.

    Args:
        value: The parsed JSON.
        kinds: Name of each member and its exact Python type.
        source: Name of the file, for messages.
        **defaults: Values of members that may be absent.

    Returns:
        A new dict with all members.

    Raises:
        SignatureFormatError: A member is missing, unknown or of the wrong type.
    """
    value = defaults | value if isinstance(value, dict) else value
    if not isinstance(value, dict) or set(value) != set(kinds):
        found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise SignatureFormatError(f"{source}: expected {', '.join(sorted(kinds))}, found {found}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise SignatureFormatError(f"{source}: {name}: expected {kind.__name__}, found {type(value[name]).__name__}")
    return dict(value)


def _decode(text: str, source: str) -> bytes:
    """Base64 in its only canonical form, so that one content has one encoding."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise SignatureFormatError(f"{source} contains invalid base64: {error}") from error
    if _encode(data) != text:
        raise SignatureFormatError(f"{source} contains base64 that is not canonical")
    return data


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@dataclass(frozen=True)
class Bundle:
    """One detached signature of one file. Its content is unproven until both checks pass."""

    source: str
    """Name of the signature file, for messages."""
    key_id: str
    """Id of the key that the bundle names as its signer."""
    digest: str
    """SHA-256 (hex) of the file that the bundle names."""
    envelope: Envelope

    @classmethod
    def parse(cls, data: bytes, source: str) -> Bundle:
        """Reads a detached signature.

        Args:
            data: The content of the .sig file.
            source: Name of the file, for messages.

        Returns:
            The bundle, unproven.

        Raises:
            SignatureFormatError: It is not a bundle of one signature, made with a key, of one file by SHA-256.
        """
        outer = parse_json(data, source)
        material = outer.get("verificationMaterial") if isinstance(outer, dict) else None
        if isinstance(material, dict) and {"certificate", "x509CertificateChain"} & set(material):
            raise SignatureFormatError(
                f"{source} was made with a certificate, not with a key", advice="Check it with `model_signing verify` instead."
            )
        outer = members(outer, {"mediaType": str, "verificationMaterial": dict, "dsseEnvelope": dict}, source)
        if outer["mediaType"] != MEDIA_TYPE:
            raise SignatureFormatError(f"{source} has the media type {outer['mediaType']!r}, expected {MEDIA_TYPE!r}")
        material = members(outer["verificationMaterial"], {"publicKey": dict, "tlogEntries": list}, source, tlogEntries=[])
        key_id = members(material["publicKey"], {"hint": str}, source)["hint"]
        if material["tlogEntries"] or not _is_digest(key_id):
            raise SignatureFormatError(f"{source} does not name a key, or relies on a transparency log")
        envelope = Envelope.parse(outer["dsseEnvelope"], source)
        if envelope.payload_type != PAYLOAD_TYPE or [name for name, _ in envelope.signatures] not in ([""], [key_id]):
            raise SignatureFormatError(f"{source} does not contain a statement with a single signature")
        return cls(source, key_id, _signed_digest(envelope.payload, source), envelope)

    @staticmethod
    def write(digest: str, name: str, key: PrivateKey) -> bytes:
        """Signs a file.

        Args:
            digest: SHA-256 of the file, hex.
            name: File name to write into the statement; readers do not compare it.
            key: The signer.

        Returns:
            The content of the .sig file.
        """
        serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
        statement = {
            "_type": STATEMENT_TYPE,
            # The subject's digest is that of the concatenated digests of all resources; there is one.
            "subject": [{"name": name, "digest": {"sha256": sha256(bytes.fromhex(digest)).hexdigest()}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "serialization": serialization,
                "resources": [{"name": ".", "algorithm": "sha256", "digest": digest}],
            },
        }
        payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode("ascii")
        envelope = Envelope.sealed(PAYLOAD_TYPE, payload, [key], name_keys=False)
        material = {"publicKey": {"hint": key.public.key_id}, "tlogEntries": []}
        bundle = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope.as_json()}
        return json.dumps(bundle, separators=(",", ":")).encode("ascii")

    def check(self, digest: str, name: str, key: PublicKey | None) -> None:
        """Checks that the bundle is for a file with this SHA-256, and that it was made with a key.

        Args:
            digest: SHA-256 of the file, hex.
            name: The file, for messages.
            key: The key that the bundle should name; None where it is not known: then who made the bundle stays unproven.

        Raises:
            BadSignatureError: It is for other bytes, names another key, or was not made with this one.
        """
        if self.digest != digest:
            sums = f"expected sha256 {self.digest[:12]}.., got {digest[:12]}.."
            raise BadSignatureError(f"{self.source} was made for other bytes than those of {name}: {sums}")
        if key is not None and (key.key_id != self.key_id or not self.envelope.signed_by(key)):
            raise BadSignatureError(f"{self.source} was not made with the key that it names ({self.key_id[:12]}..)")


def _signed_digest(payload: bytes, source: str) -> str:
    """The SHA-256 that a statement gives for its only file."""
    kinds: dict[str, type] = {"_type": str, "subject": list, "predicateType": str, "predicate": dict}
    statement = members(parse_json(payload, source), kinds, source)
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise SignatureFormatError(f"{source} states something else than a model signature")
    # Other members of the predicate are for other tools, as the format allows.
    resources, serialization = (statement["predicate"].get(name) for name in ("resources", "serialization"))
    if not isinstance(resources, list) or len(resources) != 1 or len(statement["subject"]) != 1:
        raise SignatureFormatError(f"{source} is not about exactly one file")
    resource = members(resources[0], {"name": str, "algorithm": str, "digest": str}, source)
    subject = members(statement["subject"][0], {"name": str, "digest": dict}, source)
    if resource["name"] != "." or not isinstance(serialization, dict) or serialization.get("method") != "files":
        raise SignatureFormatError(f"{source} signs a folder or parts of files, not one file")
    if resource["algorithm"] != "sha256" or serialization.get("hash_type") != "sha256" or not _is_digest(resource["digest"]):
        raise SignatureFormatError(f"{source} uses another hash than SHA-256: {resource['algorithm']!r}")
    if subject["digest"] != {"sha256": sha256(bytes.fromhex(resource["digest"])).hexdigest()}:
        raise SignatureFormatError(f"{source} contradicts itself: its subject is not its file")
    return str(resource["digest"])


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
