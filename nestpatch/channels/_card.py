"""The model card of a channel's repository, made from the channel and its latest pack."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nestpatch.channels.listing import Channel
from nestpatch.channels.rules import latest
from nestpatch.hub.client import parse_reference
from nestpatch.pack import Manifest
from nestpatch.plain import count, markdown, number, one_line

MARK = "<!-- made by nestpatch: remove this line to keep changes of your own -->"
THIS_FOLDER = "file:///path/to/this/folder"
"""Stands for the address of a channel in a folder, which readers mount at other paths than the publisher."""
_FOLDER_NOTE = (
    f"`{THIS_FOLDER}` stands for the path of this folder on your machine. Where a web server serves the folder, use its",
    "address instead: `https://HOST/FOLDER`.",
    "",
)


def model_card(channel: Channel, manifest: Manifest | None, address: str) -> str:
    """README.md: metadata for the Hub, how to apply the pack, its versions, and what was measured.

    `manifest`: of the latest version. `address`: by which readers name the channel.
    """
    tags = dict.fromkeys(["nestpatch", "safety-patch", *(manifest.tags if manifest else ())])
    # Every JSON string is also a YAML string.
    lines = ["---", "library_name: nestpatch", f"tags: {json.dumps(list(map(one_line, tags)), ensure_ascii=False)}"]
    if manifest and manifest.license:
        lines.append(f"license: {json.dumps(one_line(manifest.license.lower()), ensure_ascii=False)}")
    if manifest and parse_reference(manifest.base.model_id) is not None:
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
    return "\n".join([*lines, "", *(_evaluation(manifest.evaluation) if manifest else [])]) + "\n"


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    names = [name for name in after if _share(before.get(name)) and _share(after[name])]
    rows = [f"| {markdown(name.replace('_', ' '))} | {_share(before[name])} | {_share(after[name])} |" for name in names]
    return ["## Evaluation", "", "| | before | after |", "|---|---|---|", *rows, ""] if rows else []


def _share(value: Any) -> str:
    """A share as packs store it, for a table; empty for anything else."""
    if not isinstance(value, Mapping):
        return ""
    parts = number(value.get("value"), ".1%"), count(value.get("count")), count(value.get("total"))
    return "" if "?" in parts else f"{parts[0]} ({parts[1]} of {parts[2]})"
