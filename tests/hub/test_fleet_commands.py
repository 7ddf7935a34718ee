"""The commands: what they ask for, what they print, their exit codes, and that a wrong signature stops every one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nestpatch.channels._memory import held, keep, recall
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.formats import nest
from nestpatch.gate import Proven
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.signing.store import save_policy
from nestpatch.signing.subject import Origin
from nestpatch.signing.trust import Policy
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, run
from tests.gguf.files import gguf_of
from tests.helpers import tiny_checkpoint, tiny_pack
from tests.hub.calls import ledger_of, weights
from tests.hub.scene import REPO, Scene
from tests.hubserver.machine import Machine


@pytest.fixture
def base(scene: Scene) -> Path:
    """A model with nothing applied."""
    return scene.base


# Signatures are checked by everything that applies


@pytest.fixture
def pack(scene: Scene) -> Path:
    return scene.pack("1.0.0")


@pytest.mark.parametrize("how", [("--in-place",), ("-o", "OUT"), ("--in-place", "--dry-run")])
def test_apply_wants_what_the_policy_wants(scene: Scene, base: Path, pack: Path, how: Sequence[str]) -> None:
    words = ["apply", base, pack, *(scene.folder / "out" if word == "OUT" else word for word in how)]
    before = weights(base)
    save_policy(scene.policy)
    refused = run(*words)
    assert (refused.exit_code, refused.stderr.splitlines()[0]) == (1, "UnsignedError: 1.0.0-0.nest is not signed")
    sign_pack(pack, scene.evil)
    assert run(*words).stderr.startswith("UntrustedError: 1.0.0-0.nest is signed by ")
    assert weights(base) == before
    assert not (scene.folder / "out").exists()
    assert not state_dir_of(base).ledger.exists()
    sign_pack(pack, scene.key)
    assert run(*words).exit_code == 0
    if "--dry-run" not in how:
        done = ledger_of(scene.folder / "out" if "-o" in how else base)
        assert done.applied[0].signers == {"acme": scene.key.public.key_id}


def test_allow_unsigned_forgives_what_is_missing_and_nothing_wrong(scene: Scene, base: Path, pack: Path) -> None:
    save_policy(scene.policy)
    (pack.with_name(pack.name + ".sig")).write_bytes(b"{}")
    wrong = run("apply", base, pack, "--in-place", "--allow-unsigned")
    assert (wrong.exit_code, wrong.stderr.startswith("SignatureFormatError")) == (1, True)
    sign = pack.with_name(pack.name + ".sig")
    sign.unlink()
    other = sign_pack(scene.pack("2.0.0", 3), scene.key).file
    sign.write_bytes(other.read_bytes())
    assert "BadSignatureError" in run("apply", base, pack, "--in-place", "--allow-unsigned").stderr
    sign.unlink()
    done = run("apply", base, pack, "--in-place", "--allow-unsigned")
    assert done.exit_code == 0
    assert "WARNING: --allow-unsigned: 1.0.0-0.nest is not signed" in done.stderr
    assert ledger_of(base).applied[0].signers == {}


def test_a_policy_file_replaces_the_user_s_own(scene: Scene, base: Path, pack: Path, tmp_path: Path) -> None:
    strict = json.dumps(scene.policy.content() | {"rules": [{"model": "*", "require": 1, "keys": ["acme"]}]})
    (tmp_path / "policy.json").write_text(strict, encoding="utf-8")
    words = ("apply", base, pack, "--in-place", "--policy", tmp_path / "policy.json")
    assert run(*words).exit_code == 1
    assert run("apply", base, pack, "--in-place", "--dry-run").exit_code == 0, "nobody is trusted: no signature is needed"
    sign_pack(pack, scene.key)
    assert run(*words).exit_code == 0


def test_what_was_checked_is_what_is_applied(scene: Scene, base: Path, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and its signature are exchanged right after they were checked."""
    from nestpatch import gate

    save_policy(scene.policy)
    signature = sign_pack(pack, scene.key).file
    good, real = nest.read(pack), gate.verify_signature

    def exchanged(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        pack.write_bytes(nest.encode(tiny_pack(base, version="9.9.9", seed=9)))
        signature.write_bytes(b"junk")
        return found

    monkeypatch.setattr(gate, "verify_signature", exchanged)
    assert run("apply", base, pack, "--in-place").exit_code == 0
    assert (nest.read(pack).manifest.version, signature.read_bytes()) == ("9.9.9", b"junk")
    assert ledger_of(base).applied[0].pack_id == nest.pack_id(good)


# Channels


def test_apply_from_a_channel_into_a_copy(scene: Scene, base: Path) -> None:
    save_policy(scene.policy)
    done = answer("apply", base, f"hub://{REPO}", "-o", scene.folder / "copy")
    assert done["pack"] == "no-harm 1.0.0"
    assert weights(scene.folder / "copy") == weights(scene.model)
    assert ledger_of(scene.folder / "copy").follows == (f"hub://{REPO}",)
    scene.publish("1.1.0", 1)
    assert answer("update", scene.folder / "copy")["channels"][0]["after"] == "1.1.0"


def test_pull_tells_who_signed_and_overwrites_nothing(scene: Scene, tmp_path: Path) -> None:
    save_policy(scene.policy)
    told = run("pull", REPO, "-o", tmp_path / "got.nest")
    assert "no-harm 1.0.0 of hub://acme/no-harm, signed by acme" in told.stdout
    (tmp_path / "got.nest").write_bytes(b"mine")
    taken = run("pull", REPO, "-o", tmp_path / "got.nest")
    assert (taken.exit_code, "OutputError" in taken.stderr) == (1, True)
    assert (tmp_path / "got.nest").read_bytes() == b"mine"
    save_policy(Policy())
    assert run("pull", REPO, "-o", tmp_path / "other.nest").exit_code == 1
    forgiven = run("pull", REPO, "-o", tmp_path / "other.nest", "--allow-unsigned")
    assert "not signed by a key that you trust" in forgiven.stdout


def test_nothing_new_is_one_small_request(scene: Scene, machine: Any) -> None:
    """In a process with a fresh home, where huggingface_hub would like to know its callers. bench/update.py takes the time."""
    save_policy(scene.policy)
    fleet: Machine = machine(NESTPATCH_HOME=os.environ["NESTPATCH_HOME"])
    scene.hub.log.clear()
    done = fleet.start("-m", "nestpatch", "update", str(scene.model), "--json", HF_HUB_DISABLE_TELEMETRY="0")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["channels"][0]["state"] == "current"
    (seen,) = scene.hub.log
    assert (seen.method, seen.target) == ("GET", f"/{REPO}/resolve/main/{CHANNEL_FILE}")
    assert seen.sent < 4000


def test_a_channel_without_its_scheme(scene: Scene, base: Path) -> None:
    told = run("apply", base, REPO, "--in-place")
    assert (told.exit_code, "is written hub://owner/name" in told.stderr) == (2, True)


def test_two_updates_at_once_remember_the_newer_channel(scene: Scene) -> None:
    place = f"hub://{REPO}"
    old = recall(place)
    scene.publish("1.1.0", 1)
    scene.update(check=True)
    new = recall(place)
    assert old is not None
    assert new is not None
    with held():
        keep(place, old)
    assert recall(place) == new
    assert new.seen.serial == 2 > old.seen.serial


def test_check_says_with_its_exit_code(scene: Scene) -> None:
    save_policy(scene.policy)
    assert answer("update", scene.model, "--check")["channels"][0]["state"] == "current"
    scene.publish("1.1.0", 1)
    before = scene.state()
    found = answer("update", scene.model, "--check", code=10)["channels"][0]
    assert (found["state"], found["before"], found["after"], found["serial"]) == ("available", "1.0.0", "1.1.0", 2)
    told = run("update", scene.model, "--check")
    assert (told.exit_code, "would go from 1.0.0 to 1.1.0" in told.stdout) == (10, True)
    assert scene.state() == before
    assert "went from 1.0.0 to 1.1.0" in run("update", scene.model).stdout
    assert "1.1.0 is up to date" in run("update", scene.model).stdout
    assert re.search(rf"follows +hub://{REPO}", run("status", scene.model).stdout)


def test_going_back_says_why(scene: Scene) -> None:
    save_policy(scene.policy)
    scene.yank("1.0.0", "breaks [bold]tables[/]")
    told = run("update", scene.model)
    assert "went from 1.0.0 to base (1.0.0 was yanked: breaks [bold]tables[/])" in told.stdout
    assert ledger_of(scene.model).applied == ()
    assert ledger_of(scene.model).follows == (f"hub://{REPO}",)


def test_a_model_at_its_base_can_stop_following(scene: Scene) -> None:
    scene.yank("1.0.0", "bad")
    scene.update()
    assert run("revert", scene.model, "--dry-run").exit_code == 0
    assert ledger_of(scene.model).follows == (f"hub://{REPO}",)
    assert run("revert", scene.model).exit_code == 0
    assert ledger_of(scene.model).follows == ()
    assert "nothing is applied" in run("revert", scene.model).stderr


def test_a_model_that_follows_nothing(scene: Scene, base: Path) -> None:
    save_policy(scene.policy)
    told = run("update", base)
    assert (told.exit_code, "follows no channel" in told.stderr) == (1, True)
    assert "--channel" in told.stderr
    missing = run("update", scene.folder / "none")
    assert (missing.exit_code, missing.stderr.split(":")[0]) == (2, "MissingInputError")
    assert run("update", base, "--channel", "ftp://x").exit_code == 2
    assert answer("update", base, "--channel", REPO)["channels"][0]["after"] == "1.0.0"


def test_other_packs_stay_where_they_are(scene: Scene) -> None:
    """Only the channel's own pack goes, with its signers kept for what was put back on top."""
    save_policy(scene.policy)
    other = tiny_pack(scene.base, name="other", seed=4)
    apply_in_place(scene.model, Proven(other, nest.pack_id(other), Origin({"me": "1" * 64})), allow_overlap=True)
    scene.yank("1.0.0", "bad")
    done = answer("update", scene.model)["channels"][0]
    assert done["steps"] == ["undo other 1.0.0", "undo no-harm 1.0.0", "apply again other 1.0.0"]
    (left,) = ledger_of(scene.model).applied
    assert (left.name, left.signers) == ("other", {"me": "1" * 64})
    apply_in_place(scene.base, other, trust="none")
    assert weights(scene.model) == weights(scene.base)


def test_a_quantized_model_is_updated_from_its_float_base(scene: Scene, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "float", hidden=256, inter=64)
    model = gguf_of(base, tmp_path / "model.gguf", "Q8_0")
    original = model.read_bytes()
    for version, seed in (("1.0.0", 0), ("1.1.0", 1)):
        nest.write(tiny_pack(base, version=version, seed=seed), tmp_path / "new.nest", overwrite=True)
        scene.push(tmp_path / "new.nest", str(tmp_path / "channel"))
        save_policy(scene.policy)
        channel = ("--channel", tmp_path / "channel") if version == "1.0.0" else ()
        assert answer("update", model, "--base", base, *channel)["channels"][0]["after"] == version
    assert "from" in ledger_of(model).applied[0].rounding
    assert run("revert", model).exit_code == 0
    assert model.read_bytes() == original


def test_strength_is_kept(scene: Scene) -> None:
    apply_in_place(scene.model, scene.pack("1.0.0"), strength=0.5, trust="none")
    scene.publish("1.1.0", 1)
    scene.update()
    assert ledger_of(scene.model).applied[0].strength == 0.5


def test_older_ledgers_are_read(scene: Scene) -> None:
    from nestpatch.patcher.ledger import _digest

    file = state_dir_of(scene.model).ledger
    value = json.loads(file.read_text(encoding="utf-8"))
    for field in ("follows", "sha256", "seal"):
        del value[field]
    del value["applied"][0]["signers"]
    file.write_text(json.dumps(value | {"sha256": _digest(value).hex()}), encoding="utf-8")
    found = ledger_of(scene.model)
    assert (found.follows, found.applied[0].signers) == ((), {})
