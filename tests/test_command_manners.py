"""What the commands on models say to a person: strength, swapped arguments, what Ctrl-C leaves, a pack on one screen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.recovery import recover_model
from nestpatch.patcher.verify import Verdict, verify
from tests.calls import answer, run
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base")


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    nest.write(tiny_pack(model), tmp_path / "x.nest")
    return tmp_path / "x.nest"


def test_apply_prints_a_strength_that_is_not_one(model: Path, file: Path) -> None:
    assert "no-harm 1.0.0 at strength 0.5 wrote" in run("apply", model, file, "--strength", "0.5").stdout
    assert "changed in place at strength 0.5" in run("apply", model, file, "--in-place", "--strength", "0.5").stdout
    assert "at strength" not in run("apply", model, file, "-o", model.parent / "whole").stdout
    assert answer("apply", model, file, "--in-place", "--strength", "0.5", "--dry-run")["strength"] == 0.5


SWAPPED = {
    "apply": ("apply", "PACK", "MODEL"),
    "apply in place": ("apply", "PACK", "MODEL", "--in-place"),
    "verify": ("verify", "PACK", "MODEL"),
}


@pytest.mark.parametrize("name", SWAPPED)
@pytest.mark.parametrize("ending", [".nest", ".safetensors", ""])
def test_a_pack_in_the_place_of_the_model_is_a_usage_error_with_the_right_order(
    name: str, ending: str, model: Path, file: Path
) -> None:
    file = file.rename(file.with_name(f"named{ending}"))
    words = [{"PACK": file, "MODEL": model}.get(word, word) for word in SWAPPED[name]]
    told = run(*words)
    assert told.exit_code == 2
    assert f"{file} is a pack: MODEL comes first" in told.stderr
    assert f"{words[0]} {model} {file}" in told.stderr


@pytest.mark.parametrize("command", ["status", "verify", "revert"])
def test_a_pack_alone_in_the_place_of_the_model_is_a_usage_error(command: str, file: Path) -> None:
    told = run(command, file)
    assert (told.exit_code, f"nestpatch show {file}" in told.stderr) == (2, True)


def test_what_only_looks_like_a_pack_is_a_broken_model(tmp_path: Path) -> None:
    for data in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]", b"\x08\0\0\0\0\0\0\0{"):
        (tmp_path / "x.safetensors").write_bytes(data)
        told = run("status", tmp_path / "x.safetensors")
        assert (told.exit_code == 2, "is a pack" in told.stderr) == (False, False)


def interrupt(*words: object) -> str:
    told = CliRunner().invoke(main, [str(word) for word in words])
    assert told.exit_code == 130
    return told.stderr


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_change_is_rolled_back(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: digest for name, digest in tree_digest(model).items() if "nestpatch" not in name}
    monkeypatch.setattr("nestpatch.patcher._transaction.sync_files", stop)  # the rows are written by then
    assert f"{model} holds no unfinished change" in interrupt("apply", model, file, "--in-place")
    assert {name: digest for name, digest in tree_digest(model).items() if "nestpatch" not in name} == before


def test_a_change_that_could_not_be_rolled_back_names_recover(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, and again while the rows are put back."""
    with monkeypatch.context() as patched:
        patched.setattr("nestpatch.patcher._transaction.sync_files", stop)
        patched.setattr("nestpatch.patcher._transaction.roll_back", stop)
        assert f"`nestpatch recover {model}` ends it" in interrupt("apply", model, file, "--in-place")
    assert recover_model(model).action == "rolled back"


def test_an_interrupted_copy_leaves_nothing(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree_digest(model.parent)
    monkeypatch.setattr("nestpatch.patcher.copies.copy_file", stop)
    assert "Nothing was written" in interrupt("apply", model, file)
    assert tree_digest(model.parent) == before


def test_an_interrupted_revert_leaves_the_pack_applied(model: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply_in_place(model, nest.read(file))
    monkeypatch.setattr("nestpatch.patcher._transaction.sync_files", stop)
    assert f"{model} holds no unfinished change" in interrupt("revert", model)
    assert verify(model).verdict is Verdict.PATCHED


def wordy(pack: Pack) -> Pack:
    """With as many facts of the training as a real pack has, and more."""
    method = {
        "decisions": {f"decision {number}": "because of a reason that goes on and on " * 5 for number in range(30)},
        "layers": [{"layer": number, "neurons": 12, "clusters": 2, "silhouette": None} for number in range(12)],
        "data": {kind: {"prompts": 5, "name": kind, "sha256": "0" * 64} for kind in ("harmful", "benign", "lookalike")},
        "tuning": {"steps": 5, "stopped": "it was done"},
    }
    return replace(pack, manifest=replace(pack.manifest, method=method, evaluation=measured(0.05), tags=("a", "b")))


def share(value: float) -> dict[str, float]:
    return {"value": value, "count": int(200 * value), "total": 200, "low": max(0, value - 0.05), "high": min(1, value + 0.05)}


def measured(attacks: float, refusals: float = 0.01) -> dict[str, dict[str, dict[str, float]]]:
    """The stored evaluation of a pack after which so many attacks succeed, and so many look-alikes are refused."""
    rest = {"refusal_benign": share(0.01), "benign_correct": share(0.95)}
    before = {"attack_success": share(0.83), "refusal_lookalike": share(0.01), **rest}
    return {"before": before, "after": {"attack_success": share(attacks), "refusal_lookalike": share(refusals), **rest}}


@pytest.mark.parametrize("layers", [1, 2, 12])
def test_show_fits_on_one_screen_and_rows_lists_all(layers: int, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", layers=layers)
    nest.write(wordy(tiny_pack(model)), tmp_path / "x.nest")
    told = run("show", tmp_path / "x.nest").stdout
    assert len(told.rstrip("\n").split("\n")) <= 25
    for word in ("no-harm 1.0.0", "gate_proj", "attack success", "harmful prompts", "layer 11", "--rows"):
        assert word in told
    whole = run("show", tmp_path / "x.nest", "--rows").stdout
    assert all(f"model.layers.{layer}.mlp.up_proj.weight" in whole for layer in range(layers))
    assert "decision 29" in whole
    assert "layer 11 clusters 2, neurons 12" in " ".join(whole.split())


BAD = {
    "attacks succeed": (measured(0.83), "attack success", "83.0%"),
    "look-alikes are refused": (measured(0.05, 0.44), "look-alike", "44.0%"),
}


@pytest.mark.parametrize("name", BAD)
def test_apply_and_show_warn_with_the_number_of_a_bad_evaluation(name: str, model: Path, tmp_path: Path) -> None:
    evaluation, what, number = BAD[name]
    pack = wordy(tiny_pack(model))
    nest.write(replace(pack, manifest=replace(pack.manifest, evaluation=evaluation)), tmp_path / "x.nest")
    for words in (("apply", model, tmp_path / "x.nest", "--dry-run"), ("show", tmp_path / "x.nest")):
        told = run(*words)
        warnings = [line for line in (told.stderr + told.stdout).splitlines() if line.lower().startswith("warning")]
        assert any(what in line and number in line for line in warnings), told.output
        assert len(told.stdout.rstrip().split("\n")) <= 25


def test_apply_and_show_do_not_warn_of_a_good_pack_or_one_without_evaluation(model: Path, file: Path) -> None:
    nest.write(wordy(tiny_pack(model)), model.parent / "good.nest")
    for pack in (file, model.parent / "good.nest"):
        for words in (("apply", model, pack, "--dry-run"), ("show", pack)):
            told = run(*words)
            assert "warning" not in (told.stderr + told.stdout).lower()


def test_layers_are_listed_by_their_number(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", layers=12)
    nest.write(tiny_pack(model), tmp_path / "x.nest")
    told = run("show", tmp_path / "x.nest", "--rows").stdout
    assert told.index("model.layers.2.mlp") < told.index("model.layers.10.mlp")
