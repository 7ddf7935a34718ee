"""Kept packs, their signatures, and the names that refer to them: nothing is used unchecked, and no path leads outside."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher._journal import MAGIC, Region, write_journal
from nestpatch.patcher.ledger import read_ledger
from nestpatch.signing import envelopes
from nestpatch.signing.machine import seal
from tests.calls import answer, refused, run
from tests.helpers import tree_digest
from tests.state import forging
from tests.state.conftest import Scene
from tests.state.forging import based

NAMES = {
    # Invalid as a pack id, a transaction or the name of an undo record
    "a path that leads out": "../../outside",
    "an absolute path": "/outside",
    "a NUL": "0" * 63 + "\0",
    "nothing": "",
    "capitals": "A" * 64,
    "digits of another script": "\N{FULLWIDTH DIGIT ZERO}" * 64,
    "a line end": "0" * 64 + "\n",
    "one too many": "0" * 65,
    "a path of hex": "0" * 16 + "/" + "0" * 47,
}


@pytest.fixture
def patched(plain: Scene) -> tuple[Scene, Path]:
    """A model with acme's pack, and files of the same names outside of it; returns the pack's file."""
    plain.trust(acme=plain.acme)
    file = plain.write(plain.pack(), plain.acme)
    assert run("apply", plain.model, file, "--in-place").exit_code == 0
    for ending in (".nest", ".undo", ".nest.sig"):
        (plain.folder.parent / f"outside{ending}").write_bytes(file.read_bytes())
    return plain, file


def outside(scene: Scene) -> dict[str, str]:
    """The files outside the models."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in scene.folder.parent.iterdir() if file.is_file()}


def commands(file: Path) -> list[list[object]]:
    """All commands that would use what the ledger names."""
    return [["verify"], ["status"], ["revert"], ["revert", "--to", "1.0.0"], ["apply", file, "--in-place"],
            ["export", "--to", "safetensors", "-o", file.with_name("release")]]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["pack_id", "transaction", "supersedes", "roots", "signers", "history", "last"])
def test_names_in_a_ledger_that_nestpatch_never_gives_lead_nowhere(patched: tuple[Scene, Path], where: str, name: str) -> None:
    scene, file = patched
    text = NAMES[name]
    good = forging.content(scene.state_dir)
    entry, (event,) = good["applied"][0], good["history"]
    lies = {
        "pack_id": {"applied": [entry | {"pack_id": text}]},
        "transaction": {"applied": [entry | {"transaction": text}]},
        "supersedes": {"applied": [entry | {"supersedes": [text]}]},
        "roots": {"applied": [entry | {"roots": [text]}]},
        "signers": {"applied": [entry | {"signers": {"acme": text}}]},
        "history": {"history": [event | {"pack_id": text}]},
        "last": {"transaction": text},
    }
    if where == "last" and not text:
        return  # no transaction was committed yet
    forging.write_ledger(scene.state_dir, good | lies[where])
    before, rest = tree_digest(scene.folder), outside(scene)
    for words in commands(file):
        refused("LedgerError", words[0], scene.model, *words[1:])
    assert (tree_digest(scene.folder), outside(scene)) == (before, rest)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("part", ["makes", "retires", "transaction"])
@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_journal_that_nestpatch_never_gives_lead_nowhere(
    patched: tuple[Scene, Path], part: str, name: str, *, sealed: bool
) -> None:
    """Not even with the seal of this machine."""
    scene, _ = patched
    checkpoint = open_checkpoint(scene.model)
    regions = [Region(checkpoint.info(delta.name), delta.rows.astype("int64")) for delta in scene.pack()]
    write_journal(scene.state_dir, "a" * 16, checkpoint, regions)
    data = scene.state_dir.journal.read_bytes()[:-64]
    (length,) = struct.unpack("<Q", data[len(MAGIC) : len(MAGIC) + 8])
    start = len(MAGIC) + 8
    header = json.loads(data[start : start + length])
    header[part] = NAMES[name] if part == "transaction" else [NAMES[name]]
    text = json.dumps(header).encode()
    body = MAGIC + struct.pack("<Q", len(text)) + text + data[start + length :]
    digest = sha256(body).digest()
    mark = bytes.fromhex(seal("journal", scene.state_dir.folder, digest)) if sealed else bytes(32)
    scene.state_dir.journal.write_bytes(body + digest + mark)
    before, rest = tree_digest(scene.folder), outside(scene)
    for words in (["recover"], ["recover", "--foreign", "roll-back"], ["revert"]):
        refused("JournalError", words[0], scene.model, *words[1:])
    assert (tree_digest(scene.folder), outside(scene)) == (before, rest)
    assert answer("recover", scene.model, "--foreign", "remove")["action"] == "removed"
    assert outside(scene) == rest


# Damaged copies


def _link(kept: Path, scene: Scene) -> None:
    target = scene.folder.parent / "elsewhere.nest"
    target.write_bytes(kept.read_bytes())
    kept.unlink()
    kept.symlink_to(target)


def _dangling(kept: Path, scene: Scene) -> None:
    kept.unlink()
    kept.symlink_to(scene.folder.parent / "nowhere.nest")


def _pipe(kept: Path, _: Scene) -> None:
    kept.unlink()
    os.mkfifo(kept)


def _flipped(kept: Path, _: Scene) -> None:
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Scene], object]] = {
    "missing": lambda kept, _: kept.unlink(),
    "empty": lambda kept, _: kept.write_bytes(b""),
    "cut": lambda kept, _: kept.write_bytes(kept.read_bytes()[:-1]),
    "longer": lambda kept, _: kept.write_bytes(kept.read_bytes() + b"x"),
    "flipped": _flipped,
    "another valid pack": lambda kept, scene: kept.write_bytes(nest.encode(scene.pack(seed=5))),
    "a link to the right bytes": _link,
    "a link to nothing": _dangling,
    "a pipe": _pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("foreign", [False, True])
def test_a_damaged_copy_is_refused_by_name_and_written_anew_by_apply(scene: Scene, damage: str, *, foreign: bool) -> None:
    scene.trust(acme=scene.acme)
    original, file = scene.weights(), scene.write(scene.pack(), scene.acme)
    assert run("apply", scene.model, file, "--in-place", *based(scene)).exit_code == 0
    got = scene.sent() if foreign else scene
    kept = got.state_dir.pack(nest.pack_id(scene.pack()))
    DAMAGE[damage](kept, got)
    before, rest = got.weights(), outside(got)
    said = refused("UndoError", "revert", got.model, *based(scene))
    assert kept.name in said
    assert "nestpatch apply MODEL PACK --in-place restores the copy" in said
    for words in (["verify"], ["apply", scene.write(scene.pack(version="1.1.0"), scene.acme), "--in-place", *based(scene)]):
        assert kept.name in refused("UndoError", words[0], got.model, *words[1:])
    assert not answer("status", got.model, code=1)["sound"]
    assert got.weights() == before
    assert run("apply", got.model, file, "--in-place", *based(scene)).exit_code == 0
    assert got.weights() == before
    assert not kept.is_symlink()
    assert kept.read_bytes() == file.read_bytes()
    assert rest.items() <= outside(got).items()
    assert run("revert", got.model, *based(scene)).exit_code == 0
    assert got.weights() == original


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_in_place_of_the_copy_is_refused_by_name(patched: tuple[Scene, Path], *, full: bool) -> None:
    scene, file = patched
    kept = scene.state_dir.pack(nest.pack_id(scene.pack()))
    kept.unlink()
    kept.mkdir()
    if full:
        (kept / "x").touch()
    before = scene.weights()
    assert kept.name in refused("UndoError", "revert", scene.model)
    result = run("apply", scene.model, file, "--in-place")
    assert result.exit_code == 1
    assert kept.name in result.stderr
    assert "What to do: " in result.stderr
    assert scene.weights() == before


def test_a_copy_that_is_called_otherwise_is_refused(scene: Scene) -> None:
    scene.trust(acme=scene.acme)
    file = scene.write(scene.pack(), scene.acme)
    assert run("apply", scene.model, file, "--in-place", *based(scene)).exit_code == 0
    before = scene.weights()
    for lie in ({"name": "no-spam"}, {"version": "99.0.0"}):
        got = scene.sent(f"sent-{min(lie)}")
        forging.edit(got.state_dir, lambda value, lie=lie: value["applied"][0].update(lie))  # type: ignore[misc]
        for words in (["revert"], ["verify"], ["apply", file, "--in-place", *based(scene)]):
            refused("LedgerError", words[0], got.model, *words[1:])
        assert got.weights() == before


# Signatures beside the copies


def _signature(scene: Scene) -> Path:
    kept = scene.state_dir.pack(nest.pack_id(scene.pack()))
    return kept.with_name(f"{kept.name}.sig")


def _another(scene: Scene) -> bytes:
    other = scene.write(scene.pack("other", seed=8), scene.acme)
    return other.with_name(f"{other.name}.sig").read_bytes()


def _evils(scene: Scene) -> bytes:
    return envelopes.Bundle.write(nest.pack_id(scene.pack()), "no-harm.nest", scene.evil)


SIGNATURES: dict[str, Callable[[Path, Scene], object]] = {
    "missing": lambda file, _: file.unlink(),
    "empty": lambda file, _: file.write_bytes(b""),
    "cut": lambda file, _: file.write_bytes(file.read_bytes()[:-9]),
    "for another pack": lambda file, scene: file.write_bytes(_another(scene)),
    "by a key that nobody trusts": lambda file, scene: file.write_bytes(_evils(scene)),
    "a pipe": _pipe,
    "a link to nothing": _dangling,
    "a folder": lambda file, _: (file.unlink(), file.mkdir()),
    "without end": lambda file, _: os.truncate(file, 1 << 40),
    "a hundred": lambda file, _: [
        file.with_name(f"{file.name.removesuffix('.sig')}.{number:012x}.sig").write_bytes(b"{}") for number in range(100)
    ],
}


@pytest.mark.parametrize("case", SIGNATURES)
def test_a_signature_that_is_none_proves_nothing(patched: tuple[Scene, Path], case: str) -> None:
    """The pack of a model that came from elsewhere then counts as unsigned: it is neither undone nor reported as signed."""
    scene, _ = patched
    got = scene.sent()
    SIGNATURES[case](_signature(got), got)
    before = got.weights()
    result = run("revert", got.model)
    assert result.exit_code == 1
    assert result.stderr.split(":")[0] in {"UnsignedError", "UntrustedError", "BadSignatureError", "SignatureFormatError"}
    assert got.weights() == before
    (entry,) = answer("status", got.model)["applied"]
    assert (entry["signers"], entry["claims"]) == ({}, ["acme"])
    assert answer("verify", got.model, code=1)["verdict"] == "unknown"
    result = run("apply", got.model, scene.write(scene.pack(version="1.1.0"), scene.acme), "--in-place")
    assert result.exit_code == 1
    assert got.weights() == before
    # On the machine that checked it when it was applied, it still counts.
    SIGNATURES[case](_signature(scene), scene)
    assert answer("verify", scene.model)["known"]
    assert run("revert", scene.model).exit_code == 0


@pytest.mark.parametrize("case", SIGNATURES)
def test_going_back_to_an_earlier_version_asks_for_its_signature(patched: tuple[Scene, Path], case: str) -> None:
    scene, _ = patched
    later = scene.write(scene.pack(version="1.1.0", seed=2), scene.acme)
    assert run("apply", scene.model, later, "--in-place").exit_code == 0
    before = scene.weights()
    SIGNATURES[case](_signature(scene), scene)
    result = run("revert", scene.model, "--to", "1.0.0")
    assert result.exit_code == 1
    assert result.stderr.split(":")[0] in {"UnsignedError", "UntrustedError", "BadSignatureError", "SignatureFormatError"}
    assert scene.weights() == before
    forgiven = run("revert", scene.model, "--to", "1.0.0", "--allow-unsigned")
    if case in {"missing", "by a key that nobody trusts"}:
        assert forgiven.exit_code == 0, forgiven.stderr
        assert [entry.version for entry in read_ledger(scene.state_dir).applied] == ["1.0.0"]
    else:
        assert forgiven.exit_code == 1  # a wrong signature is never allowed
        assert scene.weights() == before


@pytest.mark.parametrize("key", ["evil", "none"])
def test_a_forged_history_does_not_bring_another_publishers_pack(patched: tuple[Scene, Path], key: str) -> None:
    """`revert --to` searches the history for the version: this history came with the model, and names the attacker's pack."""
    scene, _ = patched
    scene.trust(acme=scene.acme, evil=scene.evil)
    got = scene.sent()
    bad = got.write(got.pack(version="0.9.0", seed=66), got.evil if key == "evil" else None)
    forging.keep(got.state_dir, bad)
    forging.edit(got.state_dir, lambda value: value["history"].append(forging.event(nest.read(bad))))
    before = got.weights()
    refused("PublisherError" if key == "evil" else "UnsignedError", "revert", got.model, "--to", "0.9.0")
    assert got.weights() == before
    # An event whose id and name do not match is refused.
    forging.edit(got.state_dir, lambda value: value["history"][-1].update(version="0.8.0"))
    refused("LedgerError", "revert", got.model, "--to", "0.8.0")
    forging.edit(got.state_dir, lambda value: value["history"][-1].update(pack_id="0" * 64))
    refused("UndoError", "revert", got.model, "--to", "0.8.0")
    assert got.weights() == before
