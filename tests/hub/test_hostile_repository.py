"""A hostile model repository, pulled by the real client: what comes beside the weights changes and hides nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import read_ledger, write_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.store import save_policy
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, run
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.hub.calls import weights
from tests.hubserver.server import Hub
from tests.state.conftest import Scene
from tests.state.journals import content_of, forged, genuine, plant

REPO = "mallory/tiny-llama"
CHANNEL = "hub://mallory/channel"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The model as its honest vendor made it."""
    return tiny_checkpoint(tmp_path / "base", hidden=32, inter=32)


@pytest.fixture
def pack(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The vendor's patch, signed; the victim trusts the vendor."""
    home = tmp_path / "victim"
    home.mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(home))
    key, file = PrivateKey.generate(), tmp_path / "no-harm.nest"
    nest.write(tiny_pack(base), file)
    sign_pack(file, key)
    save_policy(Policy((TrustedKey("vendor", key.public),)))
    return file


def made_by_mallory(base: Path, pack: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """Unpatched weights beside a ledger that says they are patched and names a channel, with every checksum right."""
    model = Path(shutil.copytree(base, folder))
    scene = Scene("safetensors", model, model, base, PrivateKey.generate(), PrivateKey.generate())
    home = folder.with_name("mallory-home")
    home.mkdir()
    with monkeypatch.context() as mallory:
        mallory.setenv("NESTPATCH_HOME", str(home))
        apply_in_place(model, pack)
        ledger = read_ledger(scene.state_dir)
        (entry,) = ledger.applied
        claimed = {name: replace(record, after=record.before) for name, record in entry.tensors.items()}
        lying = replace(entry, tensors=claimed, signers={"vendor": "0" * 64})
        write_ledger(scene.state_dir, replace(ledger, applied=(lying,), follows=(CHANNEL,)))
        shutil.copy(base / "model.safetensors", model / "model.safetensors")
    return scene


def pulled(hub: Hub, folder: Path, target: Path) -> Path:
    """The folder, by way of the Hub and its own client."""
    from huggingface_hub import snapshot_download

    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "lock"
    }
    hub.store.seed(REPO, files)
    return Path(snapshot_download(REPO, endpoint=hub.url, local_dir=target))


@pytest.mark.usefixtures("online")
def test_a_ledger_from_the_hub_does_not_stand_for_the_patch(
    hub: Hub, base: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = made_by_mallory(base, pack, tmp_path / "mallory", monkeypatch)
    model = pulled(hub, scene.folder, tmp_path / "pulled")
    assert state_dir_of(model).ledger.is_file()
    assert (model / ".nestpatch").is_dir(), "the client brings hidden folders too"
    assert answer("verify", model, code=1)["verdict"] == "missing"
    assert answer("verify", model, pack, code=1)["verdict"] == "base"
    known = answer("status", model, code=1)
    assert (known["sound"], known["applied"][0]["in_rows"]) == (False, False)
    assert known["applied"][0]["claims"] == ["vendor"]
    done = answer("apply", model, pack, "--in-place")
    assert done["steps"] == ["undo no-harm 1.0.0", "apply no-harm 1.0.0"]
    assert answer("verify", model, pack)["verdict"] == "patched"
    assert run("revert", model).exit_code == 0
    assert weights(model) == weights(base)


@pytest.mark.usefixtures("online")
def test_a_channel_of_a_ledger_from_the_hub_is_not_contacted(
    hub: Hub, base: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = made_by_mallory(base, pack, tmp_path / "mallory", monkeypatch)
    model = pulled(hub, scene.folder, tmp_path / "pulled")
    hub.log.clear()
    for words in (["update", model], ["update", model, "--check"]):
        told = run(*words)
        assert told.exit_code == 1
        assert told.stderr.startswith(f"ChannelError: {model} follows no channel: its ledger came with the model")
        assert f"names {CHANNEL}" in told.stderr
        assert "--channel" in told.stderr
    # Neither does patching the model make it this user's choice.
    answer("apply", model, pack, "--in-place")
    assert run("update", model).stderr.startswith(f"ChannelError: {model} follows no channel: its ledger came with the model")
    assert answer("status", model)["offered"] == [CHANNEL]
    assert not hub.log, "a server was contacted"


@pytest.mark.usefixtures("online")
def test_a_journal_from_the_hub_writes_nothing(
    hub: Hub, base: Path, pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = made_by_mallory(base, pack, tmp_path / "mallory", monkeypatch)
    width = open_checkpoint(base).info(GATE).row_bytes
    plant(scene, forged(genuine(scene, {GATE: [0, 1]}), content=content_of([0, 1], [b"\x11" * width] * 2)))
    model = pulled(hub, scene.folder, tmp_path / "pulled")
    before = weights(model)
    for words in (["status", model], ["verify", model], ["update", model, "--check"]):
        assert run(*words).stderr.startswith("InterruptedChangeError")
    for words in (["apply", model, pack, "--in-place"], ["revert", model], ["update", model], ["recover", model]):
        assert run(*words).stderr.startswith("ForeignJournalError")
    assert weights(model) == before
    assert answer("recover", model, "--foreign", "remove")["action"] == "removed"
    assert weights(model) == before
    assert run("apply", model, pack, "--in-place").exit_code == 0
