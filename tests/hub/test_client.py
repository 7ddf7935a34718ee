"""Finding out the commit: what the Hub says, and what it says no with."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.errors import HubAccessError, HubAnswerError, HubError, HubNotFoundError, HubUnavailableError
from nestpatch.hub.client import Reference, Snapshot, look_up, looks_local
from tests.hubserver import faults
from tests.hubserver.faults import Bend
from tests.hubserver.messages import Answer, as_json
from tests.hubserver.server import Hub

pytestmark = pytest.mark.usefixtures("online")
REPO = "acme/tiny-llama"


@pytest.fixture
def token(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/tiny", Reference("acme/tiny")),
        ("hub://acme/tiny", Reference("acme/tiny")),
        ("acme/tiny@v1.0.0", Reference("acme/tiny", "v1.0.0")),
        ("acme/tiny@refs/pr/3", Reference("acme/tiny", "refs/pr/3")),
        ("a/b", Reference("a/b")),
        ("Qwen/Qwen2.5-0.5B_x@main", Reference("Qwen/Qwen2.5-0.5B_x", "main")),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected
    assert Reference.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "text",
    ["tiny", "a/b/c", "./acme/tiny", "/acme/tiny", "../tiny", "acme/..", "acme/tiny@", "acme/tiny@../x", "acme/tiny@a b",
     "a/b\n", "acme/tiny@-x", "acme//tiny", "acme/-tiny", "acme/tiny.", "acme\\tiny", "", "acme/ti--ny", "acme/tiny@a..b",
     "é/ü", "a/" + "b" * 99],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    assert Reference.parse(text) is None


@pytest.mark.parametrize(
    "text",
    ["runs/pack.nest", "models/model.gguf", "acme/x.safetensors@main", "./acme/tiny", "~/models", "/srv/x", "acme\\tiny",
     "here/tiny"],
)  # fmt: skip
def test_what_looks_like_a_path(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_local(text)
    assert not looks_local(f"hub://{text}"), "with the scheme it is a repository"
    assert not looks_local("acme/tiny")


def test_branches_tags_and_commits_are_resolved(hub: Hub) -> None:
    first = hub.store.seed(REPO, {"x": b"1"})
    hub.store.repo("model", REPO).set_ref("refs/tags/v1", first)
    second = hub.store.seed(REPO, {"y.json": b"2"})
    assert look_up(REPO, endpoint=hub.url).commit == second
    assert look_up(REPO, "v1", endpoint=hub.url).commit == first
    assert look_up(REPO, "main", endpoint=hub.url) == Snapshot(REPO, second, (".gitattributes", "x", "y.json"))
    assert len(hub.log) == 3
    assert Reference(REPO, first).commit == first
    assert len(hub.log) == 3, "a commit needs no request"


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_a_missing_revision(hub: Hub, revision: str) -> None:
    hub.store.seed(REPO, {"x": b"1"})
    with pytest.raises(HubNotFoundError, match="acme/tiny-llama does not have acme/tiny-llama@"):
        look_up(REPO, revision, endpoint=hub.url)


def test_a_missing_repository(hub: Hub) -> None:
    with pytest.raises(HubNotFoundError, match="has no model repository acme/tiny-llama, or hides it") as caught:
        look_up(REPO, endpoint=hub.url)
    assert "hf auth login" in caught.value.advice


@pytest.mark.usefixtures("token")
def test_a_private_repository(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    head = hub.store.seed(REPO, {"x": b"1"})
    hub.accounts.of("model", REPO).private = True
    with pytest.raises(HubNotFoundError):
        look_up(REPO, endpoint=hub.url)
    hub.accounts.of("model", REPO).granted.add("fleet")
    assert look_up(REPO, endpoint=hub.url).commit == head
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubAccessError, match="answered 401") as caught:
        look_up(REPO, endpoint=hub.url)
    assert "hf_wrong" not in f"{caught.value} {caught.value.advice} {caught.value.__cause__}"


HTML = Answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")


@pytest.mark.parametrize(
    ("bend", "error"),
    [
        (faults.status(500), HubUnavailableError),
        (faults.status(503), HubUnavailableError),
        (faults.status(429), HubUnavailableError),
        (faults.status(403), HubAccessError),
        (faults.status(400), HubAnswerError),
        (faults.dropped(), HubUnavailableError),
        (faults.truncated(20), HubUnavailableError),
        (faults.shortened(20), HubAnswerError),
        (faults.replayed(HTML), HubAnswerError),
        (faults.replayed(as_json([])), HubAnswerError),
        (faults.replayed(as_json({"id": REPO, "sha": None})), HubAnswerError),
        (faults.replayed(as_json({"id": REPO, "sha": "main"})), HubAnswerError),
        (faults.replayed(as_json({"id": REPO, "sha": "a" * 40, "siblings": [{}]})), HubAnswerError),
        (faults.redirected("http://127.0.0.1:9/"), HubUnavailableError),
    ],
)
def test_a_hub_in_trouble(hub: Hub, bend: Bend, error: type[HubError]) -> None:
    hub.store.seed(REPO, {"x": b"1"})
    hub.fault("GET /api/models/", bend)
    with pytest.raises(HubError, match=REPO) as caught:
        look_up(REPO, endpoint=hub.url)
    assert type(caught.value) is error
    assert caught.value.advice.strip()


def test_a_dead_endpoint_is_an_error_and_not_the_cached_commit(hub: Hub) -> None:
    from huggingface_hub import hf_hub_download

    hub.store.seed(REPO, {"x": b"1"})
    hf_hub_download(REPO, "x", endpoint=hub.url)
    hub.stop()
    with pytest.raises(HubUnavailableError, match=f"cannot reach {hub.url} for {REPO}") as caught:
        look_up(REPO, endpoint=hub.url)
    assert "HF_HUB_OFFLINE=1" in caught.value.advice


def test_a_slow_hub_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.store.seed(REPO, {"x": b"1"})
    hub.fault("GET", faults.slow(1.0))
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    with pytest.raises(HubUnavailableError, match="cannot reach"):
        look_up(REPO, endpoint=hub.url)


def test_another_commit_than_asked_for_is_refused(hub: Hub) -> None:
    hub.store.seed(REPO, {"x": b"1"})
    hub.fault("GET", faults.replayed(as_json({"id": REPO, "sha": "b" * 40, "siblings": []})))
    with pytest.raises(HubAnswerError, match="another one"):
        look_up(REPO, "a" * 40, endpoint=hub.url)


def test_offline_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnavailableError, match="HF_HUB_OFFLINE is set"):
        look_up(REPO, endpoint=hub.url)
    assert not hub.log
