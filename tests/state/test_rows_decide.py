"""Whether a pack is applied is decided by the rows: weights that were replaced since are detected and repaired."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestpatch.errors import BaseMismatchError, UndoError
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.apply import apply
from nestpatch.patcher.held import Holds
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.calls import answer, refused, run
from tests.state.conftest import Scene


@pytest.fixture(params=["written here", "came along"])
def restored(scene: Scene, request: pytest.FixtureRequest) -> tuple[Scene, dict[str, bytes], dict[str, bytes], Path]:
    """A patched model whose weights were overwritten with the base, as by a download: (model, base, patched, pack)."""
    base, pack = scene.weights(), scene.write(scene.pack())
    apply_in_place(scene.model, pack)
    patched = scene.weights()
    assert patched != base
    if request.param == "came along":
        scene = scene.sent()
    scene.restore(base)
    return scene, base, patched, pack


def test_applying_again_puts_the_pack_back(restored: tuple[Scene, dict[str, bytes], dict[str, bytes], Path]) -> None:
    """Otherwise `apply` would report "nothing to do" on unpatched weights."""
    scene, base, patched, pack = restored
    done = answer("apply", scene.model, pack, "--in-place")
    assert done["steps"] == ["undo no-harm 1.0.0", "apply no-harm 1.0.0"]
    assert scene.weights() == patched
    assert answer("verify", scene.model)["verdict"] == "patched"
    assert answer("apply", scene.model, pack, "--in-place")["steps"] == []
    revert(scene.model)
    assert scene.weights() == base


def test_an_upgrade_replaces_what_is_missing(restored: tuple[Scene, dict[str, bytes], dict[str, bytes], Path]) -> None:
    scene, base, _, _ = restored
    newer = scene.write(scene.pack(version="1.1.0", seed=2))
    answer("apply", scene.model, newer, "--in-place")
    assert answer("verify", scene.model)["packs"] == ["no-harm 1.1.0"]
    assert answer("verify", scene.model, newer)["verdict"] == "patched"
    revert(scene.model)
    assert scene.weights() == base


def test_looking_says_that_the_pack_is_missing(restored: tuple[Scene, dict[str, bytes], dict[str, bytes], Path]) -> None:
    scene, base, _, pack = restored
    assert answer("verify", scene.model, code=1)["verdict"] == Verdict.MISSING.value
    assert answer("verify", scene.model, pack, code=1)["verdict"] == Verdict.BASE.value
    known = answer("status", scene.model, code=1)
    assert (known["sound"], known["applied"][0]["in_rows"]) == (False, False)
    assert "the rows do not hold it" in run("status", scene.model).stdout
    assert scene.weights() == base


def test_reverting_what_is_missing_clears_the_ledger(
    restored: tuple[Scene, dict[str, bytes], dict[str, bytes], Path],
) -> None:
    scene, base, _, pack = restored
    assert answer("revert", scene.model)["applied"] == []
    assert scene.weights() == base
    assert answer("status", scene.model)["applied"] == []
    assert answer("apply", scene.model, pack, "--in-place")["steps"] == ["apply no-harm 1.0.0"]


def test_a_copy_of_unpatched_weights_gets_the_pack(
    restored: tuple[Scene, dict[str, bytes], dict[str, bytes], Path], tmp_path: Path
) -> None:
    scene, _, patched, pack = restored
    target = tmp_path / ("copy" if scene.model.is_dir() else f"copy{scene.model.suffix}")
    if scene.kind == "onnx":
        target = tmp_path / "copy"
    done = apply(scene.model, pack, target)
    found = {file.path.name: file.path.read_bytes() for file in done.files}
    assert sorted(found.values()) == sorted(patched.values())


def test_a_copy_made_here_has_a_ledger_of_this_machine(scene: Scene, tmp_path: Path) -> None:
    """The seal is for the final place of the copy, not for the temporary one."""
    target = tmp_path / (f"copy{scene.model.suffix}" if scene.kind == "gguf" else "copy")
    done = apply(scene.model, scene.pack(), target)
    (entry,) = read_ledger(state_dir_of(done.output)).applied
    assert not entry.foreign
    moved = target.rename(target.with_name(f"moved{target.suffix}"))
    if moved.is_dir():
        (entry,) = read_ledger(state_dir_of(moved)).applied
        assert entry.foreign, "it is another place now"


def test_one_shard_that_was_downloaded_again(templates: Path, tmp_path: Path) -> None:
    from tests.state.conftest import make_scene

    scene = make_scene(templates, tmp_path, "sharded")
    base, pack = scene.weights(), scene.pack()
    apply_in_place(scene.model, pack)
    patched = scene.weights()
    name = min(base)
    scene.restore({name: base[name]})
    assert verify(scene.model).verdict is Verdict.HALF
    apply_in_place(scene.model, pack)
    assert scene.weights() == patched
    scene.restore({name: base[name]})
    revert(scene.model)
    assert scene.weights() == base


def test_a_pack_below_another_one_is_put_back_too(plain: Scene) -> None:
    """Both packs were lost with the weights; applying one of them repairs the other."""
    base = plain.weights()
    one, two = plain.pack(), plain.pack("no-spam", seed=2)
    apply_in_place(plain.model, one)
    apply_in_place(plain.model, two, allow_overlap=True)
    patched = plain.weights()
    plain.restore(base)
    apply_in_place(plain.model, two, allow_overlap=True)
    assert verify(plain.model, full=True).packs == ("no-harm 1.0.0", "no-spam 1.0.0")
    assert plain.weights() == patched
    revert(plain.model)
    assert plain.weights() == base


def test_rows_that_are_neither_are_not_mended(scene: Scene) -> None:
    """Putting the pack back would hide the change."""
    pack = scene.write(scene.pack())
    apply_in_place(scene.model, pack)
    info = open_checkpoint(scene.model).info(scene.pack().deltas[0].name)
    rows = scene.pack().deltas[0].rows[:1].astype("int64")
    values = open_checkpoint(scene.model).read_rows(info.name, rows)
    values.view("uint8")[0, 1] ^= 1
    open_checkpoint(scene.model).write_rows(info.name, rows, values)
    altered = scene.weights()
    for words in (
        ["apply", scene.model, pack, "--in-place"],
        ["revert", scene.model],
        ["apply", scene.model, pack, "--dry-run"],
    ):
        said = refused("BaseMismatchError", *words)
        assert info.name in said
        assert f"row {int(rows[0])}" in said
    assert answer("verify", scene.model, code=1)["verdict"] == "altered"
    assert answer("status", scene.model, code=1)["sound"] is False
    assert scene.weights() == altered


def test_an_export_does_not_pass_a_claim_on(plain: Scene, tmp_path: Path) -> None:
    """Otherwise the metadata of the release would claim the pack."""
    base, pack = plain.weights(), plain.pack()
    apply_in_place(plain.model, pack)
    plain.restore(base)
    said = refused("BaseMismatchError", "export", plain.model, "--to", "safetensors", "-o", tmp_path / "out")
    assert "the rows of the model do not contain it" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_undo_record_is_named(scene: Scene) -> None:
    pack = scene.write(scene.pack())
    apply_in_place(scene.model, pack)
    (record,) = scene.state_dir.folder.glob("*.undo")
    record.unlink()
    with pytest.raises(UndoError, match="cannot be read"):
        revert(scene.model)
    with pytest.raises(UndoError, match="cannot be read"):
        verify(scene.model)


def test_a_model_that_was_sent_on_is_proven_by_its_pack(scene: Scene) -> None:
    """On another machine the seal is not valid: the pack's own digests and its undo record decide."""
    base, pack = scene.weights(), scene.write(scene.pack())
    apply_in_place(scene.model, pack)
    sent = scene.sent()
    known = answer("verify", sent.model)
    assert known["verdict"] == "patched"
    assert "the packs confirm it" in known["detail"]
    assert answer("verify", sent.model, pack)["verdict"] == "patched"
    assert answer("apply", sent.model, pack, "--in-place")["steps"] == []
    revert(sent.model)
    assert sent.weights() == base


def test_a_model_at_another_strength_that_was_sent_on(plain: Scene) -> None:
    base, pack = plain.weights(), plain.write(plain.pack())
    apply_in_place(plain.model, pack, strength=0.5)
    sent = plain.sent()
    assert answer("verify", sent.model)["verdict"] == "patched"
    assert answer("verify", sent.model, pack, code=1)["verdict"] == "altered"
    assert answer("verify", sent.model, pack, "--strength", "0.5")["verdict"] == "patched"
    revert(sent.model)
    assert sent.weights() == base


def test_another_base_that_came_along_cannot_be_undone(plain: Scene, tmp_path: Path) -> None:
    """The pack names no digest of that base, so nothing proves the undo record."""
    from tests.helpers import tiny_checkpoint, tiny_pack

    other = tiny_pack(tiny_checkpoint(tmp_path / "other", hidden=32, inter=32, seed=9))
    apply_in_place(plain.model, other, allow_base_mismatch=True)
    sent = plain.sent()
    before = sent.weights()
    with pytest.raises((UndoError, BaseMismatchError)):
        revert(sent.model)
    assert sent.weights() == before
    revert(plain.model)


def test_the_outcomes_are_types() -> None:
    """Rows hold the pack, what was there before, or something else. There is no fourth case."""
    assert {one.name for one in Holds} == {"PACK", "BEFORE", "OTHER"}
