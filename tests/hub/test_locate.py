"""A base by path or by Hub id: from this disk, from the cache, from the Hub, and what happens without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import CheckpointFormatError, HubUnavailableError
from nestpatch.formats.opening import open_checkpoint
from nestpatch.formats.safetensors import SafetensorsCheckpoint
from nestpatch.hub.remote import RemoteCheckpoint, open_base
from tests.helpers import assert_same_bytes, tiny_checkpoint
from tests.hub.models import MODEL, put
from tests.hubserver.machine import Machine
from tests.hubserver.server import Hub

Machines = Callable[..., Machine]
GATE = "model.layers.0.mlp.gate_proj.weight"
ROWS = np.array([1, 2, 20])
READ = f"""
import numpy as np
from nestpatch.errors import NestpatchError
from nestpatch.hub.remote import open_base
try:
    base = open_base(sys.argv[1])
    rows = base.read_rows("{GATE}", np.array([1, 2, 20]))
    result = [type(base).__name__, rows.tobytes().hex(), base.meter.bytes if hasattr(base, "meter") else 0]
except NestpatchError as error:
    result = [type(error).__name__, str(error), error.advice]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", sharded=True)


@pytest.fixture
def wanted(folder: Path) -> str:
    """The rows that READ reads, as hex."""
    return open_checkpoint(folder).read_rows(GATE, ROWS).tobytes().hex()


def test_a_path_is_a_path(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(open_base(folder), SafetensorsCheckpoint)
    (tmp_path / "acme").mkdir()
    folder.rename(tmp_path / "acme" / "tiny-llama")
    monkeypatch.chdir(tmp_path)
    assert open_base(MODEL).path == Path(MODEL)


@pytest.mark.parametrize("text", ["no-such-model", "./acme/none", "/acme/none", "a/b/c", "", "a\0b/c", "x/" * 3000])
def test_neither_path_nor_id(text: str) -> None:
    with pytest.raises(CheckpointFormatError, match="there is no model at"):
        open_base(text)


@pytest.mark.usefixtures("online")
def test_a_mistyped_path_is_not_sent_to_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for text in ("models/lama", "runs/model.gguf"):
        with pytest.raises(CheckpointFormatError, match=f"there is no model at {text}") as caught:
            open_base(text, endpoint=hub.url)
        assert "hub://" in caught.value.advice
    assert not hub.log


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("written", ["acme/tiny-llama", "hub://acme/tiny-llama", "acme/tiny-llama@main", "acme/tiny-llama@v1"])
def test_a_hub_id_is_read_from_the_hub(hub: Hub, folder: Path, written: str) -> None:
    hub.store.repo("model", MODEL)
    commit = put(hub, folder)
    hub.store.repo("model", MODEL).set_ref("refs/tags/v1", commit)
    base = open_base(written, endpoint=hub.url)
    assert isinstance(base, RemoteCheckpoint)
    assert base.snapshot.commit == commit
    assert_same_bytes(base.read_rows(GATE, ROWS).tobytes(), open_checkpoint(folder).read_rows(GATE, ROWS).tobytes())


@pytest.mark.usefixtures("online")
def test_the_cache_serves_the_commit_that_the_hub_names(hub: Hub, folder: Path, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = put(hub, folder)
    snapshot_download(MODEL, endpoint=hub.url)
    hub.log.clear()
    base = open_base(MODEL, endpoint=hub.url)
    assert isinstance(base, SafetensorsCheckpoint)
    assert base.path.name == commit
    assert len(hub.log) == 1, "one question: is this still the commit?"
    assert isinstance(open_base(f"{MODEL}@{commit}", endpoint=hub.url), SafetensorsCheckpoint)
    assert len(hub.log) == 1, "a full commit id needs no question"
    put(hub, tiny_checkpoint(tmp_path / "newer", sharded=True, seed=7))
    assert isinstance(open_base(MODEL, endpoint=hub.url), RemoteCheckpoint)


@pytest.mark.usefixtures("online")
def test_a_partial_snapshot_does_not_count(hub: Hub, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    put(hub, folder)
    hf_hub_download(MODEL, "model.safetensors.index.json", endpoint=hub.url)
    hf_hub_download(MODEL, "model-00001-of-00002.safetensors", endpoint=hub.url)
    assert isinstance(open_base(MODEL, endpoint=hub.url), RemoteCheckpoint)


def test_the_environment_of_the_hub_client_decides(hub: Hub, folder: Path, machine: Machines, wanted: str) -> None:
    put(hub, folder)
    hub.accounts.of("model", MODEL).private = True
    hub.accounts.of("model", MODEL).granted.add("fleet")
    kind, rows, downloaded = machine("a").run(READ, MODEL)
    assert (kind, rows) == ("RemoteCheckpoint", wanted)
    assert 0 < downloaded < 20_000
    # The token that `hf auth login` leaves.
    logged_in = machine("b", token=None)
    (logged_in.home / "hf").mkdir(parents=True)
    (logged_in.home / "hf" / "token").write_text("hf_reader", encoding="utf-8")
    assert logged_in.run(READ, MODEL)[:2] == ["RemoteCheckpoint", wanted]
    name, reason, advice = machine("c", token=None).run(READ, MODEL)
    assert (name, reason) == ("HubNotFoundError", f"{hub.url} has no model repository {MODEL}, or hides it from this user")
    assert "HF_TOKEN" in advice


def test_without_a_network(hub: Hub, folder: Path, machine: Machines, wanted: str) -> None:
    put(hub, folder)
    ours = machine("a")
    name, reason, advice = ours.run(READ, MODEL, HF_HUB_OFFLINE="1")
    assert (name, f"does not contain all of {MODEL}" in reason) == ("HubUnavailableError", True)
    assert f"hf download {MODEL}" in advice
    assert not hub.log
    ours.run("from huggingface_hub import snapshot_download\nsnapshot_download(sys.argv[1])", MODEL)
    hub.stop()
    assert ours.run(READ, MODEL, HF_HUB_OFFLINE="1")[:2] == ["SafetensorsCheckpoint", wanted]
    name, _, advice = ours.run(READ, MODEL)
    assert (name, "HF_HUB_OFFLINE=1" in advice) == ("HubUnavailableError", True)


@pytest.mark.usefixtures("online")
def test_a_dead_hub_is_not_replaced_by_an_old_copy(hub: Hub, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = put(hub, folder)
    snapshot_download(MODEL, endpoint=hub.url)
    hub.stop()
    with pytest.raises(HubUnavailableError, match="cannot reach"):
        open_base(MODEL, endpoint=hub.url)
    assert isinstance(open_base(f"{MODEL}@{commit}", endpoint=hub.url), SafetensorsCheckpoint)
