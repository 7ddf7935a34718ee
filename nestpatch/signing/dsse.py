"""Signed envelopes (DSSE 1.0): a payload, its type, and signatures over both. Bytes in, values out: no files and no clock.

What is signed is "DSSEv1", the lengths, the type and the payload: a signature for one type never passes for another.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nestpatch.errors import SignatureFormatError
from nestpatch.signing.keys import PrivateKey, PublicKey

MAX_BYTES = 1 << 20
"""Of a signed file at most: all of them are kilobytes."""


@dataclass(frozen=True)
class Envelope:
    """What an envelope holds. Nothing of it is proven before `signed_by` has said so."""

    payload_type: str
    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]
    """(key id as stated, signature) of each signer; the key id is a hint."""

    def signed_by(self, key: PublicKey) -> bool:
        """Whether one of the signatures was made with this key."""
        message = pae(self.payload_type, self.payload)
        return any(key.verifies(signature, message) for _, signature in self.signatures)

    def as_json(self) -> dict[str, Any]:
        """As a JSON object."""
        signatures = [{"sig": _encode(signature), "keyid": key_id} for key_id, signature in self.signatures]
        return {"payload": _encode(self.payload), "payloadType": self.payload_type, "signatures": signatures}


def pae(payload_type: str, payload: bytes) -> bytes:
    """The bytes that are signed."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def seal(payload_type: str, payload: bytes, keys: Sequence[PrivateKey], *, name_keys: bool = True) -> Envelope:
    """Signs a payload with every key. Without `name_keys` the key ids are left empty."""
    message = pae(payload_type, payload)
    signatures = tuple((key.public.key_id if name_keys else "", key.sign(message)) for key in keys)
    return Envelope(payload_type, payload, signatures)


def parse_envelope(value: Any, source: str) -> Envelope:
    """Reads the JSON object of an envelope; `source` is for messages. Raises SignatureFormatError."""
    facts = members(value, {"payload": str, "payloadType": str, "signatures": list}, source)
    signatures = []
    for entry in facts["signatures"]:
        signature = members(entry, {"sig": str, "keyid": str}, source, keyid="")
        signatures.append((signature["keyid"], decode(signature["sig"], source)))
    return Envelope(facts["payloadType"], decode(facts["payload"], source), tuple(signatures))


def parse_json(data: bytes, source: str) -> Any:
    """Reads JSON in which no key occurs twice. Raises SignatureFormatError."""
    if len(data) > MAX_BYTES:
        raise SignatureFormatError(f"{source} is too long: {len(data)} bytes")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise SignatureFormatError(f"{source} is no JSON that nestpatch reads: {error}") from error


def members(value: Any, kinds: dict[str, type], source: str, **defaults: Any) -> dict[str, Any]:
    """An object with exactly these members, of these types; those with a default may be absent. Raises SignatureFormatError."""
    value = defaults | value if isinstance(value, dict) else value
    if not isinstance(value, dict) or set(value) != set(kinds):
        found = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise SignatureFormatError(f"{source}: expected {', '.join(sorted(kinds))}, found {found}")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise SignatureFormatError(f"{source}: {name} is no {kind.__name__}")
    return dict(value)


def decode(text: str, source: str) -> bytes:
    """Base64 in its one canonical form. Raises SignatureFormatError."""
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise SignatureFormatError(f"{source} holds broken base64: {error}") from error
    if _encode(data) != text:
        raise SignatureFormatError(f"{source} holds base64 that is not canonical")
    return data


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result
