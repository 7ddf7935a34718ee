"""What this user remembers of channels: one file per place, in the folder of the user's trusted keys, never beside a model.

Whoever hands over a model could else hand over what is remembered, and so make old channels look new.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from nestpatch.errors import ChannelFormatError, KeyFileError, SignatureFormatError
from nestpatch.files import alone
from nestpatch.formats.atomic import write_bytes
from nestpatch.hub.channel import Seen
from nestpatch.signing.dsse import members, parse_json
from nestpatch.signing.keys import parse_public
from nestpatch.signing.trust import trust_file

FORMAT = "nestpatch-seen/1"


@dataclass(frozen=True)
class Memory:
    """What is remembered of the channel at one place."""

    seen: Seen
    version: str
    """By which the place tells that nothing is new: a commit, an ETag."""
    data: bytes
    """The channel file itself. It is judged anew each time: it may have expired, or its key lost the user's trust."""


def memory_file(place: str) -> Path:
    """Where the channel at a place is remembered."""
    return trust_file().with_name("channels") / f"{sha256(place.encode('utf-8')).hexdigest()[:32]}.json"


def recall(place: str) -> Memory | None:
    """What is remembered of a place; None before the first contact. Raises ChannelFormatError when the file is broken."""
    file = memory_file(place)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        kinds: dict[str, type] = {"format": str, "place": str, "name": str, "serial": int, "digest": str, "roots": list}
        facts = members(parse_json(data, str(file)), {**kinds, "version": str, "channel": str}, str(file))
        if facts["format"] != FORMAT or facts["place"] != place or not facts["roots"]:
            raise SignatureFormatError(f"{file} is of another nestpatch, or of another place")
        roots = tuple(parse_public(str(pem).encode("utf-8"), str(file)) for pem in facts["roots"])
        seen = Seen(facts["name"], facts["serial"], facts["digest"], roots)
        return Memory(seen, facts["version"], facts["channel"].encode("utf-8"))
    except (SignatureFormatError, KeyFileError, UnicodeError) as error:
        advice = f"Removing it ({file}) makes the next contact the first one: old channels would not be noticed then."
        raise ChannelFormatError(f"what is remembered of {place} is broken: {error}", advice=advice) from error


def remember(place: str, memory: Memory) -> None:
    """Keeps what was seen, unless another process has seen newer things meanwhile. Raises OutputError."""
    file = memory_file(place)
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(file.with_suffix(".lock")):
        known = recall(place)
        if known is not None and (known == memory or known.seen.serial > memory.seen.serial):
            return
        seen = memory.seen
        value = {
            "format": FORMAT,
            "place": place,
            "name": seen.name,
            "serial": seen.serial,
            "digest": seen.digest,
            "roots": [key.pem for key in seen.roots],
            "version": memory.version,
            "channel": memory.data.decode("utf-8"),
        }
        text = json.dumps(value, indent=1) + "\n"
        write_bytes(file, text.encode("utf-8"), overwrite=True, mode=0o600)
