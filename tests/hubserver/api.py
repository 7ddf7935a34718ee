"""Facts and references: repositories, trees, commits, branches and tags."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from hashlib import sha1
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs

from tests.hubserver.accounts import not_found
from tests.hubserver.messages import Answer, RefusedError, Request, as_json
from tests.hubserver.store import DATE, Entry, Repo

if TYPE_CHECKING:
    from tests.hubserver.server import Hub

Parts: TypeAlias = dict[str, str]
Handler: TypeAlias = "Callable[[Hub, Request, Parts], Answer]"

API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Adds a handler to the Hub's routes."""

    def add(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return add


def kind_of(parts: Parts) -> str:
    """ "model", "dataset" or "space"."""
    return parts.get("kind", "models").removesuffix("s")


def repo_for_reading(hub: Hub, request: Request, parts: Parts, *, content: bool = False) -> Repo:
    """The repository that a path names, when the user may read it."""
    hub.accounts.check_reader(request, kind_of(parts), parts["id"], content=content)
    return existing(hub, request, parts)


def repo_for_writing(hub: Hub, request: Request, parts: Parts) -> Repo:
    """The same for writing."""
    hub.accounts.check_writer(request, parts["id"])
    return existing(hub, request, parts)


def existing(hub: Hub, request: Request, parts: Parts) -> Repo:
    """Refuses repositories that are not there."""
    repo = hub.store.repo(kind_of(parts), parts["id"])
    if not repo.folder.exists():
        raise not_found(hub.accounts.user(request))
    return repo


def page_of(hub: Hub, kind: str, repo_id: str) -> str:
    """The address of a repository for people."""
    return f"{hub.url}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request, parts: Parts) -> Answer:
    user = hub.accounts.user(request)
    if user is None:
        raise RefusedError(401, message="Invalid username or password.")
    role = "write" if user.writes else "read"
    return as_json({"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": {"role": role}}})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request, parts: Parts) -> Answer:
    return as_json({"errors": [], "warnings": []})


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, request: Request, parts: Parts) -> Answer:
    wanted = request.json()
    user = hub.accounts.user(request)
    repo_id = f"{wanted.get('organization') or (user.name if user else '')}/{wanted['name']}"
    hub.accounts.check_writer(request, repo_id)
    kind = wanted.get("type") or "model"
    repo = hub.store.repo(kind, repo_id)
    facts = {"url": page_of(hub, kind, repo_id), "name": repo_id, "id": repo_id}
    with hub.store.lock:
        if repo.folder.exists():
            # The client reads `url` out of this refusal when it was called with exist_ok.
            return as_json(facts | {"error": "You already created this repo"}, 409)
        repo.create()
    hub.accounts.of(kind, repo_id).private = wanted.get("visibility") == "private"
    return as_json(facts)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, request: Request, parts: Parts) -> Answer:
    wanted = request.json()
    repo_id = f"{wanted['organization']}/{wanted['name']}"
    found = repo_for_writing(hub, request, {"kind": f"{wanted.get('type') or 'model'}s", "id": repo_id})
    shutil.rmtree(found.folder)
    return as_json({})


@route("GET", API + r"(?:/revision/(?P<rev>[^/]+))?")
def repo_info(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts)
    commit = repo.resolve(parts.get("rev", "main"))
    date = repo.git("log", "-1", DATE, "--format=%cd", commit).decode().strip()
    files = [entry for entry in repo.tree(commit) if not entry.directory]
    doors = hub.accounts.of(kind_of(parts), parts["id"])
    facts: dict[str, Any] = {
        "author": parts["id"].partition("/")[0],
        "sha": commit,
        "lastModified": date,
        "createdAt": date,
        "private": doors.private,
        "gated": "manual" if doors.gated else False,
        "disabled": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [sibling(entry, blobs=request.flag("blobs")) for entry in files],
    }
    wanted = request.query.get("expand")
    if wanted is not None:
        facts = {name: value for name, value in facts.items() if name in wanted}
    return as_json({"_id": sha1(parts["id"].encode()).hexdigest()[:24], "id": parts["id"], "modelId": parts["id"], **facts})


def sibling(entry: Entry, *, blobs: bool) -> dict[str, Any]:
    """A file, as the facts of a repository list it."""
    facts = described(entry)
    large = {"lfs": {"sha256": entry.lfs, "size": entry.size, "pointerSize": entry.pointer_size}} if entry.lfs else {}
    return {"rfilename": entry.path} | ({"size": facts["size"], "blobId": entry.oid, **large} if blobs else {})


def described(entry: Entry) -> dict[str, Any]:
    """A file or directory, as listings of trees and paths have it."""
    facts: dict[str, Any] = {"type": "file", "path": entry.path, "size": entry.size, "oid": entry.oid}
    if entry.directory:
        facts["type"] = "directory"
    if entry.lfs is not None:
        facts["lfs"] = {"oid": entry.lfs, "size": entry.size, "pointerSize": entry.pointer_size}
    return facts


@route("GET", API + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?")
def tree(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts)
    path = parts.get("path", "").strip("/")
    commit = repo.resolve(parts["rev"])
    found = repo.tree(commit, path, recursive=request.flag("recursive"))
    if path and not found:
        raise RefusedError(404, "EntryNotFound", f"{path} does not exist on {commit}")
    return as_json([described(entry) for entry in found])


@route("POST", API + r"/paths-info/(?P<rev>[^/]+)")
def paths_info(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts)
    commit = repo.resolve(parts["rev"])
    is_json = "json" in request.headers.get("content-type", "")
    paths = request.json()["paths"] if is_json else parse_qs(request.body.decode()).get("paths", [])
    files = {entry.path: entry for entry in repo.tree(commit)}
    return as_json([described(files[path]) for path in paths if path in files])


@route("GET", API + "/refs")
def refs(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    for line in repo.git("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)").decode().splitlines():
        name, oid, *peeled = line.split()
        _, kind, short = name.split("/", 2)
        found["branches" if kind == "heads" else "tags"].append(
            {"name": short, "ref": name, "targetCommit": (peeled or [oid])[0]}
        )
    return as_json(found)


@route("GET", API + r"/commits/(?P<rev>[^/]+)")
def commits(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_reading(hub, request, parts)
    log = repo.git("log", DATE, "--format=%H%x1f%cd%x1f%s%x1f%b%x1e", repo.resolve(parts["rev"])).decode()
    records = (record.strip("\n").split("\x1f") for record in log.split("\x1e") if record.strip())
    return as_json(
        [
            {"id": oid, "date": date, "title": title, "message": text.strip(), "authors": [{"user": "hub"}]}
            for oid, date, title, text in records
        ]
    )


@route("POST", API + r"/branch/(?P<name>[^/]+)")
def create_branch(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_writing(hub, request, parts)
    return new_ref(repo, f"refs/heads/{parts['name']}", request.json().get("startingPoint") or "main")


@route("POST", API + r"/tag/(?P<rev>[^/]+)")
def create_tag(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo, wanted = repo_for_writing(hub, request, parts), request.json()
    done = new_ref(repo, f"refs/tags/{wanted['tag']}", parts["rev"])
    if wanted.get("message"):
        repo.git("tag", "-f", "-a", "-m", wanted["message"], wanted["tag"], repo.resolve(parts["rev"]))
    return done


def new_ref(repo: Repo, name: str, revision: str) -> Answer:
    """A branch or tag that must not exist yet."""
    if repo.find(name) is not None:
        raise RefusedError(409, message="Reference already exists")
    repo.set_ref(name, repo.resolve(revision))
    return as_json({})


@route("DELETE", API + r"/(?P<what>branch|tag)/(?P<name>[^/]+)")
def delete_ref(hub: Hub, request: Request, parts: Parts) -> Answer:
    repo = repo_for_writing(hub, request, parts)
    name = f"refs/{'heads' if parts['what'] == 'branch' else 'tags'}/{parts['name']}"
    repo.resolve(name)
    repo.git("update-ref", "-d", name)
    return as_json({})
