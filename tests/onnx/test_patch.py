"""ONNX models patched where they are, however exporters left their weights: exact bytes, undone to the byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.compare.diff import CheckpointDiff, diff
from nestpatch.compare.extract import extract
from nestpatch.errors import (
    ExtractionError,
)
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Label, Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack
from tests.onnx.files import LINEARS, build, data_of, run, save

STYLES = [(style, packed) for style in LINEARS for packed in ("", "gate first", "up first")]
WHERE = ("one file", "inside", "file each", "floats")


@pytest.mark.parametrize(("style", "packed"), STYLES)
def test_patched_is_exporting_the_merged_model(
    style: str, packed: str, base: Path, merged: Path, pack: Pack, tmp_path: Path
) -> None:
    path = save(build(base, style, packed=packed), tmp_path / "m")
    goal = data_of(save(build(merged, style, packed=packed), tmp_path / "goal"))
    original = data_of(path)
    done = apply_in_place(path, pack)
    assert (done.tensors, done.rows, done.retention) == (4, 36, None)
    assert data_of(path) == goal
    assert data_of(path) != original
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert data_of(path) == original
    assert verify(path, pack, full=True).verdict is Verdict.BASE


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("style", ["kept", "genai", "constant"])
def test_wherever_the_data_is(style: str, where: str, base: Path, merged: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base, style), tmp_path / "m", where)
    goal = data_of(save(build(merged, style), tmp_path / "goal", where))
    original = data_of(path)
    apply_in_place(path.parent, pack)
    assert data_of(path) == goal
    onnx.checker.check_model(str(path))
    revert(path)
    assert data_of(path) == original


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("style", ["kept", "nameless"])
def test_the_dtype_of_the_file_decides(style: str, dtype: str, tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", dtype=dtype, hidden=32, inter=48)
    pack = tiny_pack(base)
    goal = data_of(save(build(apply(base, pack, tmp_path / "merged").output, style, dtype=dtype), tmp_path / "goal"))
    path = save(build(base, style, dtype=dtype), tmp_path / "m")
    apply_in_place(path, pack)
    assert data_of(path) == goal


@pytest.mark.parametrize("style", ["kept", "genai"])
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_exact_rows_of_another_dtype(style: str, dtype: str, tmp_path: Path) -> None:
    """Made from the base and rounded once, as exporting the merged model does; without it, the file's numbers count."""
    base = tiny_checkpoint(tmp_path / "base", dtype="BF16", hidden=32, inter=48)
    pack = tiny_pack(base, scale=0.006)
    goal = data_of(save(build(apply(base, pack, tmp_path / "merged").output, style, dtype=dtype), tmp_path / "goal"))
    path = save(build(base, style, dtype=dtype), tmp_path / "m")
    original = data_of(path)
    apply_in_place(path, pack, base=base)
    assert data_of(path) == goal
    revert(path)
    apply_in_place(path, pack)
    assert data_of(path) not in (goal, original)
    revert(path)
    assert data_of(path) == original


def touched(path: Path, pack: Pack) -> np.ndarray:
    """Which bytes of model.onnx_data belong to touched rows, by the onnx package."""
    inside = np.zeros((path.parent / "model.onnx_data").stat().st_size, bool)
    places = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        places[tensor.name] = int(facts.get("offset", 0)), tuple(tensor.dims)
    for delta in pack.deltas:
        offset, shape = places[delta.name.replace(".weight", ".MatMul.weight")]
        view = inside[offset : offset + 4 * shape[0] * shape[1]].reshape(*shape, 4)
        view[:, delta.rows] = True
    return inside


def test_no_byte_changes_outside_touched_rows(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    graph, before = path.read_bytes(), np.fromfile(path.parent / "model.onnx_data", np.uint8)
    apply_in_place(path, pack)
    after, inside = np.fromfile(path.parent / "model.onnx_data", np.uint8), touched(path, pack)
    assert path.read_bytes() == graph
    assert not (before != after)[~inside].any()
    assert (before != after)[inside].mean() > 0.5


def test_results_in_onnxruntime(base: Path, merged: Path, pack: Pack, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = save(build(base, "scoped"), tmp_path / "m")
    before = run(path)
    apply_in_place(path, pack)
    assert np.array_equal(run(path), run(save(build(merged, "scoped"), tmp_path / "goal")))
    assert np.abs(run(path) - before).max() > 1e-3


def test_differences(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    done = apply(path, pack, tmp_path / "out")
    assert diff(path, path).identical
    found = diff(path.parent, done.output)
    assert isinstance(found, CheckpointDiff)
    names = {delta.name.replace(".weight", ".MatMul.weight"): delta.rows[:5] for delta in pack}
    assert {tensor.name: tensor.first_rows for tensor in found.changed} == {n: tuple(r.tolist()) for n, r in names.items()}
    assert not found.mismatches
    with pytest.raises(ExtractionError, match="is a converted model"):
        extract(path, done.output, tmp_path / "x.nest", Label("x"))


def test_half_patched_and_altered_rows_are_named(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base, "kept"), tmp_path / "m")
    original = data_of(path)["model.onnx_data"]
    apply_in_place(path, pack)
    delta = pack.deltas[0]
    info = open_checkpoint(path).info(delta.name)
    at = info.offset + int(delta.rows[3]) * info.row_bytes
    with open(path.parent / "model.onnx_data", "r+b") as file:
        file.seek(at)
        file.write(original[at : at + info.row_bytes])
    found = verify(path)
    assert (found.verdict, found.differences[0].rows) == (Verdict.HALF, (int(delta.rows[3]),))
    with open(path.parent / "model.onnx_data", "r+b") as file:
        file.seek(at)
        file.write(bytes([original[at] ^ 0x10]))
    assert verify(path).verdict is Verdict.ALTERED


def test_upgrade_and_return(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base, "nameless", packed="gate first"), tmp_path / "m")
    original = data_of(path)
    apply_in_place(path, pack)
    one = data_of(path)
    done = apply_in_place(path, tiny_pack(base, version="2.0.0", seed=5, delta_dtype="F32"))
    assert done.steps == ("undo no-harm 1.0.0", "apply no-harm 2.0.0")
    revert(path, "1.0.0")
    assert data_of(path) == one
    revert(path)
    assert data_of(path) == original


def test_the_commands(base: Path, pack: Pack, tmp_path: Path) -> None:
    path, patch = save(build(base, "scoped"), tmp_path / "m"), tmp_path / "p.nest"
    nest.write(pack, patch)
    original = data_of(path)

    def command(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return result.output

    command("apply", path, patch, "--in-place", "--dry-run")
    assert data_of(path) == original
    command("apply", path, patch, "--in-place")
    assert json.loads(command("status", path.parent, "--json"))["applied"][0]["version"] == "1.0.0"
    assert "patched" in command("verify", path)
    assert "nothing to recover" in command("recover", path)
    command("revert", path.parent)
    assert data_of(path) == original
    assert "is in ORT format" in command("verify", write(tmp_path / "m.ort", b"ORTM"), code=1)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def chunks(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in ("formats.checkpoint", "formats._rowio", "formats.onnx._layout", "patcher._journal"):
        monkeypatch.setattr(f"nestpatch.{module}.CHUNK", nbytes)


@pytest.mark.parametrize("nbytes", [1, 100, 1000, 5000])
@pytest.mark.parametrize(("style", "packed"), [("kept", ""), ("nameless", "up first")])
def test_blocks_do_not_show(
    nbytes: int, style: str, packed: str, base: Path, pack: Pack, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read a piece at a time; where a piece ends makes no difference."""
    path = save(build(base, style, packed=packed), tmp_path / "m")
    goal = data_of(save(build(merged, style, packed=packed), tmp_path / "goal"))
    original = data_of(path)
    chunks(monkeypatch, nbytes)
    apply_in_place(path, pack)
    assert data_of(path) == goal
    assert verify(path, full=True).verdict is Verdict.PATCHED
    revert(path)
    assert data_of(path) == original


@pytest.mark.parametrize("rows", [[], [0], [47], [3, 4], [0, 47], list(range(48))])
def test_columns_near_and_far(rows: list[int], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that are close together are read and written by themselves."""
    path = save(build(base), tmp_path / "m")
    checkpoint, name = open_checkpoint(path), "model.layers.1.mlp.up_proj.weight"
    matrix, wanted = load_tensors(base)[name].copy(), np.array(rows, np.int64)
    assert np.array_equal(checkpoint.read_rows(name, wanted), matrix[wanted])
    matrix[wanted] = -matrix[wanted]
    checkpoint.write_rows(name, wanted, matrix[wanted])
    assert np.array_equal(checkpoint.read_rows(name, np.arange(48)), matrix)


def all_tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        yield tensor.name, onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("where", WHERE)
def test_tensors_are_those_of_the_onnx_package(where: str, base: Path, tmp_path: Path) -> None:
    path = save(build(base, "nameless", act="gelu"), tmp_path / "m", where)
    checkpoint = open_checkpoint(path)
    expected = dict(all_tensors(path))
    assert set(checkpoint.tensors()) == set(expected)
    for name, tensor in expected.items():
        as_rows = tensor.T if tensor.ndim == 2 else tensor
        assert checkpoint.info(name).shape == as_rows.shape
        assert b"".join(checkpoint.read_all(name)) == np.ascontiguousarray(as_rows).tobytes()


def test_metadata(base: Path, tmp_path: Path) -> None:
    proto = build(base)
    entry = proto.metadata_props.add()
    entry.key, entry.value = "license", "apache-2.0"
    assert open_checkpoint(save(proto, tmp_path / "m")).metadata() == {"producer_name": "by hand", "license": "apache-2.0"}
