"""What a publisher does: push, yank, renew, hand the channel to a new key; and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nestpatch.channels._release import MARK, add, listed, model_card
from nestpatch.channels.listing import CHANNEL_FILE, Channel, parse
from nestpatch.errors import ChannelKeyError, UntrustedError
from nestpatch.formats import nest
from nestpatch.signing.keys import PrivateKey
from nestpatch.signing.store import load_policy
from nestpatch.signing.trust import Policy, TrustedKey
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, run
from tests.hub.calls import key_file, ledger_of
from tests.hub.scene import REPO, Scene, updated


def test_push_yank_and_renew(scene: Scene) -> None:
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        done = answer("push", scene.pack("1.1.0", 1), REPO, *key)
        assert (done["serial"], done["tag"], done["latest"]) == (2, "v1.1.0", "1.1.0")
        assert scene.repo.resolve("v1.1.0") == done["revision"] == scene.repo.resolve("main")
        assert "VersionError" in run("push", scene.pack("1.1.0", 3), REPO, *key).stderr
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
    audit, file = PrivateKey.generate(), scene.pack("1.1.0", 1)
    rules = {"rules": [{"model": "*", "require": 2, "keys": ["acme", "audit"]}]}
    policy = Policy((*scene.policy.keys, TrustedKey("audit", audit.public)))
    (scene.folder / "two.json").write_text(json.dumps(policy.content() | rules), encoding="utf-8")
    strict = load_policy(scene.folder / "two.json")
    sign_pack(file, audit)
    scene.push(file)
    assert [f.name for f in scene.channel.packs[1].signatures] == [
        "no-harm.nest.sig", f"no-harm.nest.{scene.key.public.key_id[:12]}.sig",
    ]  # fmt: skip
    (done,) = updated(scene.model, strict)
    assert done.after == "1.1.0"
    assert set(ledger_of(scene.model).applied[0].signers) == {"acme", "audit"}
    scene.publish("1.2.0", 2)
    with pytest.raises(UntrustedError, match="signed by 1 of the 2 keys"):
        updated(scene.model, strict)


def test_the_same_pack_again_is_published_already(scene: Scene) -> None:
    """From a pipeline that runs twice: no new number, no commit, no error."""
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        done = answer("push", scene.pack("1.1.0", 1), REPO, *key)
        commit = scene.repo.resolve("main")
        assert answer("push", scene.pack("1.1.0", 1), REPO, *key) == {
            **done, "message": "no-harm 1.1.0 is already published", "tag": "", "changed": False,
        }  # fmt: skip
        assert "no-harm 1.1.0 is already published" in run("push", scene.pack("1.1.0", 1), REPO, *key).stdout
        folder = f"file://{scene.folder / 'shared'}"
        for serial in (1, 1):
            assert answer("push", scene.pack("1.1.0", 1), folder, *key)["serial"] == serial
    assert scene.repo.resolve("main") == commit


def test_a_pack_that_its_publisher_signs_after_the_push_is_published_already(scene: Scene) -> None:
    """Two signatures of one key differ, and the channel's key has signed it when it was pushed."""
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        file = scene.pack("1.1.0", 1)
        serial = answer("push", file, REPO, *key)["serial"]
        sign_pack(file, scene.key)
        again = answer("push", file, REPO, *key)
        assert (again["changed"], again["serial"]) == (False, serial)
        audit = sign_pack(file, PrivateKey.generate()).file
        assert "VersionError" in run("push", file, REPO, *key).stderr, "a second signer's would not be published"
        audit.unlink()


def test_the_same_pack_with_another_signature_or_after_its_withdrawal_is_refused(scene: Scene) -> None:
    """Else a second signer would believe that the signature was published."""
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        file = scene.pack("1.0.0")
        sign_pack(file, PrivateKey.generate())
        told = run("push", file, REPO, *key)
        assert (told.exit_code, "VersionError: acme/no-harm has no-harm 1.0.0 already" in told.stderr) == (1, True)
        answer("yank", REPO, "1.0.0", "--reason", "bad", *key)
        file.with_name(file.name + ".sig").unlink()
        told = run("push", file, REPO, *key)
        assert (told.exit_code, "VersionError" in told.stderr) == (1, True)


def test_one_channel_is_not_started_twice(scene: Scene) -> None:
    """Two folders that count apart would look to readers of both like an old copy, or like two truths."""
    key = ("--key", key_file(scene, scene.key, "acme"))
    with scene.as_publisher():
        answer("push", scene.pack("1.0.0"), scene.folder / "one", *key)
        told = run("push", scene.pack("1.0.0"), scene.folder / "two", *key)
        assert (
            told.exit_code,
            "PublishError: this key has the channel no-harm, number 1, at another address" in told.stderr,
        ) == (
            1,
            True,
        )


def test_a_wrong_signature_is_not_published(scene: Scene) -> None:
    file = scene.pack("1.1.0", 1)
    sign_pack(scene.pack("1.2.0", 2), scene.key).file.rename(f"{file}.sig")
    with scene.as_publisher():
        told = run("push", file, REPO, "--key", key_file(scene, scene.key, "acme"))
    assert (told.exit_code, told.stderr.startswith("BadSignatureError")) == (1, True)
    assert scene.channel.serial == 1


def test_the_root_key_is_rotated(scene: Scene) -> None:
    """The fleet trusts the old key alone; it follows on its own, and goes back to versions from before."""
    old, new = key_file(scene, scene.key, "acme"), key_file(scene, PrivateKey.generate(), "acme-2")
    scene.publish("1.1.0", 1)
    with scene.as_publisher():
        assert answer("renew", REPO, "--key", old, "--new-key", new)["serial"] == 1
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
    assert updated(scene.model, only_new)[0].state == "current"
    with pytest.raises(ChannelKeyError):
        updated(scene.model, Policy())


def test_passwords_of_two_keys_come_from_one_file(scene: Scene) -> None:
    old, new = key_file(scene, scene.key, "acme"), scene.folder / "new.key"
    old.write_bytes(scene.key.pem(b"one"))
    new.write_bytes(PrivateKey.generate().pem(b"two"))
    (scene.folder / "passwords").write_text("one\ntwo\n", encoding="utf-8")
    with scene.as_publisher():
        words = ("renew", REPO, "--key", old, "--new-key", new, "--password-file", scene.folder / "passwords")
        assert answer(*words)["serial"] == 1


# The model card


def test_the_card(scene: Scene) -> None:
    scene.publish("1.1.0", 1)
    scene.yank("1.1.0", "broke | tables\n<script>")
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
    assert r"| 1.1.0 | yanked | broke \| tables \<script\> |" in body
    assert scene.key.public.key_id in body


def test_the_card_of_a_folder_names_an_address_that_can_be_used(scene: Scene, shared: Path) -> None:
    """Its channel has no name on the Hub, and its readers another path than its publisher."""
    text = (shared / "README.md").read_text(encoding="utf-8")
    assert "nestpatch apply path/to/model file:///path/to/this/folder --in-place" in text
    assert "`file:///path/to/this/folder` stands for the path of this folder on your machine" in text
    assert "hub://" not in text
    assert str(scene.folder) not in text
    card = scene.read("README.md").decode()
    assert f"nestpatch apply path/to/model hub://{REPO} --in-place" in card
    assert "file://" not in card


def test_the_card_s_evaluation_table(scene: Scene) -> None:
    from dataclasses import replace

    pack = nest.read(scene.pack("1.0.0"))
    share = {"value": 0.525, "count": 63, "total": 120}
    evaluation = {
        "before": {"attack_success": share, "suites": {}},
        "after": {"attack_success": share | {"value": 0.017, "count": 2}},
    }
    manifest = replace(pack.manifest, evaluation=evaluation, base=replace(pack.manifest.base, model_id="../local"))
    channel = add(Channel("acme/x", scene.key.public), listed(manifest, b"x", {})[0])
    text = model_card(channel, manifest, "hub://acme/x")
    assert "| attack success | 52.5% (63 of 120) | 1.7% (2 of 120) |" in text
    assert "base_model" not in text, "no id of the Hub"
    assert "## Evaluation" not in model_card(
        channel, replace(manifest, evaluation={"before": 1, "after": {"x": []}}), "hub://acme/x"
    )


def test_the_channel_file_is_as_documented(scene: Scene) -> None:
    envelope = json.loads(scene.read(CHANNEL_FILE))
    assert sorted(envelope) == ["payload", "payloadType", "signatures"]
    found, _ = parse(scene.read(CHANNEL_FILE), "it")
    payload = json.loads(found.payload)
    assert sorted(payload) == ["expires", "format", "issued", "name", "packs", "root", "serial", "successions"]
    assert sorted(payload["packs"][0]) == [
        "base", "name", "path", "reason", "sha256", "signatures", "size", "status", "supersedes", "version",
    ]  # fmt: skip
