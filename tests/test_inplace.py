"""Applying in place, upgrading, stacking, reverting and verifying, for every layout and dtype."""

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import (
    BaseMismatchError,
    ChainError,
    DataError,
    DowngradeError,
    InPlaceError,
    LedgerError,
    OverlapError,
    UndoError,
)
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest

LAYOUTS = [(dtype, layout) for dtype in ("BF16", "F16", "F32") for layout in ("directory", "sharded", "file")]


def make(folder: Path, dtype: str = "BF16", layout: str = "directory") -> Path:
    model = tiny_checkpoint(folder / "model", dtype=dtype, sharded=layout == "sharded")
    if layout == "file":
        (model / "model.safetensors").rename(model / "weights.safetensors")
        return model / "weights.safetensors"
    return model


def weights(model: Path) -> dict[str, str]:
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in open_checkpoint(model).files}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path)


def packs(model: Path, *names: str):
    """Packs "name version seed"; the seed decides which rows they change."""
    made = []
    for text in names:
        name, version, seed = text.split()
        made.append(tiny_pack(model, name=name, version=version, seed=int(seed)))
    return made


@pytest.mark.parametrize(("dtype", "layout"), LAYOUTS)
def test_in_place_and_copy_give_the_same_bytes_and_both_revert(tmp_path, dtype, layout):
    model = make(tmp_path, dtype, layout)
    original = weights(model)
    (pack,) = packs(model, "safe 1.0.0 0")
    copy = apply(model, pack, tmp_path / ("copy.safetensors" if layout == "file" else "copy"), digest=True)
    done = apply_in_place(model, pack)
    assert sorted(weights(model).values()) == sorted(file.sha256 for file in copy.files)
    assert weights(model) != original
    assert done.steps == ("apply safe 1.0.0",)
    assert verify(model, full=True).verdict is verify(copy.output, full=True).verdict is Verdict.PATCHED
    assert revert(model).applied == ()
    revert(copy.output)
    assert weights(model) == original
    assert sorted(weights(copy.output).values()) == sorted(original.values())
    assert verify(model).verdict is Verdict.BASE


def test_everything_else_in_the_folder_is_left_alone(model):
    before = tree_digest(model)
    (pack,) = packs(model, "safe 1.0.0 0")
    apply_in_place(model, pack)
    after = {name: digest for name, digest in tree_digest(model).items() if "nestpatch" not in name}
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_an_upgrade_equals_applying_the_new_version_to_the_base(tmp_path, model):
    one, two = packs(model, "safe 1.0.0 0", "safe 1.1.0 1")
    direct = apply(model, two, tmp_path / "direct", digest=True)
    original = weights(model)
    apply_in_place(model, one)
    done = apply_in_place(model, two)
    assert done.steps == ("undo safe 1.0.0", "apply safe 1.1.0")
    assert list(weights(model).values()) == [file.sha256 for file in direct.files]
    with pytest.raises(DowngradeError):
        apply_in_place(model, one)
    assert revert(model, "1.0.0").applied == ("safe 1.0.0",)
    with pytest.raises(ChainError, match=r"version 3\.0\.0 was never applied"):
        revert(model, "3.0.0")
    revert(model)
    assert weights(model) == original


def test_stacks_add_up_and_come_apart(model):
    one, two, three = packs(model, "a 1.0.0 0", "b 1.0.0 1", "a 1.1.0 2")
    original = weights(model)
    apply_in_place(model, one)
    with pytest.raises(OverlapError, match=r"b 1\.0\.0 changes rows that a 1\.0\.0 changed"):
        apply_in_place(model, two)
    apply_in_place(model, two, allow_overlap=True)
    found = verify(model, full=True)
    assert (found.verdict, found.packs) == (Verdict.PATCHED, ("a 1.0.0", "b 1.0.0"))
    apply_in_place(model, three, allow_overlap=True, strength=0.5)
    assert verify(model, full=True).packs == ("b 1.0.0", "a 1.1.0")
    revert(model)
    assert weights(model) == original


def test_the_same_pack_again_is_nothing_and_another_strength_is_a_change(tmp_path, model):
    (pack,) = packs(model, "safe 1.0.0 0")
    half = apply(model, pack, tmp_path / "half", strength=0.5, digest=True)
    apply_in_place(model, pack)
    patched = weights(model)
    assert apply_in_place(model, pack).steps == ()
    assert weights(model) == patched
    apply_in_place(model, pack, strength=0.5)
    assert list(weights(model).values()) == [file.sha256 for file in half.files]
    with pytest.raises(DataError, match="strength"):
        apply_in_place(model, pack, strength=2)


def test_a_wrong_base_leaves_no_trace(tmp_path, model):
    (pack,) = packs(tiny_checkpoint(tmp_path / "other", seed=5), "safe 1.0.0 0")
    before = tree_digest(model)
    with pytest.raises(BaseMismatchError):
        apply_in_place(model, pack)
    assert tree_digest(model) == before


def test_an_allowed_mismatch_is_recorded_and_still_reverts(tmp_path, model):
    (pack,) = packs(tiny_checkpoint(tmp_path / "other", seed=5), "safe 1.0.0 0")
    original = weights(model)
    apply_in_place(model, pack, allow_base_mismatch=True)
    assert read_ledger(state_dir_of(model)).applied[0].base_mismatch_allowed
    assert "another base" in CliRunner().invoke(main, ["status", str(model)]).stdout
    assert verify(model, full=True).verdict is Verdict.PATCHED
    revert(model)
    assert weights(model) == original


def flip(model: Path, name: str, row: int) -> None:
    """Changes one bit of one row without nestpatch."""
    info = open_checkpoint(model).info(name)
    with open(info.file, "r+b") as file:
        file.seek(info.offset + row * info.row_bytes + 1)
        (value,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([value ^ 1]))


def test_verify_names_the_altered_row_and_revert_refuses(model):
    (pack,) = packs(model, "safe 1.0.0 0")
    apply_in_place(model, pack)
    delta = pack.deltas[1]
    flip(model, delta.name, int(delta.rows[3]))
    found = verify(model)
    assert found.verdict is Verdict.ALTERED
    assert [(d.tensor, d.rows, d.count) for d in found.differences] == [(delta.name, (int(delta.rows[3]),), 1)]
    altered = weights(model)
    with pytest.raises(BaseMismatchError, match="no longer holds what safe"):
        revert(model)
    assert weights(model) == altered
    assert not state_dir_of(model).journal.exists()


def test_only_full_verification_sees_rows_that_no_pack_touches(model):
    (pack,) = packs(model, "safe 1.0.0 0")
    delta = pack.deltas[0]
    other = next(row for row in range(24) if row not in delta.rows)
    apply_in_place(model, pack)
    flip(model, delta.name, other)
    assert verify(model).verdict is Verdict.PATCHED
    assert verify(model, full=True).verdict is Verdict.ALTERED
    revert(model)
    assert verify(model).verdict is Verdict.BASE
    assert verify(model, full=True).verdict is Verdict.ALTERED


def test_half_a_patch_is_called_that(tmp_path, model):
    (pack,) = packs(model, "safe 1.0.0 0")
    base = shutil.copytree(model, tmp_path / "base")
    apply_in_place(model, pack)
    name, rows = pack.deltas[2].name, pack.deltas[2].rows[:2].astype("int64")
    open_checkpoint(model).write_rows(name, rows, open_checkpoint(base).read_rows(name, rows))
    found = verify(model)
    assert found.verdict is Verdict.HALF
    assert found.differences[0].rows == tuple(rows.tolist())
    state_dir = state_dir_of(model)
    state_dir.ledger.unlink()
    shutil.rmtree(state_dir.folder)
    whole = pack.deltas[2].rows.astype("int64")
    open_checkpoint(model).write_rows(name, whole, open_checkpoint(base).read_rows(name, whole))
    assert verify(model, pack).verdict is Verdict.HALF


def test_without_ledger_or_patch_nothing_is_known(model):
    (pack,) = packs(model, "safe 1.0.0 0")
    assert verify(model).verdict is Verdict.UNKNOWN
    assert verify(model, pack).verdict is Verdict.BASE
    assert verify(model, pack, full=True).verdict is Verdict.BASE


@pytest.mark.parametrize("kind", ["symlink", "hard link"])
def test_shared_files_are_refused_or_detached(tmp_path, model, kind):
    (pack,) = packs(model, "safe 1.0.0 0")
    file, blob = model / "model.safetensors", tmp_path / "blob"
    if kind == "symlink":
        file.rename(blob)
        file.symlink_to(blob)
    else:
        os.link(file, blob)
    original = sha256(blob.read_bytes()).hexdigest()
    before = tree_digest(model)
    with pytest.raises(InPlaceError, match="link") as caught:
        apply_in_place(model, pack)
    assert "--detach" in caught.value.advice
    assert tree_digest(model) == before
    apply_in_place(model, pack, detach=True)
    assert sha256(blob.read_bytes()).hexdigest() == original
    assert verify(model).verdict is Verdict.PATCHED
    assert not file.is_symlink()
    revert(model)
    assert weights(model) == {"model.safetensors": original}


def test_hard_linked_shards_of_a_copy_are_the_untouched_ones(tmp_path):
    model = make(tmp_path, layout="sharded")
    (pack,) = packs(model, "safe 1.0.0 0")
    import dataclasses

    first = open_checkpoint(model).info(pack.deltas[0].name).file
    kept = tuple(d for d in pack.deltas if open_checkpoint(model).info(d.name).file == first)
    names = {d.name for d in kept}
    base = dataclasses.replace(pack.manifest.base, tensors={n: t for n, t in pack.manifest.base.tensors.items() if n in names})
    result = {n: r for n, r in pack.manifest.result.items() if n in names}
    small = dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, base=base, result=result), deltas=kept)
    original = weights(model)
    done = apply(model, small, tmp_path / "out", hard_link=True)
    shared = {file.name for file in open_checkpoint(done.output).files if file.stat().st_nlink > 1}
    assert shared == set(original) - {first.name}
    assert weights(model) == original


def test_a_dry_run_changes_nothing(model):
    (pack,) = packs(model, "safe 1.0.0 0")
    before = tree_digest(model)
    done = apply_in_place(model, pack, dry_run=True)
    assert done.dry_run
    assert done.rows == 36
    assert tree_digest(model) == before
    apply_in_place(model, pack)
    patched = tree_digest(model)
    assert revert(model, dry_run=True).steps == ("undo safe 1.0.0",)
    assert tree_digest(model) == patched


def test_lost_or_damaged_records_are_named_and_nothing_changes(model):
    (pack,) = packs(model, "safe 1.0.0 0")
    apply_in_place(model, pack)
    state_dir, patched = state_dir_of(model), weights(model)
    (record,) = state_dir.folder.glob("*.undo")
    whole = record.read_bytes()
    record.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    kept = state_dir.pack(nest.pack_id(pack))
    kept_bytes = kept.read_bytes()
    kept.unlink()
    with pytest.raises(UndoError, match="kept copy of safe"):
        revert(model)
    kept.write_bytes(kept_bytes)
    record.unlink()
    with pytest.raises(UndoError, match="cannot be read"):
        revert(model)
    assert weights(model) == patched


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "nestpatch-ledger/9"}', '{"format": "nestpatch-ledger/1"}'])
def test_a_broken_ledger_is_named(model, text):
    (pack,) = packs(model, "safe 1.0.0 0")
    state_dir_of(model).ledger.write_text(text)
    with pytest.raises(LedgerError):
        apply_in_place(model, pack)
    with pytest.raises(LedgerError):
        verify(model)


def test_a_copy_of_a_patched_model_knows_what_it_has(tmp_path, model):
    one, two = packs(model, "a 1.0.0 0", "b 1.0.0 1")
    original = weights(model)
    apply_in_place(model, one)
    with pytest.raises(OverlapError):
        apply(model, two, tmp_path / "copy")
    copy = apply(model, two, tmp_path / "copy", allow_overlap=True).output
    assert verify(copy).packs == ("a 1.0.0", "b 1.0.0")
    revert(copy)
    assert weights(copy) == original
    assert verify(model).packs == ("a 1.0.0",)


def test_recovering_a_model_without_a_journal_is_nothing(model):
    assert recover_model(model).action == "none"
    assert not state_dir_of(model).folder.exists()


def test_the_commands_speak_json_and_use_exit_codes(tmp_path, model):
    (pack,) = packs(model, "safe 1.0.0 0")
    nest.write(pack, tmp_path / "p.nest")
    run = lambda *arguments: CliRunner().invoke(main, [str(a) for a in arguments])  # noqa: E731
    done = json.loads(run("apply", model, tmp_path / "p.nest", "--in-place", "--json").stdout)
    assert [one["pack"] for one in done["applied"]] == ["safe 1.0.0"]
    assert json.loads(run("status", model, "--json").stdout)["applied"][0]["version"] == "1.0.0"
    verified = run("verify", model, "--json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout)["verdict"] == "patched"
    flip(model, pack.deltas[0].name, int(pack.deltas[0].rows[0]))
    altered = run("verify", model)
    assert altered.exit_code == 1
    assert f"row {int(pack.deltas[0].rows[0])}" in altered.stdout
    flip(model, pack.deltas[0].name, int(pack.deltas[0].rows[0]))
    assert json.loads(run("revert", model, "--json").stdout)["applied"] == []
    assert run("revert", model).exit_code == 1
    assert json.loads(run("recover", model, "--json").stdout) == {"model": str(model), "action": "none", "proof": ""}
    assert run("apply", model, tmp_path / "p.nest", "--in-place", "-o", "x").exit_code == 2
    for words in (["status", model], ["verify", model], ["apply", model, tmp_path / "p.nest", "--in-place"]):
        assert run(*words).exit_code == 0
