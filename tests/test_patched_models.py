"""`nestpatch list`: the models that a user has patched."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nestpatch.errors import StateError
from nestpatch.export.gguf import export_gguf
from nestpatch.export.safetensors import export_safetensors
from nestpatch.patcher import registry
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.registry import patched_models
from tests.calls import answer, refused, run
from tests.export.families import model_around
from tests.export.tokenizers_made import byte_level
from tests.helpers import tiny_checkpoint, tiny_pack


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("NESTPATCH_HOME", str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base")


def listed() -> list[tuple[str, str, list[str]]]:
    return [(one.model.name, one.state, [entry.label for entry in one.applied]) for one in patched_models()]


def test_a_model_can_be_left_out_of_the_list(model: Path, tmp_path: Path) -> None:
    apply(model, tiny_pack(model), tmp_path / "copy", listed=False)
    apply_in_place(model, tiny_pack(model), listed=False)
    assert listed() == []


def test_models_that_were_patched_or_copied_are_listed_the_last_one_first(model: Path, tmp_path: Path) -> None:
    assert listed() == []
    assert "no patched models" in run("list").stdout
    pack = tiny_pack(model)
    copy = apply(model, pack, tmp_path / "copy")
    apply_in_place(model, pack, strength=0.5)
    assert listed() == [("base", "patched", ["no-harm 1.0.0"]), ("copy", "patched", ["no-harm 1.0.0"])]
    told = run("list").stdout
    assert f"{model}: no-harm 1.0.0 at strength 0.5" in told
    assert f"{copy.output}: no-harm 1.0.0" in told
    facts = answer("list")["models"]
    assert [(one["model"], one["applied"][0]["strength"]) for one in facts] == [(str(model), 0.5), (str(copy.output), 1.0)]


def test_a_relative_path_is_kept_as_an_absolute_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    apply_in_place("base", tiny_pack(model))
    monkeypatch.chdir("/")
    assert [one.model for one in patched_models()] == [model]


def test_a_dry_run_is_not_listed(model: Path, home: Path) -> None:
    apply_in_place(model, tiny_pack(model), dry_run=True)
    apply(model, tiny_pack(model), dry_run=True)
    assert listed() == []
    assert not (home / "models.json").exists()


def test_a_model_that_was_reverted_is_no_longer_listed(model: Path) -> None:
    apply_in_place(model, tiny_pack(model))
    revert(model)
    assert listed() == []


def test_a_model_that_is_gone_is_shown_once_more(model: Path, tmp_path: Path) -> None:
    apply(model, tiny_pack(model), tmp_path / "copy")
    apply_in_place(model, tiny_pack(model))
    shutil.rmtree(tmp_path / "copy")
    assert f"{tmp_path / 'copy'}: gone" in run("list").stdout
    assert listed() == [("base", "patched", ["no-harm 1.0.0"])]


def test_a_model_whose_ledger_is_broken_stays_listed(model: Path) -> None:
    apply_in_place(model, tiny_pack(model))
    (model / "nestpatch.json").write_text("{")
    assert [(name, state) for name, state, _ in listed() + listed()] == [("base", "unreadable")] * 2
    assert "is broken" in run("list").stdout


def test_exports_leave_no_temporary_models_in_the_list(tmp_path: Path) -> None:
    model = model_around(tmp_path / "model")
    byte_level(model, "gpt2")
    older, newer = tiny_pack(model), tiny_pack(model, version="1.1.0", seed=3)
    apply_in_place(model, older)
    export_safetensors(model, newer, tmp_path / "release")
    export_gguf(model, newer, tmp_path / "x.gguf")
    assert [name for name, _, _ in listed()] == ["model"]


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"format": "nestpatch-models/2", "models": []}', "[" * 100_000])
def test_a_broken_list_is_named_and_fails_no_change(broken: str, model: Path, home: Path) -> None:
    (home / "models.json").write_text(broken)
    apply_in_place(model, tiny_pack(model))
    with pytest.raises(StateError, match="the list of patched models"):
        patched_models()
    assert "models are listed again when they are next changed" in refused("StateError", "list")
    assert (home / "models.json").read_text() == broken


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link"])
def test_something_else_in_the_place_of_the_list_fails_no_change(kind: str, model: Path, home: Path) -> None:
    place = home / "models.json"
    {"a folder": place.mkdir, "a pipe": lambda: os.mkfifo(place), "a link": lambda: place.symlink_to("/etc/passwd")}[kind]()
    apply_in_place(model, tiny_pack(model))
    refused("StateError", "list")


def test_a_home_that_is_missing_fails_no_change(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTPATCH_HOME", str(tmp_path / "nowhere"))
    apply_in_place(model, tiny_pack(model), trust="none")
    assert not (tmp_path / "nowhere").exists()


def test_the_list_is_bounded(model: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MOST_MODELS", 3)
    for number in range(5):
        copy = model.parent / f"m{number}"
        shutil.copytree(model, copy)
        apply_in_place(copy, tiny_pack(copy))
    assert [name for name, _, _ in listed()] == ["m4", "m3", "m2"]
    assert (home / "models.json").stat().st_mode & 0o777 == 0o600


def test_two_that_write_at_once_are_both_listed(model: Path) -> None:
    copies = [model.parent / f"m{number}" for number in range(6)]
    for copy in copies:
        shutil.copytree(model, copy)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda copy: apply_in_place(copy, tiny_pack(copy)), copies))
    assert sorted(name for name, _, _ in listed()) == [copy.name for copy in copies]


def test_a_name_that_is_no_text_is_listed(tmp_path: Path, home: Path) -> None:
    model = tiny_checkpoint(Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")))
    apply_in_place(model, tiny_pack(model))
    assert [one.model for one in patched_models()] == [model]
    assert run("list").exit_code == 0
    json.loads((home / "models.json").read_text("ascii"))
