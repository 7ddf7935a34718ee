"""Undo records: honest ones are never lost, hostile ones are never used."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher._journal import Region, write_journal
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.rows import Rows
from nestpatch.signing.verify import sign_pack
from tests.calls import answer, refused, run
from tests.state import forging
from tests.state.conftest import Scene, make_scene
from tests.state.forging import apart, based


def records(scene: Scene) -> dict[str, bytes]:
    """Undo record -> its bytes."""
    return {file.name: file.read_bytes() for file in sorted(scene.state_dir.folder.glob("*.undo"))}


def lying(scene: Scene) -> Path:
    """A signed pack with a wrong result: it fails after rows have been written."""
    pack = scene.pack("liar", seed=3)
    result = dict.fromkeys(pack.manifest.result, "0" * 64)
    file = scene.write(Pack(replace(pack.manifest, result=result), pack.deltas), scene.acme)
    sign_pack(file, scene.acme, overwrite=True)
    return file


def lose(scene: Scene, how: str) -> None:
    """Removes or damages the ledger of a model."""
    file = scene.state_dir.ledger
    data = file.read_bytes()
    if how == "another model's":
        forging.write_ledger(scene.state_dir, forging.ledger())
        return
    file.unlink()
    if how == "moved":
        file.with_name("elsewhere.json").write_bytes(data)
    elif how == "damaged":
        file.write_bytes(data[:-40])
    elif how == "emptied":
        file.touch()
    elif how == "a pipe":
        os.mkfifo(file)


LOSSES = ("deleted", "moved", "damaged", "emptied", "a pipe", "another model's")


@pytest.mark.parametrize("loss", LOSSES)
def test_no_command_removes_a_record_without_a_ledger_that_proves_it_unneeded(scene: Scene, tmp_path: Path, loss: str) -> None:
    scene.trust(acme=scene.acme)
    original = scene.weights()
    one, two = scene.write(scene.pack(), scene.acme), scene.write(apart(scene, scene.pack()), scene.acme)
    for file in (one, two):
        assert run("apply", scene.model, file, "--in-place", *based(scene)).exit_code == 0
    kept, patched, ledger = records(scene), scene.weights(), scene.state_dir.ledger.read_bytes()
    assert len(kept) == 2
    lose(scene, loss)
    unsigned, third = scene.write(scene.pack("unsigned", seed=4)), scene.write(scene.pack("third", seed=5), scene.acme)
    more = based(scene)
    commands: list[list[object]] = [
        ["status"], ["verify"], ["verify", one], ["verify", "--full"], ["recover"], ["recover", "--foreign", "remove"],
        ["revert", "--dry-run"], ["revert"], ["revert", "--to", "1.0.0"], ["update"], ["update", "--check"],
        ["apply", one, "--in-place", "--dry-run", *more], ["apply", one, "--in-place", *more],
        ["apply", unsigned, "--in-place", *more], ["apply", third, "--dry-run", "-o", tmp_path / "copy", *more],
        # Where the base is quantized, a result is a hint, and nothing is a lie.
        *([] if scene.kind.startswith("own-") else [["apply", lying(scene), "--in-place", "--allow-overlap", *more]]),
    ]  # fmt: skip
    for words in commands:
        run(words[0], scene.model, *words[1:])
        assert {name: data for name, data in records(scene).items() if name in kept} == kept, words
    # Not even a change that succeeds, after the weights of the base were put back.
    scene.restore(original)
    done = run("apply", scene.model, one, "--in-place", *more)
    if loss in {"deleted", "moved", "another model's"}:
        assert done.exit_code == 0, done.stderr
        assert (
            run("apply", scene.model, scene.write(scene.pack(version="1.1.0"), scene.acme), "--in-place", *more).exit_code == 0
        )
        assert run("revert", scene.model).exit_code == 0
    assert {name: data for name, data in records(scene).items() if name in kept} == kept
    scene.state_dir.ledger.unlink(missing_ok=True)
    scene.state_dir.ledger.write_bytes(ledger)
    scene.restore(patched)
    assert run("revert", scene.model).exit_code == 0
    assert scene.weights() == original


def test_an_upgrade_removes_exactly_the_records_that_it_makes_unneeded(scene: Scene) -> None:
    one = scene.pack()
    other = apart(scene, one)
    apply_in_place(scene.model, one, base=scene.base)
    apply_in_place(scene.model, other, base=scene.base)
    stray = scene.state_dir.folder / f"{'0' * 16}-{'0' * 16}.undo"
    stray.write_bytes(b"another transaction's")
    first, second = (entry.undo for entry in read_ledger(scene.state_dir).applied)
    apply_in_place(scene.model, scene.pack(version="1.1.0"), base=scene.base)
    applied = {entry.label: entry.undo for entry in read_ledger(scene.state_dir).applied}
    assert applied["other 1.0.0"] == second
    assert set(records(scene)) == {f"{applied['other 1.0.0']}.undo", f"{applied['no-harm 1.1.0']}.undo", stray.name}
    assert f"{first}.undo" not in records(scene)
    revert(scene.model)
    assert set(records(scene)) == {stray.name}


@pytest.mark.parametrize("confirmed", [True, False])
def test_a_journal_of_others_takes_no_record_along(
    plain: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, confirmed: bool
) -> None:
    """Its rows are confirmed by a signed pack or by the user, but its list of undo records is not."""
    plain.trust(acme=plain.acme)
    pack, checkpoint = plain.pack(), open_checkpoint(plain.model)
    regions = [Region(checkpoint.info(delta.name), delta.rows.astype("int64")) for delta in pack]
    assert run("apply", plain.model, plain.write(pack, plain.acme), "--in-place").exit_code == 0
    (record,) = records(plain)
    weights = plain.weights()
    plain.restore({name: (plain.base / name).read_bytes() for name in weights})
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("NESTPATCH_HOME", str(tmp_path / "attacker"))
        write_journal(plain.state_dir, "a" * 16, open_checkpoint(plain.model), regions, makes=[record.removesuffix(".undo")])
    plain.restore(weights)
    if not confirmed:
        for signature in plain.state_dir.folder.glob("*.sig"):
            signature.unlink()
        refused("ForeignJournalError", "recover", plain.model)
    words = [] if confirmed else ["--foreign", "roll-back"]
    assert answer("recover", plain.model, *words)["action"] == "rolled back"
    assert list(records(plain)) == [record]


# Hostile records


def zeros(name: str, rows: Rows) -> Rows:
    """Rows of zeros."""
    return np.zeros_like(rows)


def nan(name: str, rows: Rows) -> Rows:
    """Rows of NaN."""
    return np.full(rows.shape, np.nan).astype(rows.dtype) if rows.dtype != np.uint8 else np.full_like(rows, 0xFF)


def nudged(name: str, rows: Rows) -> Rows:
    """Rows that differ from the base so little that no sketch of a few numbers shows it."""
    changed = np.array(rows)
    raw = changed.view(np.uint8)
    raw[0, -1 if rows.dtype == np.uint8 else 0] ^= 1
    return changed


LIES = {"zeros": zeros, "NaN": nan, "a little else than the base": nudged}


def base_rows(scene: Scene, pack: Pack) -> dict[str, Rows]:
    """The present content of the pack's rows."""
    checkpoint = open_checkpoint(scene.model)
    return {delta.name: np.array(checkpoint.read_rows(delta.name, delta.rows.astype(np.int64))) for delta in pack}


def spoil_record(scene: Scene, pack: Pack, lie: Callable[[str, Rows], Rows], true: dict[str, Rows]) -> None:
    """Replaces the undo record of an applied pack by one that leads to `lie` of the base, and adapts the ledger."""
    (entry,) = (entry for entry in read_ledger(scene.state_dir).applied if entry.pack_id == nest.pack_id(pack))
    tensors = forging.write_undo(
        scene, pack, scene.state_dir.undo(entry.undo), entry.strength, lambda name, rows: lie(name, true[name])
    )

    def change(value: dict[str, object]) -> None:
        for found in value["applied"]:  # type: ignore[attr-defined]
            if found["pack_id"] == nest.pack_id(pack):
                found["tensors"] = tensors

    forging.edit(scene.state_dir, change)


@pytest.fixture(params=[1.0, 0.5])
def received(request: pytest.FixtureRequest, scene: Scene) -> tuple[Scene, Pack, dict[str, Rows]]:
    """A model that came with acme's pack at some strength, and the pack's rows before it."""
    pack = scene.pack()
    true = base_rows(scene, pack)
    scene.trust(acme=scene.acme)
    words = ["apply", scene.model, scene.write(pack, scene.acme), "--in-place", "--strength", request.param, *based(scene)]
    assert run(*words).exit_code == 0
    return scene.sent(), pack, true


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_leads_elsewhere_than_to_the_base_is_refused(
    received: tuple[Scene, Pack, dict[str, Rows]], lie: str
) -> None:
    scene, pack, true = received
    spoil_record(scene, pack, LIES[lie], true)
    before = scene.weights()
    for more in ([], based(scene)):
        said = refused("UndoError", "revert", scene.model, *more)
        assert "nothing proves that it leads back to the base" in said
        assert scene.weights() == before


@pytest.mark.parametrize("lie", LIES)
def test_a_record_that_leads_elsewhere_is_not_used_by_other_verbs_either(
    received: tuple[Scene, Pack, dict[str, Rows]], tmp_path: Path, lie: str
) -> None:
    """An upgrade undoes the old version by its record: rows that only that one touched could keep the attacker's content."""
    scene, pack, true = received
    spoil_record(scene, pack, LIES[lie], true)
    before = scene.weights()
    later = scene.write(scene.pack(version="1.1.0", seed=50), scene.acme)
    target = tmp_path / ("copy" if scene.kind != "gguf" else "copy.gguf")
    for words in (["--in-place"], ["-o", target]):
        result = run("apply", scene.model, later, *words, *based(scene))
        assert result.exit_code == 1
        assert result.stderr.split(":")[0] in {"UndoError", "BaseMismatchError"}
        assert scene.weights() == before
        assert not target.exists()


def test_a_record_is_read_no_further_than_its_rows_need(received: tuple[Scene, Pack, dict[str, Rows]]) -> None:
    """A stream of one megabyte that decompresses to a gigabyte."""
    scene, pack, _ = received
    (entry,) = read_ledger(scene.state_dir).applied
    squeeze, blank = zlib.compressobj(9), bytes(1 << 24)
    bomb = b"".join([*(squeeze.compress(blank) for _ in range(64)), squeeze.flush()])
    part = struct.pack("<Q", len(bomb)) + bomb
    scene.state_dir.undo(entry.undo).write_bytes(b"nestpatch-undo/1\n" + (part + struct.pack("<Q", 0)) * len(pack.deltas))
    before = scene.weights()
    tracemalloc.start()
    try:
        refused("UndoError", "revert", scene.model)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert scene.weights() == before


@pytest.mark.parametrize("huge", [False, True])
def test_checksums_of_another_length_are_refused_by_name(plain: Scene, *, huge: bool) -> None:
    """Even if they are half of a sparse file, which takes no room on the disk."""
    pack = plain.pack()
    apply_in_place(plain.model, pack)
    checkpoint, (delta, *_) = open_checkpoint(plain.model), pack.deltas
    rows = delta.rows[:1].astype(np.int64)
    checkpoint.write_rows(delta.name, rows, np.ascontiguousarray(checkpoint.read_rows(delta.name, rows)[:, ::-1]))
    (file,) = plain.state_dir.folder.glob("*.undo")
    length = 1 << 39 if huge else 8
    file.write_bytes(b"nestpatch-undo/1\n" + (struct.pack("<Q", 1) + b"x" + struct.pack("<Q", length) + bytes(8)))
    if huge:
        os.truncate(file, len(b"nestpatch-undo/1\n") + 8 + 1 + 8 + length + 3 * 16)
    else:
        part = struct.pack("<Q", 1) + b"x" + struct.pack("<Q", 8) + bytes(8)
        file.write_bytes(b"nestpatch-undo/1\n" + 4 * part)
    before = plain.weights()
    for words in (["verify"], ["revert"], ["apply", plain.write(plain.pack(version="1.1.0")), "--in-place"]):
        refused("UndoError", words[0], plain.model, *words[1:])
        assert plain.weights() == before
    assert not answer("status", plain.model, code=1)["sound"]


@pytest.mark.parametrize("what", ["missing", "a pipe", "a link", "a folder", "empty", "cut"])
def test_a_record_that_is_none_is_refused_by_name(
    received: tuple[Scene, Pack, dict[str, Rows]], tmp_path: Path, what: str
) -> None:
    scene, _, _ = received
    (file,) = scene.state_dir.folder.glob("*.undo")
    data = file.read_bytes()
    file.unlink()
    if what == "a pipe":
        os.mkfifo(file)
    elif what == "a link":
        (tmp_path / "outside").write_bytes(data)
        file.symlink_to(tmp_path / "outside")
    elif what == "a folder":
        file.mkdir()
    elif what != "missing":
        file.write_bytes(data[: len(data) // 2] if what == "cut" else b"")
    before = scene.weights()
    said = refused("UndoError", "revert", scene.model)
    assert file.name in said
    assert scene.weights() == before


# Honest models


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("strength", [1, 0.5])
def test_a_model_that_was_sent_on_still_reverts_to_the_byte(scene: Scene, *, keys: bool, strength: float) -> None:
    original = scene.weights()
    if keys:
        scene.trust(acme=scene.acme)
    file = scene.write(scene.pack(), scene.acme if keys else None)
    assert run("apply", scene.model, file, "--in-place", "--strength", strength, *based(scene)).exit_code == 0
    got = scene.sent()
    assert all(entry.foreign for entry in read_ledger(got.state_dir).applied)
    assert run("revert", got.model, *based(scene)).exit_code == 0
    assert got.weights() == original
    assert answer("verify", got.model)["verdict"] == "base"


def test_a_quantized_model_that_was_patched_without_its_base_reverts_without_it(templates: Path, tmp_path: Path) -> None:
    scene = make_scene(templates, tmp_path, "gguf")
    original = scene.weights()
    pack = scene.pack(scale=0.5)
    assert run("apply", scene.model, scene.write(pack), "--in-place").exit_code == 0
    got = scene.sent()
    assert run("revert", got.model).exit_code == 0
    assert got.weights() == original


@pytest.mark.parametrize("keys", [True, False])
def test_a_stack_that_was_sent_on_still_reverts_to_the_byte(scene: Scene, *, keys: bool) -> None:
    original = scene.weights()
    if keys:
        scene.trust(acme=scene.acme)
    key = scene.acme if keys else None
    over = apart(scene, scene.pack()) if scene.quantized else scene.pack("other", seed=2)
    for pack, strength in ((scene.pack(), 1), (over, 0.5)):
        words = ["apply", scene.model, scene.write(pack, key), "--in-place", "--allow-overlap", "--strength", strength]
        assert run(*words, *based(scene)).exit_code == 0
    got = scene.sent("first")
    assert run("verify", got.model, *based(scene)).exit_code == 0
    assert run("revert", got.model, *based(scene)).exit_code == 0
    assert got.weights() == original
    # Upgraded here, then sent on again.
    got = scene.sent("second")
    later = scene.write(scene.pack(version="1.1.0"), key)
    assert run("apply", got.model, later, "--in-place", "--allow-overlap", *based(scene)).exit_code == 0
    last = got.sent("third")
    for one in (got, last):
        assert run("verify", one.model, *based(scene)).exit_code == 0
        assert run("revert", one.model, *based(scene)).exit_code == 0
        assert one.weights() == original


def test_what_was_sent_on_names_its_rows_by_digest(scene: Scene) -> None:
    """The digests in a ledger that came with the model are also compared when its record is used."""
    assert run("apply", scene.model, scene.write(scene.pack()), "--in-place", *based(scene)).exit_code == 0
    got = scene.sent()
    before = got.weights()
    name = next(iter(read_ledger(got.state_dir).applied[0].tensors))
    forging.edit(got.state_dir, lambda value: value["applied"][0]["tensors"][name].update(before=sha256(b"x").hexdigest()))
    refused("UndoError", "revert", got.model, *based(scene))
    assert got.weights() == before
    forging.edit(got.state_dir, lambda value: value["applied"][0]["tensors"][name].update(after=sha256(b"x").hexdigest()))
    refused("BaseMismatchError", "revert", got.model, *based(scene))
    assert got.weights() == before
