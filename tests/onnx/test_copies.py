"""Copies of ONNX models, which files make one, and where its state is stored."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from nestpatch.errors import (
    CheckpointFormatError,
    InPlaceError,
    OutputError,
)
from nestpatch.formats.onnx.checkpoint import OnnxCheckpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import tiny_pack, tree_digest
from tests.onnx.files import build, data_of, in_blocks, save


def folder_with_company(path: Path) -> Path:
    """A model's folder with the usual companions, and with another model."""
    folder = path.parent
    for name in ("config.json", "tokenizer.json", "genai_config.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    for name in ("model_q4.onnx", "model_q4.onnx_data", "model_fp16.onnx.data", "model.ort", "pytorch_model.bin"):
        (folder / name).write_bytes(b"unpatched")
    return folder


@pytest.mark.parametrize("named", ["directory", "file"])
def test_a_copy_is_a_whole_model(named: str, base: Path, merged: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    goal = data_of(save(build(merged), tmp_path / "goal"))
    folder = path.parent if named == "directory" else folder_with_company(path)
    before = tree_digest(tmp_path / "m")
    done = apply(folder if named == "directory" else path, pack, tmp_path / "out", digest=True)
    assert tree_digest(tmp_path / "m") == before
    kept = {"config.json", "tokenizer.json", "genai_config.json"} if named == "file" else set()
    assert {file.name for file in (tmp_path / "out").iterdir() if "nestpatch" not in file.name} == {*goal, *kept}
    assert {name: data for name, data in data_of(tmp_path / "out" / "model.onnx").items() if name in goal} == goal
    assert {file.path.name: file.sha256 for file in done.files} == {n: sha256(d).hexdigest() for n, d in goal.items()}
    assert len(done.left_out) == (0 if named == "directory" else 5)
    for way in (tmp_path / "out", tmp_path / "out" / "model.onnx"):
        assert verify(way).verdict is Verdict.PATCHED
    revert(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == (folder / "model.onnx_data").read_bytes()


def test_a_model_in_one_file_is_copied_as_one(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m", "inside")
    done = apply(path, pack)
    assert done.output == tmp_path / "m" / "model-no-harm-1.0.0.onnx"
    assert verify(done.output).verdict is Verdict.PATCHED
    assert verify(path, pack).verdict is Verdict.BASE
    revert(done.output)
    assert done.output.read_bytes() == path.read_bytes()


def test_names_of_copies(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    assert apply(path, pack, dry_run=True).output == tmp_path / "m-no-harm-1.0.0"
    with pytest.raises(OutputError, match="named like a file"):
        apply(path, pack, tmp_path / "out.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_hard_links_of_untouched_files(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    apply(path, pack, tmp_path / "out", hard_link=True)
    assert (tmp_path / "out" / "model.onnx").samefile(path)
    assert not (tmp_path / "out" / "model.onnx_data").samefile(tmp_path / "m" / "model.onnx_data")


def test_a_patched_model_is_copied_with_its_history(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    original = data_of(path)
    apply_in_place(path, pack)
    other = tiny_pack(base, name="other", seed=7, delta_dtype="F32")
    done = apply(path.parent, other, tmp_path / "out", allow_overlap=True)
    assert verify(done.output).packs == ("no-harm 1.0.0", "other 1.0.0")
    revert(done.output)
    assert data_of(done.output / "model.onnx") == original


def test_the_model_goes_by_its_file(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    assert state_dir_of(path) == state_dir_of(path.parent)
    assert state_dir_of(path).ledger == tmp_path / "m" / "model.onnx.nestpatch.json"
    apply_in_place(path.parent, pack)
    assert verify(path).packs == ("no-harm 1.0.0",)
    shutil.copy(path, tmp_path / "m" / "second.onnx")
    with pytest.raises(CheckpointFormatError, match=r"holds 2 ONNX models: model\.onnx, second\.onnx") as caught:
        open_checkpoint(path.parent)
    assert "Name the .onnx file" in caught.value.advice
    revert(path)
    assert verify(path, pack).verdict is Verdict.BASE


def test_every_file_of_a_row_counts(base: Path, pack: Pack, tmp_path: Path) -> None:
    """Blocks in one file, their scales in another one, which is a link."""
    path = save(in_blocks(build(base), base), tmp_path / "m", "file each")
    scales = path.parent / "model.layers.1.mlp.up_proj.MatMul.weight_scales"
    scales.rename(tmp_path / "blob")
    scales.symlink_to(tmp_path / "blob")
    before = tree_digest(tmp_path)
    with pytest.raises(InPlaceError, match="weight_scales is a link to"):
        apply_in_place(path, pack, base=base)
    assert tree_digest(tmp_path) == before


def test_models_in_a_folder_of_their_own(base: Path, tmp_path: Path) -> None:
    """The layout of transformers.js: the model has to be named."""
    save(build(base), tmp_path / "m" / "onnx")
    with pytest.raises(CheckpointFormatError, match=r"has its ONNX models in .+onnx: model\.onnx") as caught:
        open_checkpoint(tmp_path / "m")
    assert "Name the .onnx file" in caught.value.advice
    assert state_dir_of(tmp_path / "m" / "onnx").ledger == tmp_path / "m" / "onnx" / "model.onnx.nestpatch.json"


def test_safetensors_come_first(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    save(build(base), tmp_path / "m")
    assert not isinstance(open_checkpoint(tmp_path / "m"), OnnxCheckpoint)
    assert isinstance(open_checkpoint(tmp_path / "m" / "model.onnx"), OnnxCheckpoint)
    assert state_dir_of(tmp_path / "m") != state_dir_of(tmp_path / "m" / "model.onnx")


def test_links_into_a_cache_are_refused(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "cache" / "blobs")
    snapshot = tmp_path / "cache" / "snapshot"
    snapshot.mkdir()
    for name in ("model.onnx", "model.onnx_data"):
        (snapshot / name).symlink_to(path.parent / name)
    before = tree_digest(tmp_path)
    with pytest.raises(InPlaceError, match="is a link to"):
        apply_in_place(snapshot, pack)
    assert tree_digest(tmp_path) == before
    assert verify(snapshot, pack).verdict is Verdict.BASE
    apply_in_place(snapshot, pack, detach=True)
    assert verify(snapshot).verdict is Verdict.PATCHED
    assert verify(path, pack).verdict is Verdict.BASE
    (snapshot / "model.onnx_data").rename(tmp_path / "x")
    os.link(path.parent / "model.onnx_data", snapshot / "model.onnx_data")
    with pytest.raises(InPlaceError, match="hard link"):
        revert(snapshot / "model.onnx")
