"""The commands: what they ask for, what they print, their exit codes, and that a wrong signature stops every one of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nestpatch.cli import main
from nestpatch.errors import ChannelKeyError, UntrustedError
from nestpatch.formats import nest
from nestpatch.hub.card import MARK, model_card
from nestpatch.hub.follow import update
from nestpatch.hub.listing import CHANNEL_FILE, parse
from nestpatch.hub.release import add, listed, new_channel
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.ledger import Ledger, Origin, read_ledger
from nestpatch.patcher.place import place_of
from nestpatch.signing.keys import PrivateKey, generate
from nestpatch.signing.trust import Policy, TrustedKey, load_policy, save_policy
from nestpatch.signing.verify import sign_pack
from tests.helpers import tiny_pack, weight_files
from tests.hub.scene import REPO, Scene
from tests.hubserver.machine import Machine


def run(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert "Traceback" not in result.stderr
    return result


def answer(*words: object, code: int = 0) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def key_file(scene: Scene, key: PrivateKey, name: str) -> Path:
    file = scene.folder / f"{name}.key"
    file.write_bytes(key.pem(None))
    file.with_suffix(".pub").write_text(key.public.pem, encoding="ascii")
    return file


def ledger_of(model: Path) -> Ledger:
    return read_ledger(place_of(model).ledger)


def weights(model: Path) -> list[str]:
    return [sha256(file.read_bytes()).hexdigest() for file in weight_files(model)]


@pytest.fixture
def base(scene: Scene) -> Path:
    """A model with nothing applied."""
    return scene.base


# Signatures are checked by everything that applies


@pytest.fixture
def patch(scene: Scene) -> Path:
    return scene.pack("1.0.0")


@pytest.mark.parametrize("how", [("--in-place",), ("-o", "OUT"), ("--in-place", "--dry-run")])
def test_apply_wants_what_the_policy_wants(scene: Scene, base: Path, patch: Path, how: Sequence[str]) -> None:
    words = ["apply", base, patch, *(scene.folder / "out" if word == "OUT" else word for word in how)]
    before = weights(base)
    save_policy(scene.policy)
    refused = run(*words)
    assert (refused.exit_code, refused.stderr.splitlines()[0]) == (1, "UnsignedError: 1.0.0-0.nest is not signed")
    sign_pack(patch, scene.evil)
    assert run(*words).stderr.startswith("UntrustedError: 1.0.0-0.nest is signed by ")
    assert weights(base) == before
    assert not (scene.folder / "out").exists()
    assert not place_of(base).ledger.exists()
    sign_pack(patch, scene.key)
    assert run(*words).exit_code == 0
    if "--dry-run" not in how:
        done = ledger_of(scene.folder / "out" if "-o" in how else base)
        assert done.applied[0].signers == {"acme": scene.key.public.key_id}


def test_allow_unsigned_forgives_what_is_missing_and_nothing_wrong(scene: Scene, base: Path, patch: Path) -> None:
    save_policy(scene.policy)
    (patch.with_name(patch.name + ".sig")).write_bytes(b"{}")
    wrong = run("apply", base, patch, "--in-place", "--allow-unsigned")
    assert (wrong.exit_code, wrong.stderr.startswith("SignatureFormatError")) == (1, True)
    sign = patch.with_name(patch.name + ".sig")
    sign.unlink()
    other = sign_pack(scene.pack("2.0.0", 3), scene.key).file
    sign.write_bytes(other.read_bytes())
    assert "BadSignatureError" in run("apply", base, patch, "--in-place", "--allow-unsigned").stderr
    sign.unlink()
    done = run("apply", base, patch, "--in-place", "--allow-unsigned")
    assert done.exit_code == 0
    assert "WARNING: --allow-unsigned: 1.0.0-0.nest is not signed" in done.stderr
    assert ledger_of(base).applied[0].signers == {}


def test_a_policy_file_replaces_the_user_s_own(scene: Scene, base: Path, patch: Path, tmp_path: Path) -> None:
    strict = json.dumps(scene.policy.as_json() | {"rules": [{"model": "*", "require": 1, "keys": ["acme"]}]})
    (tmp_path / "policy.json").write_text(strict, encoding="utf-8")
    words = ("apply", base, patch, "--in-place", "--policy", tmp_path / "policy.json")
    assert run(*words).exit_code == 1
    assert run("apply", base, patch, "--in-place", "--dry-run").exit_code == 0, "nobody is trusted: no signature is needed"
    sign_pack(patch, scene.key)
    assert run(*words).exit_code == 0


def test_what_was_checked_is_what_is_applied(scene: Scene, base: Path, patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is exchanged right after its signature was checked."""
    from nestpatch.signing import verify

    save_policy(scene.policy)
    sign_pack(patch, scene.key)
    good, real = nest.read(patch), verify.verify_signature

    def exchanged(*arguments: Any, **options: Any) -> verify.Outcome:
        found = real(*arguments, **options)
        patch.write_bytes(nest.encode(tiny_pack(base, version="9.9.9", seed=9)))
        return found

    monkeypatch.setattr(verify, "verify_signature", exchanged)
    assert run("apply", base, patch, "--in-place").exit_code == 0
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
    scene.withdraw("1.0.0", "breaks [bold]tables[/]")
    told = run("update", scene.model)
    assert "went from 1.0.0 to base (1.0.0 was revoked: breaks [bold]tables[/])" in told.stdout
    assert ledger_of(scene.model).applied == ()
    assert ledger_of(scene.model).follows == (f"hub://{REPO}",)


def test_a_model_that_follows_nothing(scene: Scene, base: Path) -> None:
    save_policy(scene.policy)
    told = run("update", base)
    assert (told.exit_code, "follows no channel" in told.stderr) == (1, True)
    assert "--channel" in told.stderr
    missing = run("update", scene.folder / "none")
    assert (missing.exit_code, missing.stderr.split(":")[0]) == (1, "CheckpointFormatError")
    assert run("update", base, "--channel", "ftp://x").exit_code == 2
    assert answer("update", base, "--channel", REPO)["channels"][0]["after"] == "1.0.0"


def test_other_packs_stay_where_they_are(scene: Scene) -> None:
    """Only the channel's own pack goes, with its signers kept for what was put back on top."""
    save_policy(scene.policy)
    other = tiny_pack(scene.base, name="other", seed=4)
    apply_in_place(scene.model, other, allow_overlap=True, origin=Origin({"me": "1" * 64}))
    scene.withdraw("1.0.0", "bad")
    done = answer("update", scene.model)["channels"][0]
    assert done["steps"] == ["undo other 1.0.0", "undo no-harm 1.0.0", "apply again other 1.0.0"]
    (left,) = ledger_of(scene.model).applied
    assert (left.name, left.signers) == ("other", {"me": "1" * 64})
    apply_in_place(scene.base, other)
    assert weights(scene.model) == weights(scene.base)


def test_strength_is_kept(scene: Scene) -> None:
    apply_in_place(scene.model, scene.pack("1.0.0"), strength=0.5)
    scene.publish("1.1.0", 1)
    scene.update()
    assert ledger_of(scene.model).applied[0].strength == 0.5


def test_older_ledgers_are_read(scene: Scene) -> None:
    from nestpatch.patcher.ledger import _digest

    file = place_of(scene.model).ledger
    value = json.loads(file.read_text(encoding="utf-8"))
    for field in ("follows", "sha256"):
        del value[field]
    del value["applied"][0]["signers"]
    file.write_text(json.dumps(value | {"sha256": _digest(value)}), encoding="utf-8")
    found = ledger_of(scene.model)
    assert (found.follows, found.applied[0].signers) == ((), {})


# Publishing


def test_push_yank_and_renew(scene: Scene) -> None:
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        done = answer("push", scene.pack("1.1.0", 1), REPO, *key)
        assert (done["serial"], done["tag"], done["latest"]) == (2, "v1.1.0", "1.1.0")
        assert scene.repo.resolve("v1.1.0") == done["version"] == scene.repo.resolve("main")
        assert "VersionError" in run("push", scene.pack("1.1.0", 1), REPO, *key).stderr
        assert run("yank", REPO, "1.1.0", *key).exit_code == 2, "a reason is needed"
        assert answer("yank", REPO, "1.1.0", "--reason", "why", *key)["latest"] == "1.0.0"
        long = answer("renew", REPO, *key, "--days", 400)
        assert long["serial"] == 4
        assert long["expires"] > done["expires"]
        told = run("renew", REPO, *key)
        assert "renew the channel" in told.stdout


def test_a_private_repository_is_made_private(scene: Scene) -> None:
    with scene.as_publisher():
        answer("push", scene.pack("1.0.0"), "acme/secret", "--key", key_file(scene, scene.key, "acme"), "--private")
    assert scene.hub.accounts.of("model", "acme/secret").private


def test_a_second_signer_goes_along(scene: Scene) -> None:
    """2 of 2: the publisher's tool signs with the channel's key, somebody else signed the file before."""
    audit, file = generate(), scene.pack("1.1.0", 1)
    rules = {"rules": [{"model": "*", "require": 2, "keys": ["acme", "audit"]}]}
    policy = Policy((*scene.policy.keys, TrustedKey("audit", audit.public)))
    (scene.folder / "two.json").write_text(json.dumps(policy.as_json() | rules), encoding="utf-8")
    strict = load_policy(scene.folder / "two.json")
    sign_pack(file, audit)
    scene.push(file)
    assert [f.name for f in scene.channel.patches[1].signatures] == [
        "no-harm.nest.sig", f"no-harm.nest.{scene.key.public.key_id[:12]}.sig",
    ]  # fmt: skip
    (done,) = update(scene.model, strict)
    assert done.after == "1.1.0"
    assert set(ledger_of(scene.model).applied[0].signers) == {"acme", "audit"}
    scene.publish("1.2.0", 2)
    with pytest.raises(UntrustedError, match="signed by 1 of the 2 keys"):
        update(scene.model, strict)


def test_a_wrong_signature_is_not_published(scene: Scene) -> None:
    file = scene.pack("1.1.0", 1)
    sign_pack(scene.pack("1.2.0", 2), scene.key).file.rename(f"{file}.sig")
    with scene.as_publisher():
        told = run("push", file, REPO, "--key", key_file(scene, scene.key, "acme"))
    assert (told.exit_code, told.stderr.startswith("BadSignatureError")) == (1, True)
    assert scene.channel.serial == 1


def test_the_root_key_is_rotated(scene: Scene) -> None:
    """The fleet trusts the old key alone; it follows on its own, and goes back to versions from before."""
    old, new = key_file(scene, scene.key, "acme"), key_file(scene, generate(), "acme-2")
    scene.publish("1.1.0", 1)
    with scene.as_publisher():
        assert answer("renew", REPO, "--key", old, "--new-key", new)["serial"] == 3
        told = run("push", scene.pack("1.2.0", 2), REPO, "--key", old)
        assert "has the root key" in told.stderr
        answer("push", scene.pack("1.2.0", 2), REPO, "--key", new)
    assert scene.update().after == "1.2.0"
    (entry,) = ledger_of(scene.model).applied
    assert list(entry.signers) == ["acme"], "under the name that the user gave the line of keys"
    assert entry.signers["acme"] == scene.channel.root.key_id != scene.key.public.key_id
    with scene.as_publisher():
        answer("yank", REPO, "1.2.0", "--reason", "bad", "--key", new)
    assert scene.update().after == "1.1.0", "signed by the old key, and signed anew when the channel was handed over"
    only_new = Policy((TrustedKey("acme", scene.channel.root),))
    assert update(scene.model, only_new)[0].state == "current"
    with pytest.raises(ChannelKeyError):
        update(scene.model, Policy())


def test_passwords_of_two_keys_come_from_one_file(scene: Scene) -> None:
    old, new = key_file(scene, scene.key, "acme"), scene.folder / "new.key"
    old.write_bytes(scene.key.pem(b"one"))
    new.write_bytes(generate().pem(b"two"))
    (scene.folder / "passwords").write_text("one\ntwo\n", encoding="utf-8")
    with scene.as_publisher():
        words = ("renew", REPO, "--key", old, "--new-key", new, "--password-file", scene.folder / "passwords")
        assert answer(*words)["serial"] == 2


# The model card


def test_the_card(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.withdraw("1.1.0", "broke | tables\n<script>")
    text = scene.read("README.md").decode()
    head, body = text.removeprefix("---\n").split("---\n", 1)
    import yaml

    facts = yaml.safe_load(head)
    assert facts == {
        "library_name": "nestpatch",
        "tags": ["nestpatch", "safety-patch", "test"],
        "license": "apache-2.0",
        "base_model": "tiny/llama",
        "base_model_relation": "adapter",
    }
    assert MARK in body
    assert "| 1.0.0 | latest |  | `" in body
    assert r"| 1.1.0 | revoked | broke \| tables \<script\> |" in body
    assert scene.key.public.key_id in body


def test_the_card_s_evaluation_table(scene: Scene) -> None:
    from dataclasses import replace

    pack = nest.read(scene.pack("1.0.0"))
    share = {"value": 0.525, "count": 63, "total": 120}
    evaluation = {
        "before": {"attack_success": share, "suites": {}},
        "after": {"attack_success": share | {"value": 0.017, "count": 2}},
    }
    manifest = replace(pack.manifest, evaluation=evaluation, base=replace(pack.manifest.base, model_id="../local"))
    channel = add(new_channel("acme/x", scene.key.public), listed(manifest, b"x", {})[0])
    text = model_card(channel, manifest)
    assert "| attack success | 52.5% (63 of 120) | 1.7% (2 of 120) |" in text
    assert "base_model" not in text, "no id of the Hub"
    assert "## Evaluation" not in model_card(channel, replace(manifest, evaluation={"before": 1, "after": {"x": []}}))


def test_the_channel_file_is_as_documented(scene: Scene) -> None:
    envelope = json.loads(scene.read(CHANNEL_FILE))
    assert sorted(envelope) == ["payload", "payloadType", "signatures"]
    found, _ = parse(scene.read(CHANNEL_FILE), "it")
    payload = json.loads(found.payload)
    assert sorted(payload) == ["expires", "format", "issued", "name", "patches", "root", "serial", "successions"]
    assert sorted(payload["patches"][0]) == [
        "base", "id", "path", "reason", "sha256", "signatures", "size", "status", "supersedes", "version",
    ]  # fmt: skip
