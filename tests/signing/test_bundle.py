"""Every part of a signature, altered in every way: each is refused by name."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import pytest

from nestpatch.errors import BadSignatureError, SignatureError, SignatureFormatError
from nestpatch.signing import envelopes
from nestpatch.signing.envelopes import Envelope, _pae
from nestpatch.signing.verify import VerifiedPack, check_signatures
from tests.signing.conftest import People

Change = Callable[[Any], None]


@pytest.fixture(scope="session")
def good(people: People, pack_bytes: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(envelopes.Bundle.write(sha256(pack_bytes).hexdigest(), "no-harm.nest", people.acme))
    return value


def verdict(people: People, pack: bytes, signature: Any) -> type:
    """What judging ends with: a type of outcome or of error."""
    data = signature if isinstance(signature, bytes) else json.dumps(signature).encode()
    try:
        return type(check_signatures(pack, {"x.sig": data}, people.policy("acme", "audit")))
    except SignatureError as error:
        return type(error)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def statement_of(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
    return found


def resigned(people: People, statement: Any, payload_type: str = envelopes.PAYLOAD_TYPE) -> dict[str, Any]:
    """A bundle that acme really signed, over another statement."""
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    envelope = Envelope.sealed(payload_type, payload, [people.acme], name_keys=False)
    material = {"publicKey": {"hint": people.acme.public.key_id}, "tlogEntries": []}
    return {"mediaType": envelopes.MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope.as_json()}


def test_the_good_one_is_good(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    assert verdict(people, pack_bytes, good) is VerifiedPack
    # Members that the format lets out, and white space.
    good = copy.deepcopy(good)
    del good["verificationMaterial"]["tlogEntries"]
    del good["dsseEnvelope"]["signatures"][0]["keyid"]
    assert verdict(people, pack_bytes, json.dumps(good, indent=2).encode()) is VerifiedPack
    good["verificationMaterial"]["tlogEntries"] = []
    good["dsseEnvelope"]["signatures"][0]["keyid"] = people.acme.public.key_id
    assert verdict(people, pack_bytes, good) is VerifiedPack


def test_every_flipped_bit_is_noticed(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    data = json.dumps(good, separators=(",", ":")).encode()
    assert len(data) > 1000
    for position in range(len(data)):
        for bit in (1, 0x20):
            altered = bytearray(data)
            altered[position] ^= bit
            assert issubclass(verdict(people, pack_bytes, bytes(altered)), SignatureError), (position, bytes(altered))


def test_every_flipped_bit_of_the_pack_is_noticed(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    for position in range(0, len(pack_bytes), 7):
        altered = bytearray(pack_bytes)
        altered[position] ^= 1
        assert verdict(people, bytes(altered), good) is BadSignatureError
    assert verdict(people, pack_bytes + b"\0", good) is BadSignatureError
    assert verdict(people, pack_bytes[:-1], good) is BadSignatureError
    assert verdict(people, b"", good) is BadSignatureError


def test_every_part_is_needed_and_none_may_be_added(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    optional = {("verificationMaterial", "tlogEntries"), ("dsseEnvelope", "signatures", 0, "keyid")}
    for path in places(good):
        outer, last = path[:-1], path[-1]
        for other in (None, 0, True, 1.5, "x", [], {}, [{}], {"x": 1}):
            altered = copy.deepcopy(good)
            if at(good, path) != other:
                at(altered, outer)[last] = other
                assert issubclass(verdict(people, pack_bytes, altered), SignatureError), (path, other)
        altered = copy.deepcopy(good)
        del at(altered, outer)[last]
        if path not in optional:
            assert issubclass(verdict(people, pack_bytes, altered), SignatureError), path
        altered = copy.deepcopy(good)
        inner = at(altered, path)
        if isinstance(inner, dict):
            inner["more"] = "x"
        elif isinstance(inner, list):
            inner.append(inner[0] if inner else {})
        else:
            continue
        assert verdict(people, pack_bytes, altered) is SignatureFormatError, path


def test_the_statement_is_read_strictly_even_from_a_trusted_key(
    people: People, pack_bytes: bytes, good: dict[str, Any]
) -> None:
    statement = statement_of(good)
    assert verdict(people, pack_bytes, resigned(people, statement)) is VerifiedPack
    unread = {
        ("subject", 0, "name"),
        ("predicate", "serialization", "allow_symlinks"),
        ("predicate", "serialization", "ignore_paths"),
    }
    for path in places(statement):
        if path in unread:
            continue
        for other in (None, "x", [], {}, [{}, {}]):
            altered = copy.deepcopy(statement)
            at(altered, path[:-1])[path[-1]] = other
            assert issubclass(verdict(people, pack_bytes, resigned(people, altered)), SignatureError), (path, other)


def with_other_hash(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"][0]["algorithm"] = "blake3"


def with_two_files(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"] *= 2


def with_folder(statement: dict[str, Any]) -> None:
    statement["predicate"]["resources"][0]["name"] = "no-harm.nest"


def with_shards(statement: dict[str, Any]) -> None:
    statement["predicate"]["serialization"]["method"] = "shards"


def with_other_subject(statement: dict[str, Any]) -> None:
    statement["subject"][0]["digest"]["sha256"] = "0" * 64


def with_capitals(statement: dict[str, Any]) -> None:
    resource = statement["predicate"]["resources"][0]
    resource["digest"] = resource["digest"].upper()


def with_old_type(statement: dict[str, Any]) -> None:
    statement["predicateType"] = "https://model_signing/Digests/v0.1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_other_hash, "another hash than SHA-256"),
        (with_two_files, "not about exactly one file"),
        (with_folder, "signs a folder"),
        (with_shards, "signs a folder or parts"),
        (with_other_subject, "contradicts itself"),
        (with_capitals, "another hash"),
        (with_old_type, "something else than a model signature"),
    ],
)
def test_statements_that_say_something_else(
    people: People, pack_bytes: bytes, good: dict[str, Any], change: Change, says: str
) -> None:
    statement = statement_of(good)
    change(statement)
    data = json.dumps(resigned(people, statement)).encode()
    with pytest.raises(SignatureFormatError, match=says):
        check_signatures(pack_bytes, {"x.sig": data}, people.policy("acme"))


def test_a_digest_twice_in_a_signed_statement(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    text = json.dumps(statement_of(good)).encode()
    twice = text.replace(b'"algorithm"', b'"digest": "00", "algorithm"', 1)
    assert twice != text
    with pytest.raises(SignatureFormatError, match="duplicate key"):
        envelopes.Bundle.parse(json.dumps(resigned(people, twice)).encode(), "x.sig")


def test_a_signature_for_another_purpose_does_not_pass(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    """The same key signs channels: their envelopes are no signatures of packs, not even with their type exchanged."""
    channel = resigned(people, statement_of(good), "application/vnd.nestpatch.channel.v1+json")
    assert verdict(people, pack_bytes, channel) is SignatureFormatError
    channel["dsseEnvelope"]["payloadType"] = envelopes.PAYLOAD_TYPE
    assert verdict(people, pack_bytes, channel) is BadSignatureError


def test_the_signature_of_another_pack(people: People, pack_bytes: bytes) -> None:
    other = envelopes.Bundle.write(sha256(b"another pack").hexdigest(), "no-harm.nest", people.acme)
    with pytest.raises(BadSignatureError, match=r"made for other bytes .* expected sha256 .{12}\.\., got "):
        check_signatures(pack_bytes, {"x.sig": other}, people.policy("acme"))


def test_somebody_else_signs_in_acmes_name(people: People, pack_bytes: bytes) -> None:
    forged = json.loads(envelopes.Bundle.write(sha256(pack_bytes).hexdigest(), "no-harm.nest", people.evil))
    forged["verificationMaterial"]["publicKey"]["hint"] = people.acme.public.key_id
    assert verdict(people, pack_bytes, forged) is BadSignatureError


def test_payload_and_signature_of_different_bundles(people: People, pack_bytes: bytes, good: dict[str, Any]) -> None:
    other = json.loads(envelopes.Bundle.write(sha256(b"another pack").hexdigest(), "no-harm.nest", people.acme))
    mixed = copy.deepcopy(good)
    mixed["dsseEnvelope"]["signatures"] = other["dsseEnvelope"]["signatures"]
    assert verdict(people, pack_bytes, mixed) is BadSignatureError
    mixed = copy.deepcopy(other)
    mixed["dsseEnvelope"]["payload"] = good["dsseEnvelope"]["payload"]
    assert verdict(people, pack_bytes, mixed) is BadSignatureError


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"mediaType":1e999}', b" " * (1 << 20) + b"{}",
     b'{"a":1,"a":1}', b'{"mediaType":' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_what_is_no_bundle(data: bytes) -> None:
    with pytest.raises(SignatureFormatError, match=r"x\.sig"):
        envelopes.Bundle.parse(data, "x.sig")


def test_a_keyless_bundle_is_named(good: dict[str, Any]) -> None:
    keyless = good | {"verificationMaterial": {"certificate": {"rawBytes": "AA=="}, "tlogEntries": [{}]}}
    with pytest.raises(SignatureFormatError, match="made with a certificate") as caught:
        envelopes.Bundle.parse(json.dumps(keyless).encode(), "x.sig")
    assert "model_signing verify" in caught.value.advice


def test_what_is_signed_is_the_dsse_encoding() -> None:
    """The example of the DSSE specification."""
    assert _pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert _pae("é", b"") == "DSSEv1 2 é 0 ".encode()
