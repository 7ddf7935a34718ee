"""The local Hub against the real client: what it must get right for the other tests to mean something."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError

from tests.hubserver import faults
from tests.hubserver.accounts import READER, WRITER
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub

Machines = Callable[..., Machine]
API = "from huggingface_hub import *\nfrom huggingface_hub.errors import *\napi = HfApi()\nR = 'acme/patches'\n"
LARGE = bytes(range(256)) * 800


def failing(call: str) -> str:
    """Code whose result is the status of the HTTP error that a call ends with."""
    caught = "result = [type(error).__name__, error.response.status_code]"
    return f"{API}\ntry:\n    {call}\nexcept HfHubHTTPError as error:\n    {caught}"


def test_a_repository_from_creation_to_download(hub: Hub, publisher: Machine, machine: Machines) -> None:
    made = publisher.run(
        f"""{API}
api.create_repo(R)
api.create_repo(R, exist_ok=True)
head = api.repo_info(R).sha
large = bytes(range(256)) * 800
done = api.create_commit(R, [CommitOperationAdd("a/p.nest", large), CommitOperationAdd("channel.json", b"{{}}")],
                         commit_message="first", commit_description="why", parent_commit=head)
api.create_tag(R, tag="v1", tag_message="note")
api.create_branch(R, branch="stable", revision="v1")
refs = api.list_repo_refs(R)
result = {{"oid": done.oid, "refs": [(r.name, r.target_commit) for r in refs.branches + refs.tags],
          "log": [(c.title, c.message) for c in api.list_repo_commits(R)]}}
"""
    )
    assert made["refs"] == [["main", made["oid"]], ["stable", made["oid"]], ["v1", made["oid"]]]
    assert made["log"] == [["first", "why"], ["initial commit", ""]]
    got = machine("fleet").run(
        f"""{API}
import hashlib, pathlib
folder = pathlib.Path(snapshot_download(R, revision="v1"))
info = api.get_paths_info(R, ["a/p.nest", "channel.json", "missing"], revision="stable")
result = {{"files": sorted(api.list_repo_files(R)), "sha256": hashlib.sha256((folder / "a/p.nest").read_bytes()).hexdigest(),
          "json": (folder / "channel.json").read_text(), "commit": folder.name,
          "info": [(i.path, i.size, i.lfs.sha256 if i.lfs else None) for i in info]}}
"""
    )
    digest = sha256(LARGE).hexdigest()
    assert got["files"] == [".gitattributes", "a/p.nest", "channel.json"]
    assert (got["sha256"], got["json"], got["commit"]) == (digest, "{}", made["oid"])
    assert got["info"] == [["a/p.nest", len(LARGE), digest], ["channel.json", 2, None]]
    assert [s.status for s in hub.seen("hub", "PUT")] == [200]
    assert len(hub.seen("cdn", "GET", digest)) == 1


def test_large_files_leave_by_the_cdn_without_the_token(hub: Hub, machine: Machines) -> None:
    hub.store.seed("acme/patches", {"p.nest": LARGE})
    machine(token=READER).run(f"{API}\nresult = hf_hub_download(R, 'p.nest')")
    assert {s.token for s in hub.seen("hub", path="/resolve/")} == {READER}
    assert [s.token for s in hub.seen("cdn")] == [None]


def test_of_two_publishers_one_is_stale(hub: Hub, publisher: Machine) -> None:
    base = hub.store.seed("acme/patches", {"channel.json": b"0"})
    hub.store.seed("acme/patches", {"channel.json": b"1"})
    add = "api.create_commit(R, [CommitOperationAdd('channel.json', b'2')], commit_message='x', parent_commit=sys.argv[1])"
    assert publisher.run(failing(add), base) == ["HfHubHTTPError", 412]
    repo = hub.store.repo("model", "acme/patches")
    assert repo.read(repo.entry(repo.resolve("main"), "channel.json"), 0, 1) == b"1"


@pytest.mark.parametrize(
    ("call", "error", "status"),
    [
        ("hf_hub_download('acme/none', 'x')", "RepositoryNotFoundError", 404),
        ("api.repo_info(R, revision='v9')", "RevisionNotFoundError", 404),
        ("hf_hub_download(R, 'none.json')", "RemoteEntryNotFoundError", 404),
        ("api.upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id=R)", "HfHubHTTPError", 403),
        ("HfApi(token='hf_bad').repo_info(R)", "HfHubHTTPError", 401),
        ("HfApi(token=False).create_repo(R)", "HfHubHTTPError", 401),
        ("api.create_tag(R, tag='v1')", "HfHubHTTPError", 403),
    ],
)
def test_refusals_have_the_codes_of_the_real_hub(hub: Hub, machine: Machines, call: str, error: str, status: int) -> None:
    hub.store.seed("acme/patches", {"channel.json": b"{}"})
    assert machine().run(failing(call)) == [error, status]


def test_private_and_gated_repositories(hub: Hub, machine: Machines) -> None:
    hub.store.seed("acme/patches", {"x.json": b"{}"})
    doors = hub.accounts.of("model", "acme/patches")
    doors.gated = True
    download = failing("result = hf_hub_download(R, 'x.json') and 'got it'")
    assert machine("anybody", token=None).run(download) == ["GatedRepoError", 401]
    assert machine("fleet").run(download) == ["GatedRepoError", 403]
    assert machine("fleet").run(f"{API}\nresult = api.repo_info(R).gated") == "manual"
    doors.granted.add("fleet")
    assert machine("fleet").run(download) == "got it"
    doors.private = True
    assert machine("anybody", token=None).run(download) == ["RepositoryNotFoundError", 401]
    assert machine("owner", token=WRITER).run(download) == "got it"


def test_a_path_out_of_the_repository_is_refused(hub: Hub, publisher: Machine) -> None:
    hub.store.seed("acme/patches", {"x.json": b"{}"})
    line = b'{"key":"header","value":{"summary":"x"}}\n{"key":"file","value":{"path":"../x","content":"x"}}'
    answer = publisher.run(
        "from huggingface_hub import get_session, HfApi\napi = HfApi()\n"
        "r = get_session().post(api.endpoint + '/api/models/acme/patches/commit/main', content=sys.argv[1].encode(),"
        " headers=api._build_hf_headers())\nresult = [r.status_code, r.headers['X-Error-Message']]",
        line.decode(),
    )
    assert answer == [400, "../x is no path"]


def api_of(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=WRITER)


def test_branches_and_tags_move_and_go(hub: Hub, online: None) -> None:
    first = hub.store.seed("acme/patches", {"x": b"1"})
    second = hub.store.seed("acme/patches", {"x": b"2"})
    api = api_of(hub)
    api.create_tag("acme/patches", tag="v1", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("acme/patches", tag="v1")
    api.delete_tag("acme/patches", tag="v1")
    api.create_tag("acme/patches", tag="v1")
    api.create_branch("acme/patches", branch="old", revision=first)
    assert api.repo_info("acme/patches", revision="v1").sha == second
    assert api.repo_info("acme/patches", revision="old").sha == first
    api.delete_branch("acme/patches", branch="old")
    assert not api.revision_exists("acme/patches", "old")


def test_files_and_folders_are_uploaded_deleted_and_listed(hub: Hub, online: None, tmp_path: Path) -> None:
    api = api_of(hub)
    api.create_repo("acme/patches", private=True)
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.txt").write_text("x", encoding="utf-8")
    (tmp_path / "up" / "b.nest").write_bytes(os.urandom(2000))
    api.upload_folder(repo_id="acme/patches", folder_path=tmp_path / "up", path_in_repo="folder")
    api.upload_file(path_or_fileobj=b"---\nlicense: mit\n---\n", path_in_repo="README.md", repo_id="acme/patches")
    api.delete_file("folder/a.txt", "acme/patches")
    tree = {item.path: item for item in api.list_repo_tree("acme/patches", recursive=True)}
    assert set(tree) == {".gitattributes", "README.md", "folder", "folder/b.nest"}
    assert tree["folder/b.nest"].size == 2000
    assert api.repo_info("acme/patches").private
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.url, token=READER).repo_info("acme/patches")
    api.delete_repo("acme/patches")
    assert not api.repo_exists("acme/patches")


def test_unchanged_files_make_no_commit(hub: Hub, online: None) -> None:
    head = hub.store.seed("acme/patches", {"p.nest": LARGE, "x.json": b"{}"})
    same = [CommitOperationAdd("p.nest", LARGE), CommitOperationAdd("x.json", b"{}")]
    assert api_of(hub).create_commit("acme/patches", same, commit_message="again").oid == head
    assert not hub.seen("hub", "PUT")


@pytest.mark.parametrize("name", ["p.nest", "plain.txt"])
@pytest.mark.parametrize(
    ("wanted", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=204790-", 204_790, 204_800), ("bytes=-5", 204_795, 204_800),
     ("bytes=204799-999999", 204_799, 204_800)],
)  # fmt: skip
def test_ranges(hub: Hub, online: None, name: str, wanted: str, start: int, stop: int) -> None:
    text = b"0123456789" * 20_480
    content = LARGE if name == "p.nest" else text
    hub.store.seed("acme/patches", {name: content})
    answer = get_session().get(f"{hub.url}/acme/patches/resolve/main/{name}", headers={"Range": wanted})
    assert answer.status_code == 206
    assert answer.content == content[start:stop]
    assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/204800"


def test_a_range_beyond_the_end_is_416(hub: Hub, online: None) -> None:
    hub.store.seed("acme/patches", {"p.nest": LARGE})
    answer = get_session().get(f"{hub.url}/acme/patches/resolve/main/p.nest", headers={"Range": "bytes=204800-"})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */204800")


def test_addresses_of_the_cdn_expire(hub: Hub, online: None) -> None:
    hub.store.seed("acme/patches", {"p.nest": LARGE})
    address = get_session().head(f"{hub.url}/acme/patches/resolve/main/p.nest", follow_redirects=False).headers["Location"]
    assert get_session().get(address).content == LARGE
    hub.expire_addresses()
    assert get_session().get(address).status_code == 403


def test_faults_strike_as_often_as_they_were_set(hub: Hub, online: None) -> None:
    hub.store.seed("acme/patches", {"x.json": b"0123456789"})
    address = f"{hub.url}/acme/patches/resolve/main/x.json"
    hub.fault(r"GET .*x\.json", faults.status(503, Retry_After="1"), times=1, skip=1)
    answers = [get_session().get(address) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 503, 200]
    assert answers[1].headers["Retry-After"] == "1"
    hub.fault("GET", faults.shortened(4), times=1)
    assert get_session().get(address).content == b"0123"
    hub.fault("GET", faults.corrupted(9), times=1)
    assert get_session().get(address).content == b"012345678" + bytes([ord("9") ^ 1])
    hub.fault("GET", faults.rangeless(), times=1)
    assert get_session().get(address, headers={"Range": "bytes=0-1"}).status_code == 200
    hub.fault("GET", faults.redirected(f"{hub.url}/api/whoami-v2"), times=1)
    assert get_session().get(address).status_code == 401


@pytest.mark.parametrize("bend", [faults.truncated(4), faults.dropped()])
def test_broken_connections(hub: Hub, online: None, bend: faults.Bend) -> None:
    from huggingface_hub.errors import HTTPError

    hub.store.seed("acme/patches", {"x.json": b"0123456789"})
    hub.fault("GET", bend, times=1)
    address = f"{hub.url}/acme/patches/resolve/main/x.json"
    with pytest.raises(HTTPError):
        get_session().get(address)
    assert get_session().get(address).content == b"0123456789"


def test_a_stopped_hub_is_gone_and_comes_back(hub: Hub, online: None) -> None:
    from huggingface_hub.errors import HTTPError

    head = hub.store.seed("acme/patches", {"x.json": b"{}"})
    api = api_of(hub)
    assert api.repo_info("acme/patches").sha == head
    hub.stop()
    with pytest.raises(HTTPError):
        api.repo_info("acme/patches")
    hub.start()
    assert api.repo_info("acme/patches").sha == head
