"""What a channel says: values, and their JSON inside a signed envelope. Bytes in, values out: no rules, no files, no clock.

A channel is one file, `channel.json`: a DSSE envelope whose payload is a Channel as canonical JSON. docs/fleet.md lists its
fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from hashlib import sha256
from typing import Any

from nestpatch.errors import (
    ChannelFormatError,
    ChannelPathError,
    KeyFileError,
    PackContentError,
    SignatureFormatError,
    SwappedFileError,
)
from nestpatch.formats.nest import canonical_json
from nestpatch.pack import Manifest, name_problem, version_problem
from nestpatch.signing.dsse import Envelope, members, parse_envelope, parse_json
from nestpatch.signing.keys import PublicKey, parse_public
from nestpatch.version import Version

FORMAT = "nestpatch-channel/1"
PAYLOAD_TYPE = "application/vnd.nestpatch.channel.v1+json"
SUCCESSION_TYPE = "application/vnd.nestpatch.succession.v1+json"
CHANNEL_FILE = "channel.json"
TIME = "%Y-%m-%dT%H:%M:%SZ"
MAX_NUMBER = 1 << 53
MAX_FIRST = 1_000_000
"""The highest serial number since a hand-over that a reader takes who has seen none. A publisher who gets there hands over."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"
_SIGNATURE = re.compile(r"(?:\.[0-9a-f]{12})?\.sig", re.ASCII)
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class ListedStatus(str, Enum):
    """What the publisher thinks of a version."""

    ACTIVE = "active"
    SUPERSEDED = "superseded"
    REVOKED = "revoked"


@dataclass(frozen=True)
class ListedFile:
    """A file beside the channel, which never changes once it is named."""

    path: str
    """packs/<version>/<file name>."""
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def check(self, data: bytes, place: str) -> None:
        """Raises SwappedFileError unless these are its bytes."""
        digest = sha256(data).hexdigest()
        if len(data) != self.size or digest != self.sha256:
            expected, got = (
                f"{size} bytes of sha256 {sha[:12]}.." for size, sha in ((self.size, self.sha256), (len(data), digest))
            )
            raise SwappedFileError(f"{self.path} in {place} is not what the channel names: expected {expected}, got {got}")


@dataclass(frozen=True)
class ListedPack:
    """One published version."""

    id: str
    """The patch's name, the same in all versions of a channel."""
    version: str
    file: ListedFile
    signatures: tuple[ListedFile, ...]
    base_model: str
    """For people; the digest decides."""
    base_sha256: str
    """Of the base's touched tensors (`base_digest`)."""
    supersedes: tuple[str, ...] = ()
    status: ListedStatus = ListedStatus.ACTIVE
    reason: str = ""
    """Why it was revoked."""

    @property
    def label(self) -> str:
        return f"{self.id} {self.version}"

    @property
    def order(self) -> Version:
        return Version.parse(self.version)


@dataclass(frozen=True)
class Succession:
    """A root key that hands the channel over to the next one."""

    envelope: Envelope
    channel: str
    old: str
    """Key id."""
    new: PublicKey


@dataclass(frozen=True)
class Channel:
    """One state of a channel."""

    name: str
    """On the Hub that of the repository."""
    serial: int
    """One more with every change; a hand-over starts again at one."""
    issued: str
    expires: str
    root: PublicKey
    """The key that signs it."""
    successions: tuple[Succession, ...] = ()
    packs: tuple[ListedPack, ...] = field(default=())
    """In the order of their versions."""

    def walk(self, start: PublicKey) -> tuple[PublicKey, ...]:
        """The keys to which a key has handed this channel down, itself first."""
        trail = [start]
        for step in self.successions:
            last = trail[-1]
            if step.channel == self.name and step.old == last.key_id and step.envelope.signed_by(last):
                trail.append(step.new)
        return tuple(trail)


def base_digest(manifest: Manifest) -> str:
    """What identifies the base of a pack: SHA-256 over shape, dtype and SHA-256 of every tensor that it touches."""
    tensors = {name: [list(t.shape), t.dtype, t.sha256] for name, t in manifest.base.tensors.items()}
    return sha256(canonical_json(tensors).encode("utf-8")).hexdigest()


def parse(data: bytes, source: str) -> tuple[Envelope, Channel]:
    """Reads a channel file, without believing it. Raises ChannelFormatError or ChannelPathError."""
    try:
        envelope = parse_envelope(parse_json(data, source), source)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ChannelFormatError(f"{source} is no channel but {envelope.payload_type[:80]!r}")
        channel = _channel(parse_json(envelope.payload, source), source)
        # One content has one form: what readers that are less strict would take for something else is refused.
        _require(payload(channel) == envelope.payload, source, "it is not in canonical form")
    except (SignatureFormatError, KeyFileError, PackContentError, ValueError) as error:
        # ValueError: texts that are no Unicode, numbers of thousands of digits.
        raise ChannelFormatError(str(error)) from error
    return envelope, channel


def write_envelope(envelope: Envelope) -> bytes:
    """The content of a channel file."""
    return (json.dumps(envelope.as_json(), indent=1) + "\n").encode("ascii")


def _channel(value: Any, source: str) -> Channel:
    if isinstance(value, dict) and value.get("format") != FORMAT:
        advice = "Upgrade nestpatch: pip install -U nestpatch"
        found = str(value.get("format"))[:80]
        raise ChannelFormatError(f"{source} has the format {found!r}; this nestpatch reads {FORMAT}", advice=advice)
    kinds: dict[str, type] = {"format": str, "name": str, "serial": int, "issued": str, "expires": str, "root": str}
    facts = members(value, {**kinds, "successions": list, "packs": list}, source)
    packs = tuple(_pack(entry, source) for entry in facts["packs"])
    _require(bool(_NAME.fullmatch(facts["name"])), source, "its name is none")
    _require(0 < facts["serial"] < MAX_NUMBER, source, "its serial number makes no sense")
    _require(is_time(facts["issued"]) and is_time(facts["expires"]), source, "its times are no times")
    _require(facts["issued"] < facts["expires"], source, "it expires before it was issued")
    _require(len({p.id for p in packs}) <= 1, source, "it mixes different patches")
    _require(len({p.order for p in packs}) == len(packs), source, "a version is there twice")
    paths = [file.path for pack in packs for file in (pack.file, *pack.signatures)]
    _require(len({path.lower() for path in paths}) == len(paths), source, "two files have the same path")
    return Channel(
        facts["name"],
        facts["serial"],
        facts["issued"],
        facts["expires"],
        parse_public(facts["root"].encode("utf-8"), source),
        tuple(_succession(entry, source) for entry in facts["successions"]),
        tuple(sorted(packs, key=lambda pack: pack.order)),
    )


def _pack(value: Any, source: str) -> ListedPack:
    kinds: dict[str, type] = {"id": str, "version": str, "path": str, "size": int, "sha256": str, "signatures": list}
    kinds |= {"base": dict, "supersedes": list, "status": str, "reason": str}
    facts = members(value, kinds, source, reason="")
    base = members(facts["base"], {"model": str, "sha256": str}, source)
    problem = name_problem(facts["id"]) or version_problem(facts["version"])
    _require(problem is None, source, problem or "")
    _require(facts["status"] in [status.value for status in ListedStatus], source, f"unknown status {facts['status'][:80]!r}")
    digests = [base["sha256"], *facts["supersedes"]]
    _require(all(isinstance(d, str) and _SHA256.fullmatch(d) for d in digests), source, "a digest is no SHA-256")
    path = pack_path(facts["id"], facts["version"])
    file = _file({name: facts[name] for name in ("path", "size", "sha256")}, path, source)
    signatures = tuple(_file(entry, path, source, _SIGNATURE) for entry in facts["signatures"])
    supersedes, status = tuple(facts["supersedes"]), ListedStatus(facts["status"])
    return ListedPack(
        facts["id"], facts["version"], file, signatures, base["model"], base["sha256"], supersedes, status, facts["reason"]
    )


def pack_path(pack_name: str, version: str) -> str:
    """Where the pack of a version lies; its signatures lie beside it. Files have no other names, so they cannot escape."""
    return f"packs/{version}/{pack_name}.nest"


def _file(value: Any, path: str, source: str, suffix: re.Pattern[str] | None = None) -> ListedFile:
    facts = members(value, {"path": str, "size": int, "sha256": str}, source)
    rest = facts["path"].removeprefix(path)
    fits = suffix.fullmatch(rest) is not None if suffix else not rest
    if not facts["path"].startswith(path) or not fits:
        raise ChannelPathError(f"{source} names the file {facts['path'][:120]!r} where only {path} and its signatures may be")
    _require(0 < facts["size"] < MAX_NUMBER, source, f"{facts['path']} has an impossible size")
    _require(bool(_SHA256.fullmatch(facts["sha256"])), source, "a digest is no SHA-256")
    return ListedFile(facts["path"], facts["size"], facts["sha256"])


def _succession(value: Any, source: str) -> Succession:
    envelope = parse_envelope(value, source)
    _require(envelope.payload_type == SUCCESSION_TYPE, source, "a succession is something else")
    facts = members(parse_json(envelope.payload, source), {"channel": str, "old": str, "new": str}, source)
    return Succession(envelope, facts["channel"], facts["old"], parse_public(facts["new"].encode("utf-8"), source))


def succession_payload(channel: str, old: PublicKey, new: PublicKey) -> bytes:
    """What the old key signs to hand a channel over."""
    return canonical_json({"channel": channel, "old": old.key_id, "new": new.pem}).encode("utf-8")


def payload(channel: Channel) -> bytes:
    """What the root key signs."""
    value = {
        "format": FORMAT,
        "name": channel.name,
        "serial": channel.serial,
        "issued": channel.issued,
        "expires": channel.expires,
        "root": channel.root.pem,
        "successions": [step.envelope.as_json() for step in channel.successions],
        "packs": [_pack_json(pack) for pack in channel.packs],
    }
    return canonical_json(value).encode("utf-8")


def _pack_json(pack: ListedPack) -> dict[str, Any]:
    return {
        "id": pack.id,
        "version": pack.version,
        **_file_json(pack.file),
        "signatures": [_file_json(file) for file in pack.signatures],
        "base": {"model": pack.base_model, "sha256": pack.base_sha256},
        "supersedes": list(pack.supersedes),
        "status": pack.status.value,
        "reason": pack.reason,
    }


def _file_json(file: ListedFile) -> dict[str, Any]:
    return {"path": file.path, "size": file.size, "sha256": file.sha256}


def is_time(text: str) -> bool:
    """Whether a text is a UTC time in whole seconds. Such texts are ordered as their times are."""
    try:
        return datetime.strptime(text, TIME).strftime(TIME) == text  # noqa: DTZ007 - UTC by its Z
    except ValueError:
        return False


def _require(condition: bool, source: str, reason: str) -> None:
    if not condition:
        raise ChannelFormatError(f"{source} makes no sense: {reason}")
