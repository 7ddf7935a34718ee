"""`apply -o`: the source is locked while it is copied, and no link of a model brings the user's other files into a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from nestpatch.errors import BusyError, InterruptedChangeError
from nestpatch.events import Event
from nestpatch.export.safetensors import export_safetensors
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher import apply as applying
from nestpatch.patcher._journal import Region, write_journal
from nestpatch.patcher._lock import kept_from_writers, locked
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.state_dir import StateDir
from nestpatch.patcher.verify import verify
from tests.calls import answer, run
from tests.state.conftest import Scene, make_scene

SECRET = b'{"token": "the user\'s own"}'


def name_of(scene: Scene, name: str) -> str:
    """A name for a copy: ONNX models are copied with their folder."""
    return name + ("" if scene.kind == "onnx" else scene.model.suffix)


def once(act: Callable[[], object]) -> Callable[[Event], None]:
    """A listener that acts when copying has begun."""
    left = [act]

    def hear(event: Event) -> None:
        if event.stage == "copy" and left:
            left.pop()()

    return hear


def test_no_writer_gets_in_while_a_model_is_copied(scene: Scene, tmp_path: Path) -> None:
    one, two = scene.pack(), scene.pack(version="1.1.0", seed=2)
    apply_in_place(scene.model, one, base=scene.base)
    before, tried = scene.weights(), []

    def write() -> None:
        for change in (lambda: apply_in_place(scene.model, two, base=scene.base), lambda: revert(scene.model)):
            with pytest.raises(BusyError) as caught:
                change()
            tried.append(str(caught.value))

    copy = apply(scene.model, two, tmp_path / name_of(scene, "copy"), base=scene.base, on_event=once(write))
    assert len(tried) == 2
    assert all("writing or copying" in said for said in tried)
    assert scene.weights() == before
    assert verify(scene.model).packs == ("no-harm 1.0.0",)
    assert verify(copy.output).packs == ("no-harm 1.1.0",)


def test_a_model_is_not_copied_while_it_is_written(scene: Scene, tmp_path: Path) -> None:
    apply_in_place(scene.model, scene.pack(), base=scene.base)
    with locked(scene.state_dir), pytest.raises(BusyError):
        apply(scene.model, scene.pack(version="1.1.0", seed=2), tmp_path / name_of(scene, "copy"), base=scene.base)
    assert not (tmp_path / name_of(scene, "copy")).exists()


def test_two_copies_are_made_at_a_time(scene: Scene, tmp_path: Path) -> None:
    apply_in_place(scene.model, scene.pack(), base=scene.base)
    newer, made = scene.pack(version="1.1.0", seed=2), []

    def second() -> None:
        made.append(apply(scene.model, newer, tmp_path / name_of(scene, "second"), base=scene.base))

    first = apply(scene.model, newer, tmp_path / name_of(scene, "first"), base=scene.base, on_event=once(second))
    for done in (first, *made):
        assert verify(done.output).packs == ("no-harm 1.1.0",)
    assert len(made) == 1


@contextmanager
def before_the_lock(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Something happens to the source after it was opened and before it is locked."""

    @contextmanager
    def late(state_dir: StateDir) -> Iterator[None]:
        act()
        with kept_from_writers(state_dir):
            yield

    with monkeypatch.context() as patched:
        patched.setattr(applying, "kept_from_writers", late)
        yield


def test_the_ledger_is_read_under_the_lock(plain: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit() -> None:
        apply_in_place(plain.model, plain.pack(name="other", seed=3))

    with before_the_lock(commit, monkeypatch):
        copy = apply(plain.model, plain.pack(), tmp_path / "copy", allow_overlap=True)
    assert verify(copy.output).packs == ("other 1.0.0", "no-harm 1.0.0")
    revert(copy.output)
    assert (copy.output / "model.safetensors").read_bytes() == (plain.base / "model.safetensors").read_bytes()


def test_a_writer_that_died_before_the_lock_is_noticed(plain: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has changed rows that no check of this pack reads."""
    checkpoint = open_checkpoint(plain.model)

    def die() -> None:
        plain.state_dir.folder.mkdir()
        write_journal(plain.state_dir, "ab" * 8, checkpoint, [Region(checkpoint.info(checkpoint.tensors()[0]), np.arange(4))])

    with before_the_lock(die, monkeypatch), pytest.raises(InterruptedChangeError, match="was interrupted"):
        apply(plain.model, plain.pack(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("how", ["a writer", "something else"])
def test_a_change_of_a_source_without_a_lock_is_noticed(scene: Scene, tmp_path: Path, how: str) -> None:
    """A model that was never patched has no lock to hold, and a copy writes nothing beside it."""
    names = sorted(path.name for path in scene.folder.iterdir())
    file = open_checkpoint(scene.model).files[0]

    def change() -> None:
        if how == "a writer":
            apply_in_place(scene.model, scene.pack(version="2.0.0", seed=2), base=scene.base)
        else:
            os.utime(file, ns=(1, 1))

    target = tmp_path / name_of(scene, "copy")
    with pytest.raises(BusyError, match="was changed while it was copied"):
        apply(scene.model, scene.pack(), target, base=scene.base, on_event=once(change))
    assert not target.exists()
    assert how == "a writer" or sorted(path.name for path in scene.folder.iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "place"]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret.json"
    file.write_bytes(SECRET)
    return file


LEAD_OUT: dict[str, Callable[[Path, Path], None]] = {
    "absolute": lambda file, secret: file.symlink_to(secret),
    "relative": lambda file, secret: file.symlink_to(Path("..", "..", secret.name)),
    "through a link inside": lambda file, secret: (file.with_name("inner").symlink_to(secret), file.symlink_to("inner"))[0],
    "through a linked folder": lambda file, secret: (
        file.with_name("sub").symlink_to(secret.parent),
        file.symlink_to(Path("sub", secret.name)),
    )[0],
}


@pytest.mark.parametrize("way", LEAD_OUT)
@pytest.mark.parametrize("kind", ["safetensors", "sharded", "onnx"])
def test_a_companion_that_leads_out_of_the_model_is_not_copied(
    templates: Path, tmp_path: Path, secret: Path, kind: str, way: str
) -> None:
    """config.json of a downloaded model is a link to a private file of the user: a copy that is passed on would contain it."""
    scene = make_scene(templates, tmp_path, kind)
    (scene.folder / "config.json").unlink()
    LEAD_OUT[way](scene.folder / "config.json", secret)
    (scene.folder / "tokenizer.json").symlink_to("vocabulary.json")
    (scene.folder / "vocabulary.json").write_bytes(b"{}")
    answered = answer("apply", scene.model, scene.write(scene.pack()), "-o", tmp_path / "copy")
    assert "config.json" in answered["left_out"]
    assert "config.json" in run("apply", scene.model, scene.write(scene.pack()), "-o", tmp_path / "again").stdout
    outputs = [tmp_path / "copy", tmp_path / "again"]
    if kind != "onnx":
        done = export_safetensors(scene.model, output=tmp_path / "release")
        assert any("config.json" in note for note in done.notes)
        outputs.append(done.output)
    for output in outputs:
        assert (output / "tokenizer.json").read_bytes() == b"{}"
        assert not [path for path in output.rglob("*") if path.is_file() and SECRET in path.read_bytes()]
        assert not [path for path in output.rglob("*") if path.is_symlink()]


@pytest.mark.parametrize("blobs", ["real", "a link to the user's folder"])
def test_the_blobs_of_a_cache_are_the_models_own(plain: Scene, tmp_path: Path, secret: Path, blobs: str) -> None:
    cache = tmp_path / "models--acme--tiny"
    (cache / "snapshots").mkdir(parents=True)
    snapshot = plain.folder.rename(cache / "snapshots" / "0123abc")
    if blobs == "real":
        (cache / "blobs").mkdir()
        (snapshot / "config.json").rename(cache / "blobs" / "aa")
    else:
        (tmp_path / "private").mkdir()
        secret.rename(tmp_path / "private" / "aa")
        (cache / "blobs").symlink_to(tmp_path / "private")
        (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(Path("..", "..", "blobs", "aa"))
    done = apply(snapshot, plain.pack(), tmp_path / "copy")
    assert ("config.json" in done.left_out) is (blobs != "real")
    assert (done.output / "config.json").exists() is (blobs == "real")


def test_an_onnx_export_copies_no_links_out_of_the_model(plain: Scene, tmp_path: Path, secret: Path) -> None:
    pytest.importorskip("torch")
    from nestpatch.export.onnx._companions import _copy

    (plain.folder / "tokenizer.json").symlink_to(secret)
    (plain.folder / "merges.txt").write_bytes(b"a b")
    (plain.folder / "additional_chat_templates").mkdir()
    (plain.folder / "additional_chat_templates" / "tools.jinja").symlink_to(secret)
    (plain.folder / "additional_chat_templates" / "more").symlink_to(tmp_path / "home")
    (tmp_path / "out").mkdir()
    out = ["additional_chat_templates/more", "additional_chat_templates/tools.jinja", "tokenizer.json"]
    assert _copy(plain.folder, tmp_path / "out") == out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merges.txt"]
