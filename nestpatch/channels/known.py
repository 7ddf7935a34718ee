"""The channels that this user has followed, as they were when they were last read. Reads the user's memory, no network."""

from __future__ import annotations

import json
from dataclasses import dataclass

from nestpatch.channels._memory import recall
from nestpatch.channels.follow import follow
from nestpatch.channels.listing import Channel, parse
from nestpatch.channels.readers import open_reader
from nestpatch.signing.store import user_folder
from nestpatch.signing.trust import Policy


@dataclass(frozen=True)
class KnownChannel:
    """A channel at one of its addresses."""

    address: str
    channel: Channel
    remembered: bool
    """Whether it is as it was last read, instead of as it is now."""


def known_addresses() -> tuple[str, ...]:
    """The addresses of all channels that this user has read.

    Returns:
        The addresses, sorted. Files of the memory that are broken are left out.
    """
    found = set()
    try:
        files = sorted((user_folder() / "channels" / "addresses").glob("*.json"))
    except OSError:
        return ()
    for file in files:
        try:
            address = json.loads(file.read_text(encoding="utf-8"))["address"]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            continue
        if isinstance(address, str):
            found.add(address)
    return tuple(sorted(found))


def known_channel(address: str) -> KnownChannel | None:
    """A channel as this user last read it.

    Args:
        address: Its address.

    Returns:
        The channel; None where it was never read.

    Raises:
        ChannelError: The memory is broken.
    """
    memory = recall(address)
    if memory is None:
        return None
    return KnownChannel(address, parse(memory.data, f"the remembered channel {address}")[1], remembered=True)


def read_channel(address: str, policy: Policy, model: str | None) -> KnownChannel:
    """A channel as it is now. It is remembered, as by every other command that reads it.

    Args:
        address: Its address.
        policy: Whose keys count.
        model: The model that the channel is for, as the user names it.

    Returns:
        The channel.

    Raises:
        ChannelError: A rule is violated.
        HubError: The channel cannot be read.
    """
    followed = follow(open_reader(address), policy, model)
    return KnownChannel(address, followed.accepted.channel, remembered=False)
