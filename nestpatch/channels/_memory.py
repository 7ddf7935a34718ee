"""What this user has seen of channels, in the folder of the user's trusted keys, never beside a model.

Otherwise whoever hands over a model could hand over this memory as well, and so make old channels look new.

- channels/ contains one file per channel: its newest state that was seen, at whatever address. It is found by the channel's
  name and the first root key that was met. This decides what is a rollback.
- channels/addresses/ contains one file per address: which of these channels it served, and its last answer, for the next
  request. It binds an address to its channel and proves nothing else: the answer is checked again each time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from nestpatch.channels.listing import parse
from nestpatch.channels.rules import AcceptedChannel, ChannelRules, SeenChannel
from nestpatch.errors import ChannelFormatError, KeyFileError, SignatureFormatError
from nestpatch.files.atomic import sweep_writes, write_bytes
from nestpatch.files.locks import exclusive
from nestpatch.signing.envelopes import members
from nestpatch.signing.keys import PublicKey
from nestpatch.signing.store import user_folder

SEEN_FORMAT = "nestpatch-seen/2"
ADDRESS_FORMAT = "nestpatch-address/1"


@dataclass(frozen=True)
class Memory:
    """What is remembered of the channel at one address."""

    seen: SeenChannel
    """The channel's newest state, whichever address showed it."""
    revision: str
    """By which the server recognizes that nothing is new: a commit, an ETag."""
    data: bytes
    """The channel file. It is checked again each time: it may have expired, or its key may have lost the user's trust."""


def memory_file(root: str, name: str) -> Path:
    """Where a channel is remembered. `root`: id of the first root key that was met."""
    return user_folder() / "channels" / f"{_short(name)}-{root[:32]}.json"


def address_file(address: str) -> Path:
    """Where the last answer of an address is kept."""
    return user_folder() / "channels" / "addresses" / f"{_short(address)}.json"


def _short(text: str) -> str:
    return sha256(text.encode("utf-8")).hexdigest()[:32]


def recall(address: str) -> Memory | None:
    """Reads what is remembered of an address and its channel.

    Args:
        address: As its reader shows it.

    Returns:
        The memory; None before the first contact.

    Raises:
        ChannelFormatError: A file is broken, or belongs to another address or channel.
    """
    file = address_file(address)
    lost = "makes the next contact with this address the first one: another channel there would not be noticed then."
    with _explained(file, f"what is remembered of {address} is broken", lost):
        kinds: dict[str, type] = {"format": str, "address": str, "root": str, "name": str, "revision": str, "channel": str}
        facts = _read(file, kinds, format=ADDRESS_FORMAT, address=address)
        seen = None if facts is None else recall_channel(memory_file(facts["root"], facts["name"]), facts["name"])
        return None if facts is None or seen is None else Memory(seen, facts["revision"], facts["channel"].encode("utf-8"))


def recall_channel(file: Path, name: str) -> SeenChannel | None:
    """Reads the newest state of a channel that was seen, at whatever address.

    Args:
        file: Its `memory_file`.
        name: Name of the channel.

    Returns:
        The state; None when the channel was never seen.

    Raises:
        ChannelFormatError: The file is broken, or belongs to another channel.
    """
    lost = "makes the next contact with this channel the first one: old copies would not be noticed then."
    with _explained(file, f"what is remembered of the channel {name} is broken", lost):
        kinds: dict[str, type] = {"format": str, "name": str, "serial": int, "digest": str, "roots": list}
        facts = _read(file, kinds, format=SEEN_FORMAT, name=name)
        if facts is None:
            return None
        roots = tuple(PublicKey.parse(str(pem).encode("utf-8"), str(file)) for pem in facts["roots"])
        if not roots or memory_file(roots[0].key_id, name) != file:
            raise SignatureFormatError(f"{file} belongs to another channel")
        return SeenChannel(name, facts["serial"], facts["digest"], roots)


def _read(file: Path, kinds: dict[str, type], **expected: str) -> dict[str, Any] | None:
    """The members of a file, some of which are known; None when there is no file."""
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
        # ValueError: not UTF-8, not JSON.
        raise ChannelFormatError(f"{what}: {error}", advice=f"Removing the file ({file}) {lost}") from error


def accepted(rules: ChannelRules, address: str, data: bytes, source: str) -> AcceptedChannel:
    """Applies the rules to the channel at an address, with all that was seen of it there and elsewhere.

    Call it inside `held`, followed by `keep`.

    Args:
        rules: The rules; what was seen is filled in here.
        address: As its reader shows it.
        data: The channel file.
        source: What it is, for messages.

    Returns:
        The accepted channel.

    Raises:
        ChannelError: A rule is violated, or the memory is broken.
    """
    envelope, channel = parse(data, source)
    known = recall(address)
    files = sorted((user_folder() / "channels").glob(f"{_short(channel.name)}-*.json"))
    stored = [recall_channel(file, channel.name) for file in files]
    # States of this channel: one of their root keys is its own, or has handed it over to that.
    elsewhere = [seen for seen in stored if seen and any(channel.walk(key)[-1] == channel.root for key in seen.roots)]
    # The address first: it must continue the channel that it had.
    seen = dict.fromkeys([*([known.seen] if known else []), *elsewhere])
    found = [replace(rules, seen=one).accept(envelope, channel, source) for one in seen or (None,)]
    return found[0]


@contextmanager
def held() -> Iterator[None]:
    """Locks the memory against other processes.

    Yields:
        Nothing; the lock is held inside the block.

    Raises:
        OSError: The folder cannot be created or locked.
    """
    folder = user_folder() / "channels"
    for needed in (folder, folder / "addresses"):
        needed.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive(folder / ".lock"):
        yield


def keep(address: str, memory: Memory) -> None:
    """Keeps what was seen, unless another process has seen a newer state. Call it inside `held`.

    Args:
        address: As its reader shows it.
        memory: What was seen there.

    Raises:
        OutputError: A file cannot be written.
    """
    seen = memory.seen
    root = seen.roots[0].key_id
    file = memory_file(root, seen.name)
    known = recall_channel(file, seen.name)
    if known is not None and known.order > seen.order:
        return
    facts = {"name": seen.name, "serial": seen.serial, "digest": seen.digest, "roots": [key.pem for key in seen.roots]}
    if known != seen:
        _write(file, {"format": SEEN_FORMAT, **facts})
    if recall(address) != memory:
        answer = {"revision": memory.revision, "channel": memory.data.decode("utf-8")}
        facts = {"format": ADDRESS_FORMAT, "address": address, "root": root, "name": seen.name}
        _write(address_file(address), {**facts, **answer})


def _write(file: Path, value: Mapping[str, Any]) -> None:
    sweep_writes(file)
    write_bytes(file, (json.dumps(value, indent=1) + "\n").encode("utf-8"), overwrite=True, mode=0o600)
