"""Following a channel: read it, fetch a version of it, write that into a file. What comes out of here was proven."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from nestpatch.channels.listing import TIME, ListedPack
from nestpatch.channels.memory import Memory, held, judged, keep, recall
from nestpatch.channels.readers import ChannelReader, open_reader, split_version
from nestpatch.channels.rules import Admitted, Gate, choose, require_as_listed
from nestpatch.errors import HubAnswerError, OutputError
from nestpatch.events import OnEvent, ignore
from nestpatch.files.scratch import new_output
from nestpatch.signing.subject import Origin, subject_of
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import Outcome, judge_signatures, signers_of


@dataclass(frozen=True)
class Followed:
    """A channel that was admitted, at the version of its place from which it was read."""

    source: ChannelReader
    version: str
    admitted: Admitted
    model: str | None
    """What the user calls the model that it is for."""
    allow_unsigned: bool

    @property
    def pack_name(self) -> str | None:
        """The name of the channel's patch; None before its first version."""
        return next((pack.id for pack in self.admitted.channel.packs), None)


@dataclass(frozen=True)
class Downloaded:
    """A version that was fetched and proven."""

    pack: ListedPack
    outcome: Outcome
    """Use its pack."""
    origin: Origin
    data: bytes


def utc_now() -> str:
    """The time by this machine's clock, as channels have it."""
    return datetime.now(timezone.utc).strftime(TIME)


def follow(
    source: ChannelReader,
    policy: Policy,
    model: str | Path | None = None,
    *,
    allow_unsigned: bool = False,
    now: str | None = None,
) -> Followed:
    """Reads a channel in one request, judges it by the rules of hub/channel.py and remembers it for this user.

    `model`: what it is for, as the user names it; decides which trusted keys count. `now` is for tests of expiry.
    Raises ChannelError, HubError and their kinds.
    """
    known = recall(source.place)
    fetched = source.channel(known.version if known else "")
    data = fetched.data if fetched.data is not None or known is None else known.data
    if data is None:
        raise HubAnswerError(f"{source.place} says that nothing is new, and was never asked before")
    gate = Gate(policy, now or utc_now(), subject_of(model), source.name, allow_unsigned=allow_unsigned)
    with held():
        admitted = judged(gate, source.place, data, f"the channel at {source.place}")
        keep(source.place, Memory(admitted.seen, fetched.version, data))
    return Followed(source, fetched.version, admitted, None if model is None else str(model), allow_unsigned)


def download(followed: Followed, pack: ListedPack, *, on_event: OnEvent = ignore) -> Downloaded:
    """Fetches a version and its signatures, compares them with the channel and judges who signed.

    Raises SwappedFileError, SignatureError and its kinds, PackError, HubError.
    """
    place, version = followed.source.place, followed.version
    contents = {}
    for file in (pack.file, *pack.signatures):
        contents[file.name] = followed.source.read(version, file, on_event)
        file.check(contents[file.name], place)
    data = contents.pop(pack.file.name)
    subject = subject_of(followed.model)
    outcome = judge_signatures(
        data, contents, followed.admitted.policy, subject, file=pack.file.name, allow_unsigned=followed.allow_unsigned
    )
    require_as_listed(pack, outcome.pack.manifest, place)
    signatures = {name.removeprefix(pack.file.name): content for name, content in contents.items()}
    roots = tuple(key.key_id for key in followed.admitted.line)
    return Downloaded(pack, outcome, Origin(signers_of(outcome), place, roots, signatures), data)


def fetch_pack(
    text: str,
    policy: Policy,
    model: str | Path | None = None,
    *,
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Downloaded:
    """The version that PLACE[@VERSION] names, or the latest one. Raises as `follow`, `choose` and `download` do."""
    place, version = split_version(text)
    followed = follow(open_reader(place), policy, model, allow_unsigned=allow_unsigned)
    return download(followed, choose(followed.admitted.channel, version), on_event=on_event)


@dataclass(frozen=True)
class Pulled:
    """A pack that lies here now, with its signatures beside it."""

    file: Path
    pack: str
    pack_id: str
    channel: str
    signers: Mapping[str, str]


def pull(
    text: str,
    policy: Policy,
    output: Path | None = None,
    *,
    allow_unsigned: bool = False,
    on_event: OnEvent = ignore,
) -> Pulled:
    """Writes a version and its signatures: to a file, into a folder, or beside here under its name and version.

    What is there already with the same content is left alone. Raises as `fetch_pack` does, and OutputError.
    """
    done = fetch_pack(text, policy, allow_unsigned=allow_unsigned, on_event=on_event)
    name = f"{done.pack.id}-{done.pack.version}.nest"
    file = Path(name) if output is None else output / name if output.is_dir() else output
    # The pack comes last: where it lies, its signatures do.
    for suffix, content in [*done.origin.signatures.items(), ("", done.data)]:
        _write_once(file.with_name(f"{file.name}{suffix}"), content)
    return Pulled(file, done.pack.label, done.pack.file.sha256, done.origin.channel, done.origin.signers)


def _write_once(file: Path, content: bytes) -> None:
    if not (file.is_file() and file.read_bytes() == content):
        try:
            with new_output(file) as sibling, open(sibling, "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
        except OutputError as error:
            raise OutputError(str(error), advice="Choose another place with -o, or remove what is there.") from error
