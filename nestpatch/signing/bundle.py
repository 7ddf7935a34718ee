"""Detached signatures: OpenSSF Model Signing (OMS) bundles over one file, as the model_signing tool makes and verifies them.

A bundle is a Sigstore bundle 0.3 with the id of a public key and a DSSE envelope, whose payload is an in-toto statement with
the SHA-256 of the file. It names exactly one file and one signer; docs/signing.md lists what is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from nestpatch.errors import BadSignatureError, SignatureFormatError
from nestpatch.signing.dsse import Envelope, members, parse_envelope, parse_json, seal
from nestpatch.signing.keys import PrivateKey, PublicKey

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class Bundle:
    """One signature of one file."""

    source: str
    """Of the signature, for messages."""
    key_id: str
    """Of the key that it says it was made with."""
    digest: str
    """SHA-256 (hex) of the file that it says it is for."""
    envelope: Envelope

    def check_file(self, digest: str, name: str) -> None:
        """Raises BadSignatureError unless the bundle is for a file with this SHA-256."""
        if self.digest != digest:
            sums = f"expected sha256 {self.digest[:12]}.., got {digest[:12]}.."
            raise BadSignatureError(f"{self.source} was made for other bytes than those of {name}: {sums}")

    def check_key(self, key: PublicKey) -> None:
        """Raises BadSignatureError unless the signature was made with this key."""
        if key.key_id != self.key_id or not self.envelope.signed_by(key):
            raise BadSignatureError(f"{self.source} was not made with the key that it names ({self.key_id[:12]}..)")


def sign(digest: str, name: str, key: PrivateKey) -> bytes:
    """The bundle for a file of this SHA-256 (hex) and name: the content of its .sig file."""
    envelope = seal(PAYLOAD_TYPE, _statement(digest, name), [key], name_keys=False)
    material = {"publicKey": {"hint": key.public.key_id}, "tlogEntries": []}
    bundle = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope.as_json()}
    return json.dumps(bundle, separators=(",", ":")).encode("ascii")


def _statement(digest: str, name: str) -> bytes:
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
    statement = {
        "_type": STATEMENT_TYPE,
        # The subject's digest is that of the concatenated digests of all resources; there is one.
        "subject": [{"name": name, "digest": {"sha256": _root(digest)}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": [{"name": ".", "algorithm": "sha256", "digest": digest}]},
    }
    return json.dumps(statement, sort_keys=True, separators=(",", ":")).encode("ascii")


def parse(data: bytes, source: str) -> Bundle:
    """Reads a bundle, without believing it. Raises SignatureFormatError with the reason."""
    outer = parse_json(data, source)
    material = outer.get("verificationMaterial") if isinstance(outer, dict) else None
    if isinstance(material, dict) and {"certificate", "x509CertificateChain"} & set(material):
        raise SignatureFormatError(
            f"{source} was made with a certificate, not with a key", advice="Check it with `model_signing verify` instead."
        )
    outer = members(outer, {"mediaType": str, "verificationMaterial": dict, "dsseEnvelope": dict}, source)
    if outer["mediaType"] != MEDIA_TYPE:
        raise SignatureFormatError(f"{source} is a bundle of another kind: {outer['mediaType']!r}")
    material = members(outer["verificationMaterial"], {"publicKey": dict, "tlogEntries": list}, source, tlogEntries=[])
    key_id = members(material["publicKey"], {"hint": str}, source)["hint"]
    if material["tlogEntries"] or not _is_digest(key_id):
        raise SignatureFormatError(f"{source} names no key, or relies on a transparency log")
    envelope = parse_envelope(outer["dsseEnvelope"], source)
    if envelope.payload_type != PAYLOAD_TYPE or [name for name, _ in envelope.signatures] not in ([""], [key_id]):
        raise SignatureFormatError(f"{source} holds no statement with a single signature")
    return Bundle(source, key_id, _digest(envelope.payload, source), envelope)


def _digest(payload: bytes, source: str) -> str:
    """The SHA-256 that a statement names for its only file."""
    kinds: dict[str, type] = {"_type": str, "subject": list, "predicateType": str, "predicate": dict}
    statement = members(parse_json(payload, source), kinds, source)
    if (statement["_type"], statement["predicateType"]) != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise SignatureFormatError(f"{source} states something else than a model signature")
    # Other members of the predicate are for other tools, as the format has it.
    predicate = statement["predicate"]
    resource = members(_only(predicate.get("resources"), source), {"name": str, "algorithm": str, "digest": str}, source)
    subject = members(_only(statement["subject"], source), {"name": str, "digest": dict}, source)
    serialization = predicate.get("serialization")
    if resource["name"] != "." or not isinstance(serialization, dict) or serialization.get("method") != "files":
        raise SignatureFormatError(f"{source} signs a folder or parts of files, not one file")
    if resource["algorithm"] != "sha256" or serialization.get("hash_type") != "sha256" or not _is_digest(resource["digest"]):
        raise SignatureFormatError(f"{source} uses another hash than SHA-256: {resource['algorithm']!r}")
    if subject["digest"] != {"sha256": _root(resource["digest"])}:
        raise SignatureFormatError(f"{source} contradicts itself: its subject is not its file")
    return str(resource["digest"])


def _only(value: Any, source: str) -> Any:
    if not isinstance(value, list) or len(value) != 1:
        raise SignatureFormatError(f"{source} is not about exactly one file")
    return value[0]


def _root(digest: str) -> str:
    return sha256(bytes.fromhex(digest)).hexdigest()


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
