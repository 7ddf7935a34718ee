"""Releases: patched safetensors models whose files say what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors import safe_open

from nestpatch.cli import main
from nestpatch.errors import CheckpointFormatError, OutputError
from nestpatch.export.safetensors import export_safetensors
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.patcher.verify import Verdict, verify
from tests.gguf.files import gguf_of
from tests.helpers import FLOATS, load_tensors, tiny_checkpoint, tiny_pack, tree_digest, weight_files


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["file", "directory", "sharded"])
def test_weights_are_those_of_apply(kind: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", dtype=dtype, sharded=kind == "sharded")
    model = model / "model.safetensors" if kind == "file" else model
    pack, before = tiny_pack(model), tree_digest(tmp_path)
    done = export_safetensors(model, pack, tmp_path / "out.safetensors")
    assert {name: digest for name, digest in tree_digest(tmp_path).items() if not name.startswith("out")} == before
    wanted = load_tensors(apply(model, pack, tmp_path / "applied").output)
    found = load_tensors(done.output)
    assert {name: t.tobytes() for name, t in found.items()} == {name: t.tobytes() for name, t in wanted.items()}
    assert (done.packs, done.tensors) == (("no-harm 1.0.0",), len(wanted))
    assert verify(done.output, pack).verdict is Verdict.PATCHED
    assert open_checkpoint(done.output).tensors() == open_checkpoint(model).tensors()
    if kind != "file":
        assert (done.output / "config.json").read_bytes() == (model / "config.json").read_bytes()
        assert not list(done.output.glob(".nestpatch*"))


def test_every_file_says_what_it_holds(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base", sharded=True)
    pack = tiny_pack(model)
    done = export_safetensors(model, pack, tmp_path / "out", strength=0.5)
    for file in weight_files(done.output):
        said = metadata(file)
        assert said["format"] == "pt"
        entry = {"name": "no-harm", "version": "1.0.0", "pack_id": nest.pack_id(pack), "strength": 0.5}
        assert json.loads(said["nestpatch.packs"]) == [entry]
        (record,) = json.loads(said["nestpatch.record"])
        before = {name: tensor["before"] for name, tensor in record["tensors"].items()}
        assert before == {name: identity.rows_sha256 for name, identity in pack.manifest.base.tensors.items()}
        assert record["tool"].startswith("nestpatch ")
    full = export_safetensors(model, pack, tmp_path / "full")
    (record,) = json.loads(metadata(weight_files(full.output)[0])["nestpatch.record"])
    assert {name: tensor["after"] for name, tensor in record["tensors"].items()} == dict(pack.manifest.result)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    model = tiny_checkpoint(tmp_path / "base")
    ones = [export_safetensors(model / "model.safetensors", tiny_pack(model), tmp_path / f"{n}.safetensors") for n in range(2)]
    (one,), (two,) = (done.files for done in ones)
    assert one.sha256 == two.sha256 != ""


def test_packs_of_the_ledger_are_told(tmp_path: Path) -> None:
    """A patched model is released as it is; an upgrade on the way replaces the older version."""
    model = tiny_checkpoint(tmp_path / "base")
    apply_in_place(model, tiny_pack(model))
    as_is = export_safetensors(model, output=tmp_path / "as-is")
    assert as_is.packs == ("no-harm 1.0.0",)
    two = tiny_pack(tiny_checkpoint(tmp_path / "again"), version="2.0.0", seed=4)
    upgraded = export_safetensors(model, two, tmp_path / "upgraded")
    assert upgraded.packs == ("no-harm 2.0.0",)
    assert verify(upgraded.output, two).verdict is Verdict.PATCHED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "as-is", "base", "upgraded"]


def test_the_commands(tmp_path: Path) -> None:
    model, patch = tiny_checkpoint(tmp_path / "base"), tmp_path / "p.nest"
    nest.write(tiny_pack(model), patch)

    def run(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result.output

    assert "would write" in run("export", model, patch, "--to", "safetensors", "--dry-run")
    run("export", model, patch, "--to", "safetensors")
    release = tmp_path / "base-no-harm-1.0.0-release"
    assert "released with" in run("status", release)
    assert json.loads(run("status", release, "--json"))["released"][0]["name"] == "no-harm"
    assert "nothing applied" in run("status", model)
    assert "only with --to gguf" in run("export", model, "--to", "onnx", "--type", "f16", code=2)


def test_places_and_models_that_cannot_be(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "base")
    with pytest.raises(OutputError, match="exists already"):
        export_safetensors(model, output=model)
    with pytest.raises(CheckpointFormatError, match="by the metadata it should have"):  # a file of a few tensors alone
        export_safetensors(gguf_of(model, tmp_path / "m.gguf", "F16"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
