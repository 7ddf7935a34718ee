"""Bytes in and out: uploads, commits, downloads. Large files leave by the CDN, with addresses that expire."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from tests.hubserver.api import API, Parts, kind_of, page_of, repo_for_reading, repo_for_writing, route
from tests.hubserver.messages import Answer, RefusedError, Request, as_json, content
from tests.hubserver.store import Change, Repo, is_large

if TYPE_CHECKING:
    from tests.hubserver.server import Hub

RAW = r"/(?:(?P<kind>datasets|spaces)/)?(?P<id>[^/]+/[^/]+)"


@route("POST", API + r"/preupload/(?P<rev>[^/]+)")
def preupload(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_writing(hub, request, parts)
    commit = repo.resolve(parts["rev"])
    return as_json({"files": [upload_mode(repo, commit, file) for file in request.json()["files"]]})


def upload_mode(repo: Repo, commit: str, file: dict[str, Any]) -> dict[str, Any]:
    """How a file is to be sent; `oid` lets the client leave out what is there already."""
    large = is_large(file["path"], base64.b64decode(file.get("sample", ""))) or file["size"] > 10_000_000
    mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    try:
        entry = repo.entry(commit, file["path"])
    except RefusedError:
        return mode
    return mode | {"oid": entry.lfs or entry.oid}


@route("POST", RAW + r"\.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo_for_writing(hub, request, parts)
    objects = []
    for wanted in request.json()["objects"]:
        place = {"oid": wanted["oid"], "size": wanted["size"]}
        if not hub.store.has_large(wanted["oid"]):
            href = f"{hub.url}/_large/{wanted['oid']}"
            place["actions"] = {"upload": {"href": href, "header": {}}, "verify": {"href": f"{href}/verify"}}
        objects.append(place)
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", r"/_large/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: Hub, request: Request, parts: Parts) -> Answer:
    if hub.store.add_large(request.body) != parts["oid"]:
        raise RefusedError(400, message="the bytes have another SHA-256")
    return Answer()


@route("POST", r"/_large/(?P<oid>[0-9a-f]{64})/verify")
def lfs_verify(hub: Hub, request: Request, parts: Parts) -> Answer:
    file = hub.store.large / parts["oid"]
    if not file.is_file() or file.stat().st_size != request.json()["size"]:
        raise RefusedError(404, message="no such large file")
    return as_json({})


@route("POST", API + r"/commit/(?P<rev>[^/]+)")
def commit(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_writing(hub, request, parts)
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    message = "\n\n".join(filter(None, [header["summary"], header.get("description")]))
    changes = [change(line["key"], line["value"]) for line in lines if line["key"] != "header"]
    with hub.store.lock:
        oid = repo.commit(parts["rev"], changes, message, header.get("parentCommit"))
    return as_json(
        {"success": True, "commitOid": oid, "commitUrl": f"{page_of(hub, kind_of(parts), parts['id'])}/commit/{oid}"}
    )


def change(key: str, value: dict[str, Any]) -> Change:
    """One line of a commit."""
    if key == "file":
        text = value["content"]
        return Change(value["path"], base64.b64decode(text) if value.get("encoding") == "base64" else text.encode())
    if key == "lfsFile":
        return Change(value["path"], lfs=value["oid"])
    if key in {"deletedFile", "deletedFolder"}:
        return Change(value["path"])
    raise RefusedError(400, message=f"a commit has no {key}")


@route("GET", RAW + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts, content=True)
    oid = repo.resolve(parts["rev"])
    entry = repo.entry(oid, parts["path"])
    headers = {"X-Repo-Commit": oid, "ETag": f'"{entry.oid}"'}
    if entry.lfs is None:
        return content(entry.size, lambda start, stop: repo.read(entry, start, stop), request, headers)
    headers |= {"X-Linked-Etag": f'"{entry.lfs}"', "X-Linked-Size": str(entry.size)}
    return Answer(302, {**headers, "Location": hub.cdn_address(entry.lfs)})


def from_cdn(hub: Hub, request: Request) -> Answer:
    """The CDN knows no repositories and no tokens: its signed addresses are the permission."""
    if "authorization" in request.headers:
        raise RefusedError(400, message="Only one auth mechanism allowed")
    oid = request.path.strip("/")
    if not hub.store.has_large(oid):
        raise RefusedError(404, message="NoSuchKey")
    if request.query.get("epoch") != [str(hub.epoch)]:
        raise RefusedError(403, message="Request has expired")
    file = hub.store.large / oid

    def read(start: int, stop: int) -> bytes:
        with open(file, "rb") as opened:
            opened.seek(start)
            return opened.read(stop - start)

    return content(file.stat().st_size, read, request, {"ETag": f'"{oid}"'})
