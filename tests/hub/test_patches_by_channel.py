"""Wherever a command takes a patch, hub://owner/name names one, and the gate stands before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import nestpatch
from nestpatch.channels.follow import follow
from nestpatch.channels.listing import CHANNEL_FILE
from nestpatch.channels.readers import open_reader
from nestpatch.errors import BadSignatureError, ChannelKeyError, SwappedFileError, UnsignedError, UntrustedError
from nestpatch.formats import nest
from nestpatch.gate import look, prove
from nestpatch.pack import utc_now
from nestpatch.signing import store
from nestpatch.signing.store import save_policy
from nestpatch.signing.trust import Policy, Rule, TrustedKey
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, run
from tests.helpers import tree_digest
from tests.hub.calls import key_file
from tests.hub.scene import PATCH, REPO, Scene

CHANNEL = f"hub://{REPO}"


@pytest.fixture(autouse=True)
def trusting(scene: Scene) -> None:
    """The user trusts the publisher."""
    save_policy(scene.policy)


def test_show_verify_and_verify_signature_take_a_channel(scene: Scene) -> None:
    assert answer("show", CHANNEL)["manifest"]["version"] == "1.0.0"
    assert answer("show", f"{CHANNEL}@1.0.0")["pack_id"] == scene.channel.packs[0].file.sha256
    assert answer("verify", scene.model, CHANNEL)["verdict"] == "patched"
    assert answer("verify", scene.base, CHANNEL, code=1)["verdict"] == "base"
    found = answer("verify-signature", CHANNEL, "--model", scene.base)
    assert [signer["name"] for signer in found["signatures"]] == ["acme"]
    public = key_file(scene, scene.evil, "evil").with_suffix(".pub")
    assert run("verify-signature", CHANNEL, "--key", public).exit_code == 1
    assert run("show", f"{CHANNEL}@7.0.0").stderr.startswith("VersionError")


def test_diff_takes_channels_and_files(scene: Scene) -> None:
    scene.publish("1.1.0", seed=1)
    audit = answer("diff", f"{CHANNEL}@1.0.0", f"{CHANNEL}@1.1.0", code=1)
    assert audit["packs"] == ["no-harm 1.0.0", "no-harm 1.1.0"]
    assert answer("diff", scene.pack("1.1.0", 1), CHANNEL)["identical"] is True
    assert answer("diff", f"{CHANNEL}@1.1.0", scene.pack("1.1.0", 1))["identical"] is True
    mixed = run("diff", scene.model, CHANNEL)
    assert (mixed.exit_code, mixed.stderr.partition(":")[0]) == (2, "DataError")
    assert nestpatch.diff(CHANNEL, scene.pack("1.1.0", 1)).identical


@pytest.mark.parametrize(
    ("target", "with_model", "made"),
    [("lora", False, "no-harm-1.0.0-lora"), ("gguf-lora", True, "no-harm-1.0.0-lora.gguf"),
     ("safetensors", True, "base-no-harm-1.0.0-release")],
)  # fmt: skip
def test_export_takes_a_channel(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, target: str, with_model: bool, made: str
) -> None:
    here = scene.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    done = run("export", *([scene.base] if with_model else []), CHANNEL, "--to", target, "--quiet")
    assert (done.exit_code, done.stderr) == (0, "")
    assert (here / made).exists() or (scene.folder / made).exists()


def test_python_takes_a_channel(scene: Scene) -> None:
    assert nestpatch.prove(CHANNEL, scene.base).origin.channel == CHANNEL
    assert nestpatch.export_lora(CHANNEL, scene.folder / "lora").pack == "no-harm 1.0.0"
    with pytest.raises(UnsignedError):
        nestpatch.evaluate(scene.base, [], pack=scene.pack("1.0.0"))


def test_a_swapped_pack_is_shown_by_no_command(scene: Scene) -> None:
    scene.spoil_large(PATCH.format("1.0.0"), nest.encode(nest.read(scene.pack("1.0.0", 7))))
    for words in (["show", CHANNEL], ["verify", scene.base, CHANNEL], ["diff", CHANNEL, CHANNEL, "--quiet"]):
        assert run(*words).stderr.startswith("SwappedFileError"), words
    with pytest.raises(SwappedFileError):
        look(CHANNEL)


def test_a_stranger_s_channel_is_looked_at_and_not_used(scene: Scene) -> None:
    save_policy(Policy((TrustedKey("other", scene.evil.public),)))
    assert answer("show", CHANNEL)["manifest"]["version"] == "1.0.0"
    for words in (["apply", scene.base, CHANNEL, "--in-place"], ["export", CHANNEL, "--to", "lora"]):
        before = tree_digest(scene.base)
        assert run(*words).stderr.startswith("ChannelKeyError")
        assert tree_digest(scene.base) == before


def test_allowing_unsigned_packs_does_not_let_a_channel_past_the_administrator(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "etc" / "trust.json"
    file.parent.mkdir()
    file.write_text(json.dumps(Policy((TrustedKey("audit", scene.evil.public),)).content()), encoding="utf-8")
    monkeypatch.setattr(store, "SYSTEM_FILE", file)
    monkeypatch.setattr(store, "SYSTEM_OWNER", file.stat().st_uid)
    before = tree_digest(scene.base)
    for words in (["apply", scene.base, CHANNEL, "--in-place"], ["pull", REPO, "-o", tmp_path / "x.nest"]):
        refused = run(*words, "--allow-unsigned", "--quiet")
        expected = "UntrustedError: no-harm.nest is signed by acme, who is not trusted for this model"
        assert refused.stderr.startswith(expected), refused.stderr
        assert "requires 1 signature for '*'" in " ".join(refused.stderr.split())
    assert tree_digest(scene.base) == before
    # With the auditor's signature beside the publisher's it passes.
    pack = scene.pack("1.2.0", 2)
    sign_pack(pack, scene.evil)
    scene.push(pack)
    assert run("apply", scene.base, CHANNEL, "--in-place").exit_code == 0


def test_the_same_name_and_another_base_do_not_make_a_channel_key_count(scene: Scene) -> None:
    """Its versions say that they are for tiny/llama."""

    def with_scope(*models: str) -> Policy:
        return Policy((TrustedKey("acme", scene.key.public, models),))

    for scope in ("tiny/*", str(scene.base), "*"):
        assert follow(open_reader(REPO), with_scope(scope), scene.base).accepted.channel.packs[0].name == "no-harm"
    for scope in ("acme/*", "Tiny/*", str(scene.folder / "elsewhere")):
        with pytest.raises(ChannelKeyError):
            follow(open_reader(REPO), with_scope(scope), scene.base)
        with pytest.raises(ChannelKeyError):
            prove(CHANNEL, scene.base, policy=with_scope(scope))


def test_a_rule_for_the_packs_base_holds_for_channels(scene: Scene) -> None:
    keys = (*scene.policy.keys, TrustedKey("audit", scene.evil.public))
    strict = Policy(keys, (Rule("tiny/*", 2), Rule("*", 1)))
    with pytest.raises(UntrustedError, match="signed by 1 of the 2 keys"):
        prove(CHANNEL, scene.base, policy=strict)
    assert prove(CHANNEL, scene.base, policy=Policy(keys, (Rule("other/*", 2), Rule("*", 1)))).origin.signers == {
        "acme": scene.key.public.key_id
    }


def test_pull_and_update_without_a_trust_list_say_that_nothing_was_checked(scene: Scene, tmp_path: Path) -> None:
    save_policy(Policy())
    for more in ([], ["--json"], ["--quiet"]):
        done = run("pull", REPO, "-o", tmp_path / f"{len(more)}{more}.nest", "--allow-unsigned", *more)
        assert done.exit_code == 0, done.stderr
        line = "no key is trusted on this machine: the signature of no-harm 1.0.0 was not checked (nestpatch trust add)"
        assert done.stderr.count(line) == 1
    done = run("update", scene.model, "--allow-unsigned", "--quiet")
    assert (done.exit_code, done.stderr.count("was not checked (nestpatch trust add)")) == (0, 1)
    assert run("update", scene.model).stderr.startswith("ChannelKeyError"), "without leave nothing is fetched"


def test_a_wrong_signature_in_a_channel_is_an_error_for_who_only_looks(scene: Scene) -> None:
    """The pack is signed with the publisher's key, or so its signature says."""
    pack = scene.pack("1.3.0", 3)
    signature = sign_pack(pack, scene.evil).file
    text = signature.read_bytes().replace(scene.evil.public.key_id.encode(), scene.key.public.key_id.encode())
    signature.unlink()
    scene.push(pack)
    bad = pack.with_name("bad.sig")
    bad.write_bytes(text)
    listed = next(p for p in scene.channel.packs if p.version == "1.3.0").signatures[0]
    changed = type(listed)(listed.path, len(text), nest.sha256(text).hexdigest())
    scene.put(**{listed.path: text, CHANNEL_FILE: scene.resign(scene.listed("1.3.0", signatures=(changed,)), now=utc_now())})
    with pytest.raises(BadSignatureError):
        look(CHANNEL)
    assert run("show", CHANNEL).stderr.startswith("BadSignatureError")
