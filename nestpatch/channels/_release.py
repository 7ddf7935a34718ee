"""The changes that a publisher makes to a channel, each issued under the next serial number, and the channel's model card.

Values in, values out: no files, no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256

from nestpatch.channels.listing import (
    MAX_FIRST,
    PAYLOAD_TYPE,
    SUCCESSION_TYPE,
    Channel,
    ListedFile,
    ListedPack,
    ListedStatus,
    Succession,
    base_digest,
    pack_path,
    payload,
    write_envelope,
)
from nestpatch.channels.rules import choose, latest
from nestpatch.errors import PublishError, VersionError
from nestpatch.formats.manifest import canonical_json
from nestpatch.hub.client import Reference
from nestpatch.measured import StoredShare, headlines, suites
from nestpatch.pack import TIME_FORMAT, Manifest
from nestpatch.plain import markdown, one_line
from nestpatch.signing.envelopes import MAX_BYTES, Envelope
from nestpatch.signing.keys import PrivateKey

DAYS = 30
"""Default validity of a channel. For that long, whoever controls the server can hold back a fix."""


def issue(channel: Channel, key: PrivateKey, now: str, days: int = DAYS) -> tuple[Channel, bytes]:
    """Signs a channel under its next number.

    Args:
        channel: The channel with its changes.
        key: The root key, which signs it.
        now: UTC, in the form of TIME_FORMAT.
        days: How long it is valid.

    Returns:
        The issued channel, and the content of its file.

    Raises:
        PublishError: The file is too long for readers.
    """
    end = datetime.strptime(now, TIME_FORMAT) + timedelta(days=days)  # noqa: DTZ007 - UTC by its Z
    issued = replace(channel, serial=channel.serial + 1, issued=now, expires=end.strftime(TIME_FORMAT), root=key.public)
    data = write_envelope(Envelope.sealed(PAYLOAD_TYPE, payload(issued), [key]))
    if len(data) > MAX_BYTES:
        raise PublishError(
            f"{channel.name} would have {len(data)} bytes; readers take {MAX_BYTES}", advice="Start a new channel."
        )
    return issued, data


def require_next_number(channel: Channel) -> None:
    """Checks that a change can be issued under the channel's next number.

    Args:
        channel: The channel with its changes.

    Raises:
        PublishError: The number would be too high for new readers.
    """
    if channel.serial >= MAX_FIRST:
        raise PublishError(
            f"{channel.name} has number {channel.serial}; new readers take numbers up to {MAX_FIRST}",
            advice="Hand the channel over to a new key, which starts the count again: nestpatch renew CHANNEL --new-key NEW",
        )


def listed(manifest: Manifest, data: bytes, signatures: Mapping[str, bytes]) -> tuple[ListedPack, dict[str, bytes]]:
    """Prepares a pack for a channel.

    Args:
        manifest: The pack's manifest.
        data: The bytes of the pack.
        signatures: Suffix after .nest -> content of each signature.

    Returns:
        The entry for the channel, and path -> content of the files.
    """
    stem = pack_path(manifest.name, manifest.version)
    files = {stem: data} | {f"{stem}{suffix}": content for suffix, content in signatures.items()}
    entries = _listed_files(files)
    base = manifest.base.model_id, base_digest(manifest)
    return ListedPack(manifest.name, manifest.version, entries[0], entries[1:], *base, manifest.supersedes), files


def _listed_files(files: Mapping[str, bytes]) -> tuple[ListedFile, ...]:
    return tuple(ListedFile(path, len(content), sha256(content).hexdigest()) for path, content in files.items())


def add(channel: Channel, pack: ListedPack) -> Channel:
    """Adds a version. It supersedes the lower ones, and those that it names.

    Args:
        channel: The channel.
        pack: The entry to add.

    Returns:
        The changed channel, to be issued.

    Raises:
        VersionError: The version exists already, or belongs to a pack of another name.
    """
    for other in channel.packs:
        if other.order == pack.order:
            same = "the same content" if other.file.sha256 == pack.file.sha256 else "other content"
            raise VersionError(f"{channel.name} has {other.label} already, with {same}")
        if other.name != pack.name:
            raise VersionError(
                f"{channel.name} is the channel of {other.name}, not of {pack.name}",
                advice="Publish it in a repository of its own: a model can follow several channels.",
            )
    packs = [pack]
    for old in channel.packs:
        # A prerelease does not replace a finished version.
        replaces = old.order < pack.order and (not pack.order.prerelease or bool(old.order.prerelease))
        gone = old.status is ListedStatus.ACTIVE and (replaces or old.file.sha256 in pack.supersedes)
        packs.append(replace(old, status=ListedStatus.SUPERSEDED) if gone else old)
    return replace(channel, packs=tuple(sorted(packs, key=lambda entry: entry.order)))


def mark_yanked(channel: Channel, version: str, reason: str) -> Channel:
    """Yanks a version. If it was the last active one, the highest version that is left becomes active again.

    Args:
        channel: The channel.
        version: The version number.
        reason: Why, in one line.

    Returns:
        The changed channel, to be issued.

    Raises:
        VersionError: There is no such version.
        YankedError: It is yanked already.
    """
    gone = choose(channel, version)
    packs = [replace(p, status=ListedStatus.YANKED, reason=reason) if p is gone else p for p in channel.packs]
    standing = [pack for pack in packs if pack.status is not ListedStatus.YANKED]
    if standing and not any(pack.status is ListedStatus.ACTIVE for pack in standing):
        finished = [pack for pack in standing if not pack.order.prerelease]
        best = max(finished or standing, key=lambda pack: pack.order)
        packs = [replace(pack, status=ListedStatus.ACTIVE) if pack is best else pack for pack in packs]
    return replace(channel, packs=tuple(packs))


def hand_over(
    channel: Channel, old: PrivateKey, new: PrivateKey, signatures: Mapping[str, Mapping[str, bytes]] | None = None
) -> Channel:
    """Makes a new key the root key, with numbers that start again.

    Args:
        channel: The channel.
        old: The current root key, which signs the hand-over.
        new: The next root key.
        signatures: Version -> path -> content of signature files to add, those by the new key.

    Returns:
        The changed channel, to be issued with the new key.
    """
    facts = {"channel": channel.name, "old": old.public.key_id, "new": new.public.pem}
    envelope = Envelope.sealed(SUCCESSION_TYPE, canonical_json(facts).encode("utf-8"), [old])
    step = Succession(envelope, channel.name, old.public.key_id, new.public)
    more = signatures or {}
    packs = [replace(p, signatures=(*p.signatures, *_listed_files(more.get(p.version, {})))) for p in channel.packs]
    successions = (*channel.successions, step)
    return replace(channel, serial=0, successions=successions, packs=tuple(packs), root=new.public)


MARK = "<!-- made by nestpatch: remove this line to keep changes of your own -->"
THIS_FOLDER = "file:///path/to/this/folder"
"""Stands for the address of a channel in a folder, which readers mount at other paths than the publisher."""
_FOLDER_NOTE = (
    f"`{THIS_FOLDER}` stands for the path of this folder on your machine. Where a web server serves the folder, use its",
    "address instead: `https://HOST/FOLDER`.",
    "",
)


def model_card(channel: Channel, manifest: Manifest | None, address: str) -> str:
    """Writes README.md: metadata for the Hub, how to apply the pack, its versions, and what was measured.

    Args:
        channel: The channel.
        manifest: Of the latest version; None when no version is active.
        address: By which readers name the channel.

    Returns:
        The text, in Markdown.
    """
    tags = dict.fromkeys(["nestpatch", "safety-patch", *(manifest.tags if manifest else ())])
    # Every JSON string is also a YAML string.
    lines = ["---", "library_name: nestpatch", f"tags: {json.dumps(list(map(one_line, tags)), ensure_ascii=False)}"]
    if manifest and manifest.license:
        lines.append(f"license: {json.dumps(one_line(manifest.license.lower()), ensure_ascii=False)}")
    if manifest and Reference.parse(manifest.base.model_id) is not None:
        lines += [f"base_model: {json.dumps(manifest.base.model_id)}", "base_model_relation: adapter"]
    lines += ["---", MARK, "", f"# {markdown(channel.name)}", ""]
    if manifest is not None:
        base = markdown(manifest.base.model_id) or "a model that the pack does not name"
        lines += [markdown(manifest.description), "", f"A safety patch for {base}, as a nestpatch channel.", ""]
    lines += [
        "    nestpatch trust add PUBLISHER.pub --name PUBLISHER",
        f"    nestpatch apply path/to/model {one_line(address)} --in-place",
        "    nestpatch update path/to/model",
        "",
        *(_FOLDER_NOTE if address == THIS_FOLDER else ()),
        f"Signed with key `{channel.root.key_id}`. Compare it with what the publisher says elsewhere.",
        "",
        "## Versions",
        "",
        "| version | status | reason | sha256 |",
        "|---|---|---|---|",
    ]
    best = latest(channel)
    for pack in reversed(channel.packs):
        status = "latest" if pack is best else pack.status.value
        lines.append(f"| {one_line(pack.version)} | {status} | {markdown(pack.reason)} | `{pack.file.sha256}` |")
    return "\n".join([*lines, "", *(_evaluation(manifest) if manifest else [])]) + "\n"


def _evaluation(manifest: Manifest) -> list[str]:
    evaluation = manifest.evaluation
    before, after = evaluation.get("before"), evaluation.get("after")
    rows = [(row.title, row.before, row.after) for row in headlines(before, after)]
    rows += [(f"{row.name}, {row.title}", row.before, row.after) for row in suites(before, after)]
    lines = [f"| {markdown(title)} | {_share(old)} | {_share(new)} |" for title, old, new in rows if old and new]
    table = ["## Evaluation", "", "| | before | after |", "|---|---|---|", *lines, ""] if lines else []
    probe = manifest.detector
    return table + (
        [] if probe is None else ["## Detector", "", f"A linear probe of the base: {markdown(probe.sentence)}.", ""]
    )


def _share(share: StoredShare) -> str:
    return f"{share.value:.1%} ({share.count} of {share.total})"
