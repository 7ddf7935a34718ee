"""Following a channel: read it, download a version of it, write that to a file. Everything returned here was checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestpatch.channels._memory import Memory, accepted, held, keep, recall
from nestpatch.channels.listing import ListedPack
from nestpatch.channels.readers import ChannelReader, open_reader, split_version
from nestpatch.channels.rules import AcceptedChannel, ChannelRules, choose, require_as_listed
from nestpatch.errors import HubAnswerError, OutputError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.scratch import new_output
from nestpatch.pack import utc_now
from nestpatch.signing.store import load_policy
from nestpatch.signing.subject import Origin, Subject
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import SignatureResult, check_signatures


@dataclass(frozen=True)
class Followed:
    """A channel that was read and accepted."""

    reader: ChannelReader
    revision: str
    """The state of the address from which it was read."""
    accepted: AcceptedChannel
    model: str | None
    """The model that it is for, as the user names it."""
    allow_unsigned: bool


@dataclass(frozen=True)
class Downloaded:
    """A version that was downloaded and checked."""

    listed: ListedPack
    """Its entry in the channel."""
    result: SignatureResult
    """Who signed, and the pack."""
    origin: Origin
    data: bytes
    """The bytes of the pack."""


def follow(
    reader: ChannelReader,
    policy: Policy,
    model: str | Path | None = None,
    *,
    allow_unsigned: bool = False,
    now: str | None = None,
) -> Followed:
    """Reads a channel in one request, applies the rules (channels/rules.py), and remembers it for this user.

    Args:
        reader: The address.
        policy: The trusted keys.
        model: The model that the channel is for, as the user names it; decides which keys count.
        allow_unsigned: Accepts a channel whose key is not trusted, as long as the key stays the same.
        now: The time, for tests of expiry; None: by this machine's clock.

    Returns:
        The accepted channel.

    Raises:
        ChannelError: A rule is violated, or the memory is broken.
        HubError: The channel cannot be read.
    """
    known = recall(reader.address)
    found = reader.channel(known.revision if known else "")
    data = found.data if found.data is not None or known is None else known.data
    if data is None:
        raise HubAnswerError(f"{reader.address} answered that nothing is new, but was never read before")
    rules = ChannelRules(policy, now or utc_now(), Subject.of(model), reader.name, allow_unsigned=allow_unsigned)
    with held():
        channel = accepted(rules, reader.address, data, f"the channel at {reader.address}")
        keep(reader.address, Memory(channel.seen, found.revision, data))
    return Followed(reader, found.revision, channel, None if model is None else str(model), allow_unsigned)


def download(followed: Followed, pack: ListedPack, *, on_event: OnEvent = ignore) -> Downloaded:
    """Downloads a version with its signatures, compares both with the channel, and checks who signed.

    Args:
        followed: The channel.
        pack: The entry of the version.
        on_event: Receives the progress.

    Returns:
        The checked pack.

    Raises:
        SwappedFileError: A file is not the listed one, or the pack is not what the channel states.
        SignatureError: A signature is wrong, or too few trusted keys have signed.
        PackError: The file is not a pack.
        HubError: A file cannot be read.
    """
    address, contents = followed.reader.address, {}
    for file in (pack.file, *pack.signatures):
        contents[file.name] = followed.reader.read(followed.revision, file, on_event)
        file.check(contents[file.name], address)
    data = contents.pop(pack.file.name)
    result = check_signatures(
        data,
        contents,
        followed.accepted.policy,
        Subject.of(followed.model),
        file=pack.file.name,
        allow_unsigned=followed.allow_unsigned,
    )
    require_as_listed(pack, result.pack.manifest, address)
    signatures = {name.removeprefix(pack.file.name): content for name, content in contents.items()}
    roots = tuple(key.key_id for key in followed.accepted.line)
    return Downloaded(pack, result, Origin(result.key_ids, address, roots, signatures), data)


def fetch_pack(
    text: str,
    policy: Policy,
    model: str | Path | None = None,
    *,
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Downloaded:
    """Follows a channel and downloads one version.

    Args:
        text: ADDRESS[@VERSION]; without a version the latest.
        policy: The trusted keys.
        model: The model that the pack is for, as the user names it.
        allow_unsigned: Allows keys that are not trusted, and missing signatures.
        on_event: Receives the progress.

    Returns:
        The checked pack.

    Raises:
        DataError: The text is not the address of a channel.
        ChannelError: A rule is violated, or there is no such version.
        SignatureError: A signature is wrong, or too few trusted keys have signed.
        PackError: The file is not a pack.
        HubError: A file cannot be read.
    """
    address, version = split_version(text)
    followed = follow(open_reader(address), policy, model, allow_unsigned=allow_unsigned)
    return download(followed, choose(followed.accepted.channel, version), on_event=on_event)


@dataclass(frozen=True)
class Pulled:
    """A pack that was written to this disk, with its signatures beside it."""

    file: Path
    pack: str
    """Name and version."""
    pack_id: str
    address: str
    """Of the channel."""
    signers: Mapping[str, str]
    """Name -> key id of the trusted keys that signed."""

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        return {
            "output": str(self.file),
            "pack": self.pack,
            "pack_id": self.pack_id,
            "address": self.address,
            "signers": dict(self.signers),
        }


def pull(
    address: str,
    output: str | Path | None = None,
    *,
    policy: Policy | None = None,
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Pulled:
    """Downloads a version with its signatures and writes both. Files that exist with the same content are left alone.

    Args:
        address: ADDRESS[@VERSION] of the channel: hub://owner/name, https://host/folder or file:///folder; without a version
            the latest.
        output: A file, or a folder to write into. None: NAME-VERSION.nest in the current folder.
        policy: The trusted keys; None means the policy of this user and this machine.
        allow_unsigned: Allows keys that are not trusted, and missing signatures.
        on_event: Receives the progress.

    Returns:
        The file that was written, and who signed it.

    Raises:
        DataError: The text is not the address of a channel.
        ChannelError: A rule is violated, or there is no such version.
        SignatureError: A signature is wrong, or too few trusted keys have signed.
        PackError: The file is not a pack.
        HubError: A file cannot be read.
        OutputError: The output exists with other content, or cannot be written.
    """
    done = fetch_pack(address, load_policy() if policy is None else policy, allow_unsigned=allow_unsigned, on_event=on_event)
    name = f"{done.listed.name}-{done.listed.version}.nest"
    wanted = Path(name if output is None else output)
    file = wanted / name if wanted.is_dir() else wanted
    # The pack comes last: where it is, its signatures are too.
    for suffix, content in [*done.origin.signatures.items(), ("", done.data)]:
        _write_once(file.with_name(f"{file.name}{suffix}"), content)
    return Pulled(file, done.listed.label, done.listed.file.sha256, done.origin.channel, done.origin.signers)


def _write_once(file: Path, content: bytes) -> None:
    if file.is_file() and file.read_bytes() == content:
        return
    try:
        with new_output(file) as sibling, open(sibling, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
    except OutputError as error:
        raise OutputError(str(error), advice="Choose another path with -o, or remove what is there.") from error
