"""Ledgers that came with a model and are false. Commands trust rows and signed packs, never such a ledger."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nestpatch.channels.publish import push
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.ledger import read_ledger
from tests.calls import answer, refused, run
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.state import forging
from tests.state.conftest import Scene
from tests.state.forging import based, harmless, nothing

SURE = {
    # Words by which a command would say that the patch is in the model
    "nothing to do",
    "applied already",
    "current",
    "up to date",
}


CLAIMS: dict[str, Callable[[Scene], Path]] = {
    # What a hostile repository writes beside base weights -> the pack file that it names
    "the real signed pack": lambda scene: _planted(scene, harmless(scene)),
    "the real pack at no strength": lambda scene: _planted(scene, harmless(scene), strength=1e-30),
    "the real pack without signature": lambda scene: _planted(scene, harmless(scene, "none")),
    "a pack of its own that changes nothing": lambda scene: _planted(scene, scene.write(nothing(scene))),
    "the real pack and a forged signer": lambda scene: _planted(
        scene, harmless(scene), signers={"acme": scene.acme.public.key_id}, roots=[scene.acme.public.key_id]
    ),
    "the real pack on another base": lambda scene: _planted(scene, harmless(scene), base_mismatch_allowed=True),
}


def _planted(scene: Scene, file: Path, **claims: Any) -> Path:
    forging.plant(scene, file, **claims)
    return file


@pytest.fixture(params=CLAIMS)
def claimed(request: pytest.FixtureRequest, scene: Scene) -> Scene:
    """Base weights whose ledger says that a pack is applied; acme's key is trusted."""
    scene.trust(acme=scene.acme)
    CLAIMS[request.param](scene)
    return scene


def test_base_weights_are_never_called_patched(claimed: Scene) -> None:
    before = claimed.weights()
    wanted = harmless(claimed)
    for words in ((), (wanted,), (wanted, "--strength", "1e-30")):
        for more in ((), based(claimed)):
            found = answer("verify", claimed.model, *words, *more, code=1)
            assert not found["known"]
            assert found["verdict"] != "patched"
    found = answer("status", claimed.model, code=1)
    assert not found["sound"]
    assert not any(entry["in_rows"] for entry in found["applied"])
    assert claimed.weights() == before


def test_apply_repairs_or_refuses(claimed: Scene) -> None:
    """If a command succeeds, the pack is in the rows afterwards; if it fails, nothing was changed."""
    before, file = claimed.weights(), harmless(claimed)
    for more in ((), based(claimed), ("--allow-downgrade", *based(claimed))):
        result = run("apply", claimed.model, file, "--in-place", *more)
        assert not any(word in result.stdout for word in SURE)
        if result.exit_code == 0:
            assert answer("verify", claimed.model, file, *based(claimed))["known"]
            assert claimed.weights() != before
            return
        assert claimed.weights() == before
        assert "What to do" in result.stderr
    # The forged entry blocks the pack, and no publisher signed it; `revert` finds that it was never applied.
    assert "99.0.0" in run("status", claimed.model).stdout or "not signed" in result.stderr


def test_a_copy_of_base_weights_is_repaired_or_refused(claimed: Scene, tmp_path: Path) -> None:
    file, target = harmless(claimed), tmp_path / f"copy{claimed.model.suffix if claimed.model.is_file() else ''}"
    target = tmp_path / "copy" if claimed.kind == "onnx" else target
    result = run("apply", claimed.model, file, "-o", target, *based(claimed))
    if result.exit_code:
        assert not target.exists()
        assert "applied" not in result.stderr or "not signed" in result.stderr or "99.0.0" in result.stderr
    else:
        model = target / claimed.model.name if claimed.kind == "onnx" else target
        assert answer("verify", model, file, *based(claimed))["known"]


def test_update_is_not_current_with_base_weights(scene: Scene, tmp_path: Path) -> None:
    """The ledger names the channel's own signed pack, at a strength at which it changes nothing."""
    scene.trust(acme=scene.acme)
    file, channel = harmless(scene), tmp_path / "channel"
    push(file, str(channel), scene.acme)
    for strength in (1.0, 1e-30):
        forging.plant(scene, file, strength, roots=[scene.acme.public.key_id])
        checked = answer("update", scene.model, "--check", "--channel", channel.as_uri(), *based(scene), code=10)
        assert [one["state"] for one in checked["channels"]] == ["available"]
    (done,) = answer("update", scene.model, "--channel", channel.as_uri(), *based(scene))["channels"]
    assert done["state"] == "updated"
    assert done["reason"]
    assert answer("verify", scene.model, file, *based(scene))["known"]
    (entry,) = read_ledger(scene.state_dir).applied
    assert (entry.strength, entry.foreign) == (1.0, False)
    assert answer("update", scene.model, *based(scene))["channels"][0]["state"] == "current"


def test_update_does_not_keep_the_strength_of_a_ledger_that_came_along(scene: Scene, tmp_path: Path) -> None:
    """Otherwise a repository could have every later version applied at almost no strength."""
    scene.trust(acme=scene.acme)
    one, two, channel = harmless(scene), scene.write(scene.pack(version="1.1.0", seed=2), scene.acme), tmp_path / "channel"
    push(one, str(channel), scene.acme)
    assert run("apply", scene.model, one, "--in-place", "--strength", "0.5", *based(scene)).exit_code == 0
    got = scene.sent()
    checked = answer("update", got.model, "--check", "--channel", channel.as_uri(), *based(scene), code=10)["channels"][0]
    assert "0.5" in checked["reason"]
    push(two, str(channel), scene.acme)
    assert answer("update", got.model, "--channel", channel.as_uri(), *based(scene))["channels"][0]["after"] == "1.1.0"
    assert [entry.strength for entry in read_ledger(got.state_dir).applied] == [1.0]
    # On the machine where the user chose the strength, it stays.
    assert answer("update", scene.model, "--channel", channel.as_uri(), *based(scene))["channels"][0]["after"] == "1.1.0"
    assert [entry.strength for entry in read_ledger(scene.state_dir).applied] == [0.5]


@pytest.mark.parametrize("claim", CLAIMS)
def test_no_release_says_that_it_holds_what_the_rows_do_not(plain: Scene, tmp_path: Path, claim: str) -> None:
    plain.trust(acme=plain.acme)
    CLAIMS[claim](plain)
    for words in ((), (plain.write(plain.pack("other", seed=7, neurons=2), plain.acme),)):
        assert run("export", plain.model, *words, "--to", "safetensors", "-o", tmp_path / "release").exit_code == 1
        assert not (tmp_path / "release").exists()


def test_a_release_passes_no_claims_on(plain: Scene, tmp_path: Path) -> None:
    """The pack and its signature are genuine; only the ledger claims that evil signed it too."""
    plain.trust(acme=plain.acme, evil=plain.evil)
    assert run("apply", plain.model, harmless(plain), "--in-place").exit_code == 0
    got = plain.sent()
    forging.edit(got.state_dir, lambda value: value["applied"][0].update(signers={"evil": plain.evil.public.key_id}))
    assert run("export", got.model, "--to", "safetensors", "-o", tmp_path / "release").exit_code == 0
    record = json.loads(str(open_checkpoint(tmp_path / "release").metadata()["nestpatch.record"]))
    assert record[0]["signers"] == {"acme": plain.acme.public.key_id}
    assert record[0]["roots"] == []


def small(scene: Scene) -> Pack:
    """The attacker's own pack, which changes almost nothing: half a bit in a single row."""
    return scene.pack("no-harm", "99.0.0", neurons=1, clusters=1, scale=0.02, tensors=["model.layers.0.mlp.up_proj.weight"])


def test_a_pack_of_the_attackers_own_in_the_rows_proves_nothing_where_keys_are_trusted(scene: Scene, tmp_path: Path) -> None:
    """Rows, ledger and pack agree, but no key that this user trusts signed the pack, whatever its name is."""
    file = scene.write(small(scene))
    assert run("apply", scene.model, file, "--in-place", *based(scene)).exit_code == 0
    got = scene.sent()
    found = answer("verify", got.model, *based(scene))
    assert (found["verdict"], found["known"]) == ("patched", True)
    got.trust(acme=scene.acme)
    found = answer("verify", got.model, *based(scene), code=1)
    assert found["verdict"] == "unknown"
    assert "no trusted signature confirms it" in found["detail"]
    assert "no key that you trust has signed it" in " ".join(run("status", got.model).stdout.split())
    if scene.kind in {"safetensors", "sharded"}:
        refused("UnsignedError", "export", got.model, "--to", "safetensors", "-o", tmp_path / "release")
    # On this machine the user agreed to apply it: it is accepted.
    assert answer("verify", scene.model, *based(scene))["known"]


def test_a_history_that_came_along_proves_nothing_where_keys_are_trusted(plain: Scene) -> None:
    """A forged pack, named only in the history, whose base is what the attacker's rows hold."""
    altered = plain.folder / "model.safetensors"
    data = bytearray(altered.read_bytes())
    data[-4000:] = bytes(4000)
    altered.write_bytes(data)
    pack = tiny_pack(plain.folder, name="no-harm")
    forging.keep(plain.state_dir, plain.write(pack))
    forging.write_ledger(plain.state_dir, forging.ledger(history=[forging.event(pack)]))
    plain.trust(acme=plain.acme)
    assert answer("verify", plain.model, code=1)["verdict"] == "unknown"
    # Nor after this machine has rewritten the ledger.
    other = plain.write(tiny_pack(plain.folder, name="other", seed=5), plain.acme)
    assert run("apply", plain.model, other, "--in-place").exit_code == 0
    assert run("revert", plain.model).exit_code == 0
    assert read_ledger(plain.state_dir).history[0]["foreign"] is True
    plain.state_dir.pack(nest.pack_id(nest.read(other))).unlink()
    assert answer("verify", plain.model, code=1)["verdict"] == "unknown"
    assert "came with the model" in run("status", plain.model).stdout


def test_verify_full_compares_whole_tensors_whatever_a_ledger_says_of_its_base(plain: Scene) -> None:
    """Otherwise a ledger that allows a mismatch would hide changes of all rows that no pack changes."""
    plain.trust(acme=plain.acme)
    assert run("apply", plain.model, harmless(plain), "--in-place").exit_code == 0
    got = plain.sent()
    forging.edit(got.state_dir, lambda value: value["applied"][0].update(base_mismatch_allowed=True))
    assert answer("verify", got.model, "--full")["known"]
    spoil(got)
    assert answer("verify", got.model)["known"]
    assert answer("verify", got.model, "--full", code=1)["verdict"] == "altered"


def spoil(scene: Scene) -> None:
    """Changes a value in a row of a patched tensor that the pack does not touch."""
    checkpoint, (delta, *_) = open_checkpoint(scene.model), scene.pack().deltas
    row = np.setdiff1d(np.arange(32), delta.rows)[:1]
    checkpoint.write_rows(delta.name, row, np.ascontiguousarray(checkpoint.read_rows(delta.name, row)[:, ::-1]))


def test_a_pack_for_another_model_is_refused_by_name(scene: Scene, tmp_path: Path) -> None:
    scene.trust(acme=scene.acme)
    wanted = harmless(scene)
    shapes = {"wide": {"hidden": 64, "inter": 32}, "long": {"hidden": 32, "inter": 900}, "deep": {"hidden": 32, "layers": 5}}
    for name, shape in shapes.items():
        other = tiny_checkpoint(tmp_path / name, dtype="BF16", **shape)
        file = scene.write(tiny_pack(other, seed=3), scene.acme)
        forging.keep(scene.state_dir, file)
        pack, foreign = nest.read(file), replace(scene, model=other)
        record = scene.state_dir.undo(f"{forging.TRANSACTION}-{nest.pack_id(pack)[:16]}")
        tensors = forging.write_undo(foreign, pack, record)
        forging.write_ledger(scene.state_dir, forging.ledger(forging.entry(pack, tensors)))
        for words in (["verify"], ["revert"], ["apply", wanted, "--in-place"], ["apply", file, "--in-place"]):
            assert "made for another model" in refused("LedgerError", words[0], scene.model, *words[1:])
        assert "made for another model" in answer("status", scene.model, code=1)["problem"]
        assert not answer("verify", scene.model, wanted, code=1)["known"]
