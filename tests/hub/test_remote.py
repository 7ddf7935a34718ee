"""Reading rows of a model on the Hub: the same bytes as from a file, few requests, and no trust in what comes back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.errors import (
    CheckpointFormatError,
    HubAccessError,
    HubAnswerError,
    HubError,
    HubNotFoundError,
    HubUnavailableError,
    InPlaceError,
)
from nestpatch.formats.opening import open_checkpoint
from nestpatch.hub import remote, retry
from nestpatch.hub.client import look_up
from nestpatch.hub.remote import _GAP, RemoteCheckpoint, _byte_ranges
from tests.helpers import FLOATS, PROPERTY, assert_same_bytes, tiny_checkpoint
from tests.hub.models import MODEL, put, weight_bytes, wide_model
from tests.hubserver import faults
from tests.hubserver.faults import Bend
from tests.hubserver.messages import Answer, content
from tests.hubserver.server import Hub

pytestmark = pytest.mark.usefixtures("online")
FEW = np.array([3, 4, 5, 15_000, 19_999])
ROW = 128


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS", (0.0, 0.01, 0.01))


def opened(hub: Hub, repo_id: str = MODEL, revision: str | None = None) -> RemoteCheckpoint:
    return RemoteCheckpoint(look_up(repo_id, revision, endpoint=hub.url), endpoint=hub.url)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_everything_equals_the_file(hub: Hub, tmp_path: Path, dtype: str, sharded: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "model", dtype=dtype, sharded=sharded)
    put(hub, folder)
    local, there = open_checkpoint(folder), opened(hub)
    assert there.tensors() == local.tensors()
    assert there.metadata() == local.metadata()
    assert (there.has(local.tensors()[0]), there.has("none"), there.converted) == (True, False, local.converted)
    assert [file.name for file in there.files] == [file.name for file in local.files]
    for name in local.tensors():
        ours, theirs = there.info(name), local.info(name)
        assert (ours.dtype, ours.shape, ours.offset, ours.nbytes) == (theirs.dtype, theirs.shape, theirs.offset, theirs.nbytes)
        assert_same_bytes(b"".join(there.read_all(name)), b"".join(local.read_all(name)), dtype)
        if len(theirs.shape) > 1:
            for rows in (np.arange(theirs.rows), np.array([0, 2, 3, theirs.rows - 1]), np.array([], np.int64)):
                got, want = there.read_rows(name, rows), local.read_rows(name, rows)
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                assert_same_bytes(got.tobytes(), want.tobytes(), dtype)
    assert there.size == weight_bytes(folder)


def test_only_what_is_needed_is_read(hub: Hub, tmp_path: Path) -> None:
    folder = wide_model(tmp_path / "model")
    put(hub, folder)
    there = opened(hub)
    header = there.meter.bytes
    assert header == remote._FIRST
    values = there.read_rows("a.weight", FEW)
    assert_same_bytes(values.tobytes(), open_checkpoint(folder).read_rows("a.weight", FEW).tobytes())
    assert there.meter.bytes - header == 5 * ROW
    assert there.meter.bytes < 0.05 * there.size
    # The facts, the header by way of the Hub; then three stretches straight from the CDN.
    assert len(hub.seen("hub")) == 2
    assert hub.seen("cdn")[0].sent == remote._FIRST
    assert sorted(s.sent for s in hub.seen("cdn"))[:3] == [ROW, ROW, 3 * ROW]
    assert there.meter.requests == 4


def test_rows_are_fetched_once_and_may_be_changed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    first = there.read_rows("a.weight", FEW)
    want, requests = first.copy(), there.meter.requests
    first[:] = 0
    assert np.array_equal(there.read_rows("a.weight", FEW), want)
    assert there.meter.requests == requests
    # What is kept has a limit: other rows push these out.
    monkeypatch.setattr(remote, "_KEPT", 3 * ROW)
    there.read_rows("a.weight", np.array([9]))
    assert np.array_equal(there.read_rows("a.weight", FEW), want)
    assert there.meter.requests > requests + 1


def test_near_rows_come_in_one_request(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    there.read_rows("a.weight", np.arange(0, 2000, 10))
    assert there.meter.requests == 2
    monkeypatch.setattr(remote, "_PART", 1 << 20)
    assert len(b"".join(there.read_all("a.weight"))) == 20_000 * ROW
    assert there.meter.requests == 5


@PROPERTY
@given(st.sets(st.integers(0, 500), max_size=40), st.integers(1, 64), st.integers(0, 300), st.integers(1, 2000))
def test_spans_hold_every_row_once(chosen: set[int], row_bytes: int, gap: int, limit: int) -> None:
    rows = np.array(sorted(chosen), np.int64)
    found = _byte_ranges(rows, row_bytes, gap=gap, limit=limit)
    assert [p for s in found for p in range(s.first, s.last)] == list(range(len(rows)))
    for span in found:
        assert span.start == rows[span.first] * row_bytes
        assert span.stop == (rows[span.last - 1] + 1) * row_bytes
        assert span.last - span.first == 1 or span.stop - span.start <= limit
        assert (np.diff(rows[span.first : span.last]) - 1).max(initial=0) * row_bytes <= gap
    for one, other in itertools.pairwise(found):
        together = other.start + row_bytes - one.start
        assert other.start - one.stop > gap or together > limit, "two requests where one would do"


def test_the_default_gap_joins_what_lies_close() -> None:
    rows = np.array([0, _GAP // 1024 + 1, 2 * _GAP // 1024 + 3])
    assert [(s.first, s.last) for s in _byte_ranges(rows, 1024)] == [(0, 2), (2, 3)]


def test_a_branch_that_moves_changes_nothing(hub: Hub, tmp_path: Path) -> None:
    old, new = wide_model(tmp_path / "old", seed=1), wide_model(tmp_path / "new", seed=2)
    first = put(hub, old)
    there = opened(hub, revision="main")
    second = put(hub, new)
    hub.expire_addresses()
    assert there.snapshot.commit == first != second
    assert_same_bytes(there.read_rows("a.weight", FEW).tobytes(), open_checkpoint(old).read_rows("a.weight", FEW).tobytes())
    assert all(f"/resolve/{first}/" in s.target for s in hub.seen("hub", path="/resolve/"))
    assert opened(hub).read_rows("a.weight", FEW).tobytes() == open_checkpoint(new).read_rows("a.weight", FEW).tobytes()


def test_an_expired_address_is_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    folder = wide_model(tmp_path / "model")
    put(hub, folder)
    there = opened(hub)
    hub.expire_addresses()
    assert_same_bytes(there.read_rows("a.weight", FEW).tobytes(), open_checkpoint(folder).read_rows("a.weight", FEW).tobytes())
    assert 403 in {s.status for s in hub.seen("cdn")}


def test_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(hub, wide_model(tmp_path / "model"))
    doors = hub.accounts.of("model", MODEL)
    doors.gated = True
    with pytest.raises(HubAccessError, match="is gated") as caught:
        opened(hub)
    assert f"{hub.url}/{MODEL}" in caught.value.advice
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HubAccessError, match="is gated"):
        opened(hub)
    doors.granted.add("fleet")
    there = opened(hub)
    hub.expire_addresses()
    there.read_rows("a.weight", FEW)
    assert {s.token for s in hub.seen("hub")[-2:]} == {"hf_reader"}
    assert {s.token for s in hub.seen("cdn")} == {None}


def test_a_header_longer_than_the_first_part(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST", 64)
    folder = tiny_checkpoint(tmp_path / "model", sharded=True)
    put(hub, folder)
    there = opened(hub)
    assert there.tensors() == open_checkpoint(folder).tensors()
    assert there.meter.requests == 5  # the index, two parts of two headers


CDN = r"GET /[0-9a-f]{64}\?"


@pytest.mark.parametrize("pattern", [CDN, "/resolve/"])
@pytest.mark.parametrize(
    "bend",
    [faults.status(503), faults.status(429, Retry_After="0"), faults.truncated(7), faults.shortened(7), faults.dropped()],
)
def test_what_passes_is_tried_again(hub: Hub, tmp_path: Path, bend: Bend, pattern: str) -> None:
    folder = wide_model(tmp_path / "model")
    put(hub, folder)
    if pattern != CDN:
        # The answer of the Hub is a redirect without a body; without the CDN its own bytes are at stake.
        hub.fault(pattern, straight(hub))
    first = hub.fault(pattern, bend, times=2)
    there = opened(hub)
    second = hub.fault(pattern, bend, times=2)
    assert_same_bytes(there.read_rows("a.weight", FEW).tobytes(), open_checkpoint(folder).read_rows("a.weight", FEW).tobytes())
    assert min(first.seen, second.seen) > 2


def straight(hub: Hub) -> Bend:
    """A mirror without a CDN: it sends large files itself."""

    def bend(request: faults.Request, serve: faults.Serve) -> Answer:
        answer = serve(request)
        if answer.status != 302:
            return answer
        data = (hub.store.large / answer.headers["X-Linked-Etag"].strip('"')).read_bytes()
        return content(
            len(data), lambda start, stop: data[start:stop], request, {"X-Repo-Commit": answer.headers["X-Repo-Commit"]}
        )

    return bend


def other_commit(request: faults.Request, serve: faults.Serve) -> Answer:
    answer = serve(request)
    return Answer(answer.status, {**answer.headers, "X-Repo-Commit": "f" * 40}, answer.body)


def other_range(request: faults.Request, serve: faults.Serve) -> Answer:
    """The right number of bytes, from another place."""
    answer = serve(request)
    start, rest = answer.headers["Content-Range"].removeprefix("bytes ").split("-")
    stop, size = rest.split("/")
    moved = f"bytes {int(start) + 1}-{int(stop) + 1}/{size}"
    return Answer(answer.status, {**answer.headers, "Content-Range": moved}, answer.body)


def other_size(request: faults.Request, serve: faults.Serve) -> Answer:
    """The file has grown since its header was read."""
    answer = serve(request)
    told = answer.headers["Content-Range"].split("/")[0] + "/99999999"
    return Answer(answer.status, {**answer.headers, "Content-Range": told}, answer.body)


LOGIN = Answer(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")


@pytest.mark.parametrize(
    ("pattern", "bend", "error", "says"),
    [
        (CDN, faults.status(503), HubUnavailableError, "answered 503"),
        (CDN, faults.truncated(7), HubUnavailableError, "cannot read acme/tiny-llama@"),
        (CDN, faults.shortened(7), HubUnavailableError, "received 7 bytes, expected"),
        (CDN, faults.dropped(), HubUnavailableError, "cannot read acme/tiny-llama@"),
        (CDN, faults.rangeless(), HubAnswerError, "does not send parts of"),
        (CDN, faults.replayed(LOGIN), HubAnswerError, "does not send parts of"),
        (CDN, other_range, HubAnswerError, "asked for bytes"),
        (CDN, other_size, HubAnswerError, "asked for bytes"),
        (CDN, faults.status(416), HubAnswerError, "answered 416"),
        ("/resolve/", faults.status(403), HubAccessError, "answered 403"),
        ("/resolve/", faults.status(500), HubUnavailableError, "answered 500"),
        ("/resolve/", faults.replayed(LOGIN), HubAnswerError, "does not send parts of"),
        ("/resolve/", faults.redirected("http://127.0.0.1:9/elsewhere"), HubUnavailableError, "cannot read"),
        ("/resolve/", other_commit, HubAnswerError, "answered with commit ffffffffffff"),
    ],
)
def test_wrong_answers_have_names(hub: Hub, tmp_path: Path, pattern: str, bend: Bend, error: type[HubError], says: str) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    hub.fault(pattern, bend)
    if pattern != CDN:
        hub.expire_addresses()
    with pytest.raises(HubError, match=says) as caught:
        there.read_rows("a.weight", FEW)
    assert type(caught.value) is error
    assert caught.value.advice.strip()


def test_a_redirect_to_another_host_gets_no_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    put(hub, wide_model(tmp_path / "model"))
    other = Hub(tmp_path / "other")
    other.start()
    try:
        hub.fault("/resolve/", faults.redirected(f"{other.url}/api/whoami-v2"))
        with pytest.raises(HubAccessError, match="answered 401"):
            opened(hub)
        assert [s.token for s in other.log] == [None]
    finally:
        other.stop()


def test_a_hub_that_dies_in_between(hub: Hub, tmp_path: Path) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    hub.stop()
    with pytest.raises(HubUnavailableError, match="cannot read acme/tiny-llama@"):
        there.read_rows("a.weight", FEW)


def test_a_hub_that_falls_asleep(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.fault(CDN, faults.slow(0.5))
    with pytest.raises(HubUnavailableError, match="cannot read"):
        there.read_rows("a.weight", FEW)


def test_a_file_that_vanished(hub: Hub, tmp_path: Path) -> None:
    put(hub, wide_model(tmp_path / "model"))
    snapshot = look_up(MODEL, endpoint=hub.url)
    gone = snapshot.__class__(MODEL, hub.store.repo("model", MODEL).resolve("main~1"), snapshot.files)
    with pytest.raises(HubNotFoundError, match=r"model\.safetensors does not exist"):
        RemoteCheckpoint(gone, endpoint=hub.url)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config.json": b"{}"}, "holds 0 .safetensors files"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "holds 2 .safetensors files"),
        ({"model.safetensors": b"\xff" * 16}, "header of 18446744073709551615 bytes in 16"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"[]"}, "is broken"),
        ({"model.safetensors": b"\x02" + bytes(7) + b"{}!"}, "longer than its header says"),
        ({"model.safetensors.index.json": b"{"}, "cannot read"),
        ({"model.safetensors.index.json": b'{"weight_map":{"a":"../b.safetensors"}}'}, "is not a plain file name"),
        ({"model.safetensors.index.json": b'{"weight_map":{"a":"b.safetensors"}}'}, "names b.safetensors, which is missing"),
        (
            {
                "model.safetensors.index.json": b'{"weight_map":{"a":"b.safetensors"}}',
                "b.safetensors": b"\x02" + bytes(7) + b"{}",
            },
            "says that tensor a is in b.safetensors, and it is not",
        ),
    ],
)
def test_repositories_without_a_sound_model(hub: Hub, files: dict[str, bytes], says: str) -> None:
    hub.store.seed(MODEL, files)
    with pytest.raises(CheckpointFormatError, match=says):
        opened(hub)


def test_an_only_file_of_another_name_is_the_model(hub: Hub, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    put(hub, folder)
    assert opened(hub).tensors() == open_checkpoint(folder).tensors()


def test_it_can_only_be_read(hub: Hub, tmp_path: Path) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    with pytest.raises(InPlaceError, match="can only be read"):
        there.write_rows("a.weight", FEW, there.read_rows("a.weight", FEW))
    with pytest.raises(InPlaceError, match="can only be read"):
        there.reopen(tmp_path)
    with pytest.raises(CheckpointFormatError, match="has no tensor c"):
        there.info("c")
    with pytest.raises(CheckpointFormatError, match="it has no rows"):
        there.read_rows("b.bias", np.array([0]))
    with pytest.raises(CheckpointFormatError, match="has 20000 rows, asked for 5 to 20000"):
        there.read_rows("a.weight", np.array([5, 20_000]))


def test_answers_are_counted_even_when_they_are_no_good(hub: Hub, tmp_path: Path) -> None:
    put(hub, wide_model(tmp_path / "model"))
    there = opened(hub)
    before = there.meter.bytes
    hub.fault(CDN, faults.shortened(100), times=1)
    there.read_rows("a.weight", np.array([7]))
    assert there.meter.bytes - before == 100 + ROW
