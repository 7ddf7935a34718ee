"""One weight file has one state, whatever path names it and whatever is added to its folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nestpatch.errors import BusyError, CheckpointFormatError, InPlaceError, StateError
from nestpatch.patcher._lock import locked
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.state_dir import state_dir_of
from nestpatch.patcher.status import status
from nestpatch.patcher.verify import Verdict, verify
from tests.calls import answer, refused
from tests.helpers import tiny_checkpoint, tree_digest
from tests.state.conftest import KINDS, Scene, make_scene

INDEX = "model.safetensors.index.json"


def called(scene: Scene, name: str) -> Path:
    """The scene's single file under another name."""
    file = scene.folder / name
    (scene.folder / "model.safetensors").rename(file)
    return file


def write_index(folder: Path, *files: Path) -> None:
    """An index that makes these files one model."""
    from safetensors import safe_open

    weight_map = {}
    for file in files:
        with safe_open(file, "np") as opened:
            weight_map |= dict.fromkeys(opened.keys(), file.name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def names(scene: Scene, file: Path) -> dict[str, Path]:
    """Other paths of the model in a folder, of the folder and of its only file."""
    root = scene.folder.parent
    (root / "far").mkdir()
    (root / "far" / "link").symlink_to(scene.folder, target_is_directory=True)
    (root / "far" / f"a{file.suffix}").symlink_to(file)
    (root / "far" / f"b{file.suffix}").symlink_to(Path("..", scene.folder.name, file.name))
    # "deep/.." is the parent of the target of the link, not the folder of the link.
    (root / "far" / "deep").symlink_to(scene.folder, target_is_directory=True)
    shutil.copytree(scene.base, root / "far" / scene.folder.name)
    found = {
        "with dots": scene.folder / ".." / scene.folder.name,
        "a link to the folder": root / "far" / "link",
        "dots after a link": root / "far" / "deep" / ".." / scene.folder.name,
    }
    if not scene.quantized:
        found["the folder"] = scene.folder
    else:
        found = {name: path / file.name for name, path in found.items()}
    if scene.kind != "sharded":
        found |= {
            "the file": file,
            "the file with dots": scene.folder / ".." / scene.folder.name / file.name,
            "the file through a linked folder": root / "far" / "link" / file.name,
            "a link to the file": root / "far" / f"a{file.suffix}",
            "a relative link to the file": root / "far" / f"b{file.suffix}",
        }
    return found


def weights_of(scene: Scene) -> Path:
    return scene.model if scene.model.is_file() else scene.folder / "model.safetensors"


@pytest.mark.parametrize("kind", [*KINDS, "another name"])
def test_every_path_to_a_model_finds_its_state(
    templates: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = make_scene(templates, tmp_path, kind if kind in KINDS else "safetensors")
    file = called(scene, "weights.safetensors") if kind == "another name" else weights_of(scene)
    pack, newer = scene.pack(), scene.pack(version="1.1.0", seed=2)
    apply_in_place(scene.model, pack, base=scene.base)
    paths = names(scene, file)
    if kind == "onnx":  # the graph expects its data beside the link
        paths = {name: path for name, path in paths.items() if "link to the file" not in name}
    monkeypatch.chdir(scene.folder.parent)
    for name, path in paths.items():
        for text in (path, os.path.relpath(path) if ".." not in str(path) else path):
            found = status(text)
            assert ([one.entry.label for one in found.applied], found.sound) == (["no-harm 1.0.0"], True), name
            assert verify(text).packs == ("no-harm 1.0.0",), name
            error = "InPlaceError" if "link to the file" in name else "DowngradeError"
            refused(error, "apply", text, scene.write(scene.pack(version="0.9.0", seed=3)), "--in-place", "--base", scene.base)
    # A change under one name is visible under all others.
    for name, path in paths.items():
        if "link to the file" not in name:
            apply_in_place(path, newer, base=scene.base)
            assert {status(other).ledger.applied[0].version for other in paths.values()} == {"1.1.0"}, name
            revert(path)
            assert {status(other).ledger.applied for other in paths.values()} == {()}, name
            apply_in_place(path, pack, base=scene.base)


@pytest.mark.parametrize("kind", [*KINDS, "another name"])
def test_the_lock_by_one_path_excludes_writers_by_all(templates: Path, tmp_path: Path, kind: str) -> None:
    scene = make_scene(templates, tmp_path, kind if kind in KINDS else "safetensors")
    file = called(scene, "weights.safetensors") if kind == "another name" else weights_of(scene)
    paths = names(scene, file)
    for holder, held in paths.items():
        if "link to the file" in holder:
            continue
        with locked(state_dir_of(held)):
            for name, path in paths.items():
                if "link to the file" in name:
                    continue
                with pytest.raises(BusyError):
                    apply_in_place(path, scene.pack(), base=scene.base)


def test_a_shard_by_itself_is_refused_with_its_folder_as_the_way_out(templates: Path, tmp_path: Path) -> None:
    scene = make_scene(templates, tmp_path, "sharded")
    apply_in_place(scene.model, scene.pack())
    before = tree_digest(scene.folder)
    shard = scene.folder / "model-00001-of-00002.safetensors"
    for words in (["status", shard], ["verify", shard], ["revert", shard], ["recover", shard]):
        said = refused("CheckpointFormatError", *words)
        assert "one of the 2 files" in said
        assert f"Give the directory: {scene.folder}" in said
    with pytest.raises(CheckpointFormatError):
        apply(shard, scene.pack(version="2.0.0"), tmp_path / "out.safetensors")
    assert tree_digest(scene.folder) == before


Company = Callable[[Scene, Path], None]


def an_adapter(scene: Scene, file: Path) -> None:
    shutil.copy(
        weights_of(Scene("", scene.base, scene.base, scene.base, scene.acme, scene.evil)), file.parent / "adapter.safetensors"
    )


def an_index_of_it_alone(scene: Scene, file: Path) -> None:
    write_index(file.parent, file)


def a_gguf_file(scene: Scene, file: Path) -> None:
    (file.parent / "m.gguf").write_bytes(b"GGUF")


def a_broken_link(scene: Scene, file: Path) -> None:
    (file.parent / "more.safetensors").symlink_to("nowhere")


@pytest.mark.parametrize("company", [an_adapter, an_index_of_it_alone, a_gguf_file, a_broken_link])
@pytest.mark.parametrize("name", ["model.safetensors", "weights.safetensors"])
def test_what_comes_into_the_folder_does_not_hide_the_state(plain: Scene, name: str, company: Company) -> None:
    file = called(plain, name)
    apply_in_place(plain.model, plain.pack())
    company(plain, file)
    assert verify(file).packs == ("no-harm 1.0.0",)
    if name == "model.safetensors" or company in (an_index_of_it_alone, a_gguf_file):
        assert verify(plain.folder).packs == ("no-harm 1.0.0",)
        assert state_dir_of(plain.folder).ledger.samefile(state_dir_of(file).ledger)
    else:
        refused("CheckpointFormatError", "status", plain.folder)
    revert(file)
    assert file.read_bytes() == (plain.base / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("old", "new"), [("model.safetensors", "weights.safetensors"), ("weights.safetensors", "model.safetensors")]
)
def test_a_model_safetensors_that_gets_or_had_that_name(plain: Scene, old: str, new: str) -> None:
    """It is found if the directory has only one model before and after; a ledger beside a file is named after the file."""
    file = called(plain, old)
    apply_in_place(plain.folder, plain.pack())
    ledger = state_dir_of(file).ledger
    file = file.rename(plain.folder / new)
    if old == "model.safetensors":
        assert state_dir_of(plain.folder).ledger == state_dir_of(file).ledger == ledger
        revert(file)
        assert file.read_bytes() == (plain.base / "model.safetensors").read_bytes()
    else:
        assert ledger.name == "weights.safetensors.nestpatch.json"
        assert verify(file, plain.pack()).verdict is Verdict.PATCHED


def test_an_index_that_makes_a_patched_file_a_part_is_refused(plain: Scene) -> None:
    file = called(plain, "weights.safetensors")
    apply_in_place(file, plain.pack())
    other = tiny_checkpoint(plain.base.parent / "other", layers=3) / "model.safetensors"
    shutil.copy(other, plain.folder / "more.safetensors")
    (plain.folder / INDEX).write_text(json.dumps({"weight_map": {"a": file.name, "b": "more.safetensors"}}))
    with pytest.raises(StateError, match="was patched by itself") as caught:
        state_dir_of(plain.folder)
    assert "nestpatch revert" in caught.value.advice


def test_an_unpatched_model_beside_a_patched_one_is_not_taken_for_it(templates: Path, tmp_path: Path) -> None:
    """Programs that prefer model.safetensors would run the model without the patch."""
    scene = make_scene(templates, tmp_path, "sharded")
    apply_in_place(scene.model, scene.pack())
    single = scene.folder / "model.safetensors"
    shutil.copy(tiny_checkpoint(tmp_path / "single", hidden=32, inter=32) / "model.safetensors", single)
    before = tree_digest(scene.folder)
    for path in (scene.folder, single):
        for words in (["status", path], ["verify", path], ["revert", path]):
            said = refused("StateError", *words)
            assert f"Move {single.name} to a folder of its own" in said
    assert tree_digest(scene.folder) == before
    single.unlink()
    assert verify(scene.folder).packs == ("no-harm 1.0.0",)


def test_a_directory_with_two_models_is_not_patched_in_place(templates: Path, tmp_path: Path) -> None:
    scene = make_scene(templates, tmp_path, "sharded")
    single = scene.folder / "model.safetensors"
    shutil.copy(tiny_checkpoint(tmp_path / "single", hidden=32, inter=32) / "model.safetensors", single)
    before = tree_digest(scene.folder)
    said = refused("InPlaceError", "apply", scene.folder, scene.write(scene.pack()), "--in-place")
    assert "holds two models: model.safetensors" in said
    assert tree_digest(scene.folder) == before
    assert "model.safetensors" in apply(scene.folder, scene.pack(), tmp_path / "copy").left_out


def test_two_states_for_one_file_are_refused_not_chosen_from(plain: Scene) -> None:
    """A second ledger was put beside the file, or two folders were merged."""
    apply_in_place(plain.model, plain.pack())
    other = plain.sent("other")
    revert(other.model)
    shutil.copy(other.state_dir.ledger, plain.folder / "model.safetensors.nestpatch.json")
    before = tree_digest(plain.folder)
    for words in (["status", plain.model], ["verify", plain.folder / "model.safetensors"], ["revert", plain.model]):
        assert "has two states" in refused("StateError", *words)
    assert tree_digest(plain.folder) == before


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "gguf"])
def test_a_folder_of_links_to_a_patched_model_has_its_state_and_is_not_changed(
    templates: Path, tmp_path: Path, kind: str
) -> None:
    """--detach would separate the rows from their ledger."""
    scene = make_scene(templates, tmp_path, kind)
    apply_in_place(scene.model, scene.pack(), base=scene.base)
    farm = scene.folder.with_name("farm")
    farm.mkdir()
    for file in scene.folder.iterdir():
        if file.is_file() and "nestpatch" not in file.name:
            (farm / file.name).symlink_to(file)
    linked = farm / scene.model.name if scene.model.is_file() else farm
    newer = scene.write(scene.pack(version="1.1.0", seed=2))
    assert answer("status", linked)["applied"][0]["version"] == "1.0.0"
    assert verify(linked).packs == ("no-harm 1.0.0",)
    before = tree_digest(scene.folder.parent)
    for words in (
        ["apply", linked, newer, "--in-place", "--detach", "--base", scene.base],
        ["apply", linked, newer, "--in-place", "--detach", "--dry-run", "--base", scene.base],
        ["apply", linked, newer, "--in-place", "--base", scene.base],
        ["revert", linked],
    ):
        said = refused("InPlaceError", *words)
        assert "of a model that nestpatch has patched" in said
        assert tree_digest(scene.folder.parent) == before
    copy = apply(linked, scene.pack(version="1.1.0", seed=2), tmp_path / f"copy{linked.suffix}", base=scene.base)
    revert(copy.output)
    assert read_ledger(state_dir_of(scene.model)).applied[0].version == "1.0.0"


def test_a_shard_that_is_a_link_into_a_patched_model_is_not_written(templates: Path, tmp_path: Path) -> None:
    """One shard belongs to the model alone, the other is shared with a model that was patched since."""
    scene = make_scene(templates, tmp_path, "sharded")
    own = Path(shutil.copytree(scene.folder, scene.folder.with_name("own")))
    shard = own / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(scene.folder / shard.name)
    apply_in_place(scene.model, scene.pack())
    before = tree_digest(scene.folder.parent)
    with pytest.raises(InPlaceError, match="of a model that nestpatch has patched"):
        apply_in_place(own, scene.pack(version="1.1.0", seed=2), detach=True)
    assert tree_digest(scene.folder.parent) == before
