"""The content of a channel: values, and their JSON inside a signed envelope. No rules, no files, no clock.

A channel is one file, `channel.json`: a DSSE envelope whose payload is a Channel as canonical JSON. docs/fleet.md lists its
fields.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
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
from nestpatch.formats.manifest import canonical_json
from nestpatch.pack import Manifest, is_utc_time, name_problem, version_problem
from nestpatch.signing.envelopes import Envelope, members, parse_json
from nestpatch.signing.keys import PublicKey
from nestpatch.version import Version

FORMAT = "nestpatch-channel/1"
PAYLOAD_TYPE = "application/vnd.nestpatch.channel.v1+json"
SUCCESSION_TYPE = "application/vnd.nestpatch.succession.v1+json"
CHANNEL_FILE = "channel.json"
MAX_NUMBER = 1 << 53
MAX_FIRST = 1_000_000
"""Highest serial number since a hand-over that a new reader accepts. A publisher who gets there hands over to a new key."""
_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}"
_SIGNATURE = re.compile(r"(?:\.[0-9a-f]{12})?\.sig", re.ASCII)
_NAME = re.compile(rf"{_PART}(?:/{_PART})?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class ListedStatus(str, Enum):
    """The publisher's judgement of a version."""

    ACTIVE = "active"
    SUPERSEDED = "superseded"
    YANKED = "yanked"


@dataclass(frozen=True)
class ListedFile:
    """A file of the channel. It never changes once it is listed."""

    path: str
    """packs/<version>/<file name>."""
    size: int
    """Bytes."""
    sha256: str

    @property
    def name(self) -> str:
        """The file name, without its folders."""
        return self.path.rpartition("/")[2]

    def check(self, data: bytes, address: str) -> None:
        """Checks that bytes are those of this file.

        Args:
            data: The bytes that were read.
            address: Where they were read, for messages.

        Raises:
            SwappedFileError: They have another size or SHA-256.
        """
        digest = sha256(data).hexdigest()
        if len(data) != self.size or digest != self.sha256:
            expected, got = (
                f"{size} bytes of sha256 {sha[:12]}.." for size, sha in ((self.size, self.sha256), (len(data), digest))
            )
            raise SwappedFileError(f"{self.path} in {address} is not what the channel lists: expected {expected}, got {got}")

    def as_json(self) -> dict[str, Any]:
        """The file as a JSON object."""
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class ListedPack:
    """One published version."""

    name: str
    """Name of the pack, the same in all versions of a channel."""
    version: str
    file: ListedFile
    signatures: tuple[ListedFile, ...]
    base_model: str
    """For people; the digest decides."""
    base_sha256: str
    """`base_digest` of the pack."""
    supersedes: tuple[str, ...] = ()
    """Ids (SHA-256) of packs that this one replaces."""
    status: ListedStatus = ListedStatus.ACTIVE
    reason: str = ""
    """Why it was yanked."""

    @property
    def label(self) -> str:
        """Name and version, for people."""
        return f"{self.name} {self.version}"

    @property
    def order(self) -> Version:
        """The version as a value that sorts."""
        return Version.parse(self.version)


@dataclass(frozen=True)
class Succession:
    """A root key hands the channel over to the next one."""

    envelope: Envelope
    channel: str
    """Name of the channel."""
    old: str
    """Id of the key that hands over."""
    new: PublicKey


@dataclass(frozen=True)
class Channel:
    """One state of a channel."""

    name: str
    """On the Hub the name of the repository."""
    root: PublicKey
    """The key that signs it."""
    serial: int = 0
    """Incremented by every change; starts at 1 again after a hand-over. 0: not issued yet."""
    issued: str = ""
    expires: str = ""
    successions: tuple[Succession, ...] = ()
    packs: tuple[ListedPack, ...] = ()
    """In the order of their versions."""

    def walk(self, start: PublicKey) -> tuple[PublicKey, ...]:
        """Follows the hand-overs of this channel that are signed.

        Args:
            start: The key to begin with.

        Returns:
            The key itself, and the keys to which it has handed the channel over, step by step.
        """
        trail = [start]
        for step in self.successions:
            last = trail[-1]
            if step.channel == self.name and step.old == last.key_id and step.envelope.signed_by(last):
                trail.append(step.new)
        return tuple(trail)


def base_digest(manifest: Manifest) -> str:
    """What identifies the base of a pack.

    Args:
        manifest: The pack's manifest.

    Returns:
        SHA-256 (hex) over shape, dtype and SHA-256 of every tensor that the pack touches.
    """
    tensors = {name: [list(t.shape), t.dtype, t.sha256] for name, t in manifest.base.tensors.items()}
    return sha256(canonical_json(tensors).encode("utf-8")).hexdigest()


def parse(data: bytes, source: str) -> tuple[Envelope, Channel]:
    """Reads a channel file. Nothing of it is proven.

    Args:
        data: The content of channel.json.
        source: What it is, for messages.

    Returns:
        The envelope, and the channel in it.

    Raises:
        ChannelFormatError: The file is broken, of a newer format, or contradicts itself.
        ChannelPathError: It lists a file outside of its own folders.
    """
    try:
        envelope = Envelope.parse(parse_json(data, source), source)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ChannelFormatError(f"{source} has the type {envelope.payload_type[:80]!r}, expected a channel")
        channel = _parse_channel(parse_json(envelope.payload, source), source)
        # One content has one form: less strict readers could take another form for something else.
        _require(payload(channel) == envelope.payload, source, "it is not in canonical form")
    except (SignatureFormatError, KeyFileError, PackContentError, ValueError) as error:
        # ValueError: texts that are not Unicode, numbers of thousands of digits.
        raise ChannelFormatError(str(error)) from error
    return envelope, channel


def write_envelope(envelope: Envelope) -> bytes:
    """Writes a channel file.

    Args:
        envelope: The signed channel.

    Returns:
        The content of channel.json.
    """
    return (json.dumps(envelope.as_json(), indent=1) + "\n").encode("ascii")


def _parse_channel(value: Any, source: str) -> Channel:
    if isinstance(value, dict) and value.get("format") != FORMAT:
        advice = "Upgrade nestpatch: pip install -U nestpatch"
        found = str(value.get("format"))[:80]
        raise ChannelFormatError(f"{source} has the format {found!r}; this nestpatch reads {FORMAT}", advice=advice)
    kinds: dict[str, type] = {"format": str, "name": str, "serial": int, "issued": str, "expires": str, "root": str}
    facts = members(value, {**kinds, "successions": list, "packs": list}, source)
    packs = tuple(_parse_pack(entry, source) for entry in facts["packs"])
    _require(bool(_NAME.fullmatch(facts["name"])), source, f"invalid name {facts['name'][:80]!r}")
    _require(0 < facts["serial"] < MAX_NUMBER, source, "the serial number is out of range")
    _require(is_utc_time(facts["issued"]) and is_utc_time(facts["expires"]), source, "issued or expires is not a UTC time")
    _require(facts["issued"] < facts["expires"], source, "it expires before it was issued")
    _require(len({p.name for p in packs}) <= 1, source, "it lists packs of different names")
    _require(len({p.order for p in packs}) == len(packs), source, "duplicate version")
    paths = [file.path for pack in packs for file in (pack.file, *pack.signatures)]
    _require(len({path.lower() for path in paths}) == len(paths), source, "duplicate path")
    return Channel(
        facts["name"],
        PublicKey.parse(facts["root"].encode("utf-8"), source),
        facts["serial"],
        facts["issued"],
        facts["expires"],
        tuple(_parse_succession(entry, source) for entry in facts["successions"]),
        tuple(sorted(packs, key=lambda pack: pack.order)),
    )


def _parse_pack(value: Any, source: str) -> ListedPack:
    kinds: dict[str, type] = {"name": str, "version": str, "path": str, "size": int, "sha256": str, "signatures": list}
    kinds |= {"base": dict, "supersedes": list, "status": str, "reason": str}
    facts = members(value, kinds, source, reason="")
    base = members(facts["base"], {"model": str, "sha256": str}, source)
    problem = name_problem(facts["name"]) or version_problem(facts["version"])
    _require(problem is None, source, problem or "")
    _require(facts["status"] in [status.value for status in ListedStatus], source, f"unknown status {facts['status'][:80]!r}")
    digests = [base["sha256"], *facts["supersedes"]]
    _require(all(isinstance(d, str) and _SHA256.fullmatch(d) for d in digests), source, "a digest is not a SHA-256")
    path = pack_path(facts["name"], facts["version"])
    return ListedPack(
        facts["name"],
        facts["version"],
        _parse_file({name: facts[name] for name in ("path", "size", "sha256")}, path, source),
        tuple(_parse_file(entry, path, source, _SIGNATURE) for entry in facts["signatures"]),
        base["model"],
        base["sha256"],
        tuple(facts["supersedes"]),
        ListedStatus(facts["status"]),
        facts["reason"],
    )


def pack_path(name: str, version: str) -> str:
    """Where a version is stored inside the channel. Its signatures have this path and a suffix; no other paths are allowed.

    Args:
        name: Name of the pack.
        version: Its version number.

    Returns:
        The path, relative to the channel's folder.
    """
    return f"packs/{version}/{name}.nest"


def _parse_file(value: Any, path: str, source: str, suffix: re.Pattern[str] | None = None) -> ListedFile:
    facts = members(value, {"path": str, "size": int, "sha256": str}, source)
    rest = facts["path"].removeprefix(path)
    fits = suffix.fullmatch(rest) is not None if suffix else not rest
    if not facts["path"].startswith(path) or not fits:
        raise ChannelPathError(f"{source} lists the file {facts['path'][:120]!r}; only {path} and its signatures are allowed")
    _require(0 < facts["size"] < MAX_NUMBER, source, f"the size of {facts['path']} is out of range")
    _require(bool(_SHA256.fullmatch(facts["sha256"])), source, "a digest is not a SHA-256")
    return ListedFile(facts["path"], facts["size"], facts["sha256"])


def _parse_succession(value: Any, source: str) -> Succession:
    envelope = Envelope.parse(value, source)
    _require(envelope.payload_type == SUCCESSION_TYPE, source, "a succession has another type")
    facts = members(parse_json(envelope.payload, source), {"channel": str, "old": str, "new": str}, source)
    return Succession(envelope, facts["channel"], facts["old"], PublicKey.parse(facts["new"].encode("utf-8"), source))


def payload(channel: Channel) -> bytes:
    """What the root key signs.

    Args:
        channel: The channel.

    Returns:
        The channel as canonical JSON.
    """
    packs = [
        {
            "name": pack.name,
            "version": pack.version,
            **pack.file.as_json(),
            "signatures": [file.as_json() for file in pack.signatures],
            "base": {"model": pack.base_model, "sha256": pack.base_sha256},
            "supersedes": list(pack.supersedes),
            "status": pack.status.value,
            "reason": pack.reason,
        }
        for pack in channel.packs
    ]
    value = {
        "format": FORMAT,
        "name": channel.name,
        "serial": channel.serial,
        "issued": channel.issued,
        "expires": channel.expires,
        "root": channel.root.pem,
        "successions": [step.envelope.as_json() for step in channel.successions],
        "packs": packs,
    }
    return canonical_json(value).encode("utf-8")


def _require(condition: bool, source: str, reason: str) -> None:
    if not condition:
        raise ChannelFormatError(f"{source} is invalid: {reason}")
