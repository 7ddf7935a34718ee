"""What this user remembers of channels, in the folder of the user's trusted keys, never beside a model.

Whoever hands over a model could else hand over what is remembered, and so make old channels look new.

- channels/ holds one file for each channel: how far it was seen, at whatever place. It is found by the channel's name and the
  first root key that was met. This decides what is a rollback.
- channels/places/ holds one file for each place: which of these channels it served, and its last answer, for the next request.
  A place is bound to its channel by it. It proves nothing else: the answer is judged anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.channels.listing import Channel, parse
from nestpatch.channels.rules import Admitted, Gate, Seen
from nestpatch.errors import ChannelFormatError, KeyFileError, SignatureFormatError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.signing.dsse import members
from nestpatch.signing.keys import parse_public
from nestpatch.signing.store import trust_file

FORMAT = "nestpatch-seen/2"
PLACE_FORMAT = "nestpatch-place/1"


@dataclass(frozen=True)
class Memory:
    """What is remembered of the channel at one place."""

    seen: Seen
    """Of the channel, whichever place showed it."""
    version: str
    """By which the place tells that nothing is new: a commit, an ETag."""
    data: bytes
    """The channel file itself. It is judged anew each time: it may have expired, or its key lost the user's trust."""


def _folder() -> Path:
    return trust_file().with_name("channels")


def memory_file(root: str, name: str) -> Path:
    """Where a channel is remembered. `root`: key id of the first root key that was met."""
    return _folder() / f"{_short(name)}-{root[:32]}.json"


def place_file(place: str) -> Path:
    """Where the last answer of a place is kept."""
    return _folder() / "places" / f"{_short(place)}.json"


def _short(text: str) -> str:
    return sha256(text.encode("utf-8")).hexdigest()[:32]


def recall(place: str) -> Memory | None:
    """What is remembered of a place and its channel; None before the first contact.

    Raises ChannelFormatError when a file is broken.
    """
    file = place_file(place)
    lost = "makes the next contact with this place the first one: another channel there would not be noticed then."
    with _explained(file, f"what is remembered of {place} is broken", lost):
        kinds: dict[str, type] = {"format": str, "place": str, "root": str, "name": str, "version": str, "channel": str}
        facts = _read(file, kinds, format=PLACE_FORMAT, place=place)
        seen = None if facts is None else recall_channel(facts["root"], facts["name"])
        return None if facts is None or seen is None else Memory(seen, facts["version"], facts["channel"].encode("utf-8"))


def recall_channel(root: str, name: str) -> Seen | None:
    """How far a channel was seen; None for never. Raises ChannelFormatError when the file is broken."""
    return _recall_file(memory_file(root, name), name)


def recall_all(channel: Channel) -> tuple[Seen, ...]:
    """All that is remembered of a channel, from whatever place. Raises ChannelFormatError when a file is broken."""
    files = sorted(_folder().glob(f"{_short(channel.name)}-*.json"))
    found = (_recall_file(file, channel.name) for file in files)
    return tuple(seen for seen in found if seen is not None and seen.is_of(channel))


def _recall_file(file: Path, name: str) -> Seen | None:
    lost = "makes the next contact with this channel the first one: old copies would not be noticed then."
    with _explained(file, f"what is remembered of the channel {name} is broken", lost):
        kinds: dict[str, type] = {"format": str, "name": str, "serial": int, "digest": str, "roots": list}
        facts = _read(file, kinds, format=FORMAT, name=name)
        if facts is None:
            return None
        roots = tuple(parse_public(str(pem).encode("utf-8"), str(file)) for pem in facts["roots"])
        if not roots or memory_file(roots[0].key_id, name) != file:
            raise SignatureFormatError(f"{file} is of another channel")
        return Seen(name, facts["serial"], facts["digest"], roots)


def _read(file: Path, kinds: dict[str, type], **expected: str) -> dict[str, Any] | None:
    """The members of a file, of which some are known; None when there is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    facts = members(json.loads(text), kinds, str(file))
    for name, value in expected.items():
        if facts[name] != value:
            raise SignatureFormatError(f"{file} has the {name} {facts[name][:80]!r}, expected {value!r}")
    return facts


@contextmanager
def _explained(file: Path, what: str, lost: str) -> Iterator[None]:
    try:
        yield
    except (SignatureFormatError, KeyFileError, ValueError, RecursionError) as error:
        # ValueError: no UTF-8, no JSON.
        raise ChannelFormatError(f"{what}: {error}", advice=f"Removing the file ({file}) {lost}") from error


def judged(gate: Gate, place: str, data: bytes, source: str) -> Admitted:
    """The channel that a place holds, by the rules and by all that is remembered: of the place, and of the channel elsewhere.

    Call it inside `held`, with `keep` after it. Raises a ChannelError that says which rule is broken.
    """
    envelope, channel = parse(data, source)
    known = recall(place)
    # The place first: it must go on with the channel that it had.
    seen = dict.fromkeys([*([known.seen] if known else []), *recall_all(channel)])
    found = [replace(gate, seen=one).judge(envelope, channel, source) for one in seen or (None,)]
    return found[0]


@contextmanager
def held() -> Iterator[None]:
    """What is remembered does not change meanwhile, by whichever process. Raises OSError."""
    for folder in (_folder(), _folder() / "places"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(_folder() / ".lock"):
        yield


def remember(place: str, memory: Memory) -> None:
    """Keeps what was seen, unless another process has seen newer things meanwhile. Raises OutputError."""
    with held():
        keep(place, memory)


def keep(place: str, memory: Memory) -> None:
    """The same inside `held`."""
    seen = memory.seen
    root = seen.roots[0].key_id
    known = recall_channel(root, seen.name)
    if known is not None and known.order > seen.order:
        return
    facts = {"name": seen.name, "serial": seen.serial, "digest": seen.digest, "roots": [key.pem for key in seen.roots]}
    if known != seen:
        _write(memory_file(root, seen.name), {"format": FORMAT, **facts})
    if recall(place) != memory:
        answer = {"version": memory.version, "channel": memory.data.decode("utf-8")}
        _write(place_file(place), {"format": PLACE_FORMAT, "place": place, "root": root, "name": seen.name, **answer})


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Called inside `held` alone."""
    text = json.dumps(value, indent=1) + "\n"
    sweep_writes(file)
    write_bytes(file, text.encode("utf-8"), overwrite=True, mode=0o600)
