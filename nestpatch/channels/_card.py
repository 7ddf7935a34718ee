"""The model card of a channel's repository, made from the channel and its latest pack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nestpatch.channels.listing import Channel
from nestpatch.channels.rules import latest
from nestpatch.hub.client import SCHEME, parse_reference
from nestpatch.pack import Manifest
from nestpatch.plain import count, markdown, number, one_line

MARK = "<!-- made by nestpatch: remove this line to keep changes of your own -->"


ELSEWHERE = "file:///path/to/this/folder"
"""For a channel in a folder: the address of whoever reads its card is not known to whoever writes it."""


def model_card(channel: Channel, manifest: Manifest | None, address: str | None = None) -> str:
    """README.md: metadata for the Hub, versions, how to apply, and what was measured.

    `manifest`: of the latest version. `address`: the place that readers name; None: the repository of the channel's name.
    """
    lines = ["---", *_metadata(manifest), "---", MARK, "", f"# {markdown(channel.name)}", ""]
    if manifest is not None:
        base = markdown(manifest.base.model_id) or "a model that its publisher names elsewhere"
        lines += [markdown(manifest.description), "", f"A safety patch for {base}, as a nestpatch channel.", ""]
    lines += [
        "    nestpatch trust add PUBLISHER.pub --name PUBLISHER",
        f"    nestpatch apply path/to/model {one_line(address or SCHEME + channel.name)} --in-place",
        "    nestpatch update path/to/model",
        "",
        *(_PLACEHOLDER if address == ELSEWHERE else ()),
        f"Signed with key `{channel.root.key_id}`. Compare it with what the publisher says elsewhere.",
        "",
        *_versions(channel),
        *(_evaluation(manifest.evaluation) if manifest else []),
    ]
    return "\n".join(lines) + "\n"


_PLACEHOLDER = (
    f"`{ELSEWHERE}` stands for the place of this folder on your machine. Where a web server serves it, give its address",
    "in place of that: `https://HOST/FOLDER`.",
    "",
)


def _metadata(manifest: Manifest | None) -> list[str]:
    """YAML, in which every JSON string is a string."""
    tags = dict.fromkeys(["nestpatch", "safety-patch", *(manifest.tags if manifest else ())])
    lines = ["library_name: nestpatch", f"tags: {json.dumps(list(map(one_line, tags)), ensure_ascii=False)}"]
    if manifest and manifest.license:
        lines.append(f"license: {json.dumps(one_line(manifest.license.lower()), ensure_ascii=False)}")
    if manifest and parse_reference(manifest.base.model_id) is not None:
        lines += [f"base_model: {json.dumps(manifest.base.model_id)}", "base_model_relation: adapter"]
    return lines


def _versions(channel: Channel) -> list[str]:
    best, rows = latest(channel), []
    for pack in reversed(channel.packs):
        status = "latest" if pack is best else pack.status.value
        rows.append(f"| {one_line(pack.version)} | {status} | {markdown(pack.reason)} | `{pack.file.sha256}` |")
    return ["## Versions", "", "| version | status | reason | sha256 |", "|---|---|---|---|", *rows, ""]


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    names = [name for name in after if _share(before.get(name)) and _share(after[name])]
    rows = [f"| {markdown(name.replace('_', ' '))} | {_share(before[name])} | {_share(after[name])} |" for name in names]
    return ["## Evaluation", "", "| | before | after |", "|---|---|---|", *rows, ""] if rows else []


def _share(value: Any) -> str:
    """A share as a pack holds it, for a table; empty for anything else."""
    if not isinstance(value, Mapping):
        return ""
    parts = number(value.get("value"), ".1%"), count(value.get("count")), count(value.get("total"))
    return "" if "?" in parts else f"{parts[0]} ({parts[1]} of {parts[2]})"
