"""ONNX models patched where they are, however exporters left their weights: exact bytes, undone to the byte."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import (
    BaseMismatchError,
    CheckpointFormatError,
    ExtractionError,
    InPlaceError,
    OutputError,
    UnsupportedModelError,
)
from nestpatch.formats import nest
from nestpatch.formats.onnx.checkpoint import OnnxCheckpoint
from nestpatch.formats.opening import open_checkpoint
from nestpatch.label import Label
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.diff import CheckpointDiff, diff
from nestpatch.patcher.extract import extract_to
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.place import place_of
from nestpatch.patcher.verify import Verdict, verify
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint
from tests.onnx.files import LINEARS, build, data_of, run, save

STYLES = [(style, packed) for style in LINEARS for packed in ("", "gate first", "up first")]
WHERE = ("one file", "inside", "file each", "floats")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "base", dtype="F32", hidden=32, inter=48)


@pytest.fixture(scope="module")
def pack(base: Path) -> Pack:
    return tiny_pack(base, delta_dtype="F32", clusters=3)


@pytest.fixture(scope="module")
def merged(base: Path, pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply(base, pack, tmp_path_factory.mktemp("merged") / "m").output


@pytest.mark.parametrize(("style", "packed"), STYLES)
def test_patched_is_exporting_the_merged_model(
    style: str, packed: str, base: Path, merged: Path, pack: Pack, tmp_path: Path
) -> None:
    path = save(build(base, style, packed=packed), tmp_path / "m")
    goal = data_of(save(build(merged, style, packed=packed), tmp_path / "goal"))
    original = data_of(path)
    done = apply_in_place(path, pack)
    assert (done.tensors, done.rows, done.gain) == (4, 36, None)
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


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("packed", ["", "gate first", "up first"])
def test_structure_alone(act: str, packed: str, base: Path, pack: Pack, tmp_path: Path) -> None:
    """Gate and up are told apart by the activation, whichever comes first."""
    checkpoint = open_checkpoint(save(build(base, "nameless", packed=packed, act=act), tmp_path / "m"))
    stored = load_tensors(base)
    for delta in pack:
        rows = delta.rows.astype(np.int64)
        assert np.array_equal(checkpoint.read_rows(delta.name, rows), stored[delta.name][rows])
    assert not checkpoint.has("model.layers.2.mlp.up_proj.weight")
    assert not checkpoint.has("model.layers.0.self_attn.q_proj.weight")


def test_blocks_without_a_gate(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        tensors[f"model.decoder.layers.{layer}.fc1.weight"] = random.standard_normal((48, 32)).astype(np.float32)
        tensors[f"model.decoder.layers.{layer}.fc2.weight"] = random.standard_normal((32, 48)).astype(np.float32)
    model = write_checkpoint(tmp_path / "opt", tensors)
    pack = tiny_pack(model, tensors=[name for name in tensors if "fc1" in name], delta_dtype="F32")
    path = save(plain_blocks(tensors), tmp_path / "m")
    apply_in_place(path, pack)
    goal = plain_blocks(load_tensors(apply(model, pack, tmp_path / "merged").output))
    assert data_of(path) == data_of(save(goal, tmp_path / "goal"))


def plain_blocks(tensors: dict[str, np.ndarray]) -> onnx.ModelProto:
    """fc1, its bias, an activation, fc2; without names."""
    from tests.onnx.files import Model

    model, x = Model(), "x"
    model.tensors["bias"] = np.ones(48, np.float32)
    for layer in range(2):
        inner = LINEARS["nameless"](model, "", x, tensors[f"model.decoder.layers.{layer}.fc1.weight"])
        inner = model.node("Relu", [model.node("Add", [inner, "bias"], f"b{layer}")], f"r{layer}")
        x = model.node(
            "Add", [x, LINEARS["nameless"](model, "", inner, tensors[f"model.decoder.layers.{layer}.fc2.weight"])], f"x{layer}"
        )
    return model.proto(32, x)


@pytest.mark.parametrize(
    ("style", "packed"), [("kept", "gate first"), ("genai", "gate first"), ("nameless", "up first"), ("genai", "")]
)
def test_a_fused_pack_on_any_model(style: str, packed: str, base: Path, tmp_path: Path) -> None:
    """A pack of gate_up_proj; the model may hold it whole, turned, or as two weights."""
    stored = load_tensors(base)
    name = "model.layers.{}.mlp.gate_up_proj.weight"
    whole = {
        name.format(n): np.concatenate([stored[f"model.layers.{n}.mlp.{p}_proj.weight"] for p in ("gate", "up")])
        for n in range(2)
    }
    pack = tiny_pack(write_checkpoint(tmp_path / "fused", whole), neurons=20, delta_dtype="F32", tensors=list(whole))
    path = save(build(base, style, packed=packed), tmp_path / "m")
    original = data_of(path)
    apply_in_place(path, pack)
    checkpoint = open_checkpoint(path)
    for delta in pack:
        wanted = whole[delta.name].copy()
        wanted[delta.rows] += delta.dense()
        assert np.array_equal(checkpoint.read_rows(delta.name, np.arange(96)), wanted)
        assert b"".join(checkpoint.read_all(delta.name)) == wanted.tobytes()
    revert(path)
    assert data_of(path) == original


def test_results_in_onnxruntime(base: Path, merged: Path, pack: Pack, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = save(build(base, "scoped"), tmp_path / "m")
    before = run(path)
    apply_in_place(path, pack)
    assert np.array_equal(run(path), run(save(build(merged, "scoped"), tmp_path / "goal")))
    assert np.abs(run(path) - before).max() > 1e-3


# Copies.


def folder_with_company(path: Path) -> Path:
    """A model's folder with what lies beside models, and with another model."""
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


# Which model, and where what is kept of it lies.


def test_the_model_goes_by_its_file(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    assert place_of(path) == place_of(path.parent)
    assert place_of(path).ledger == tmp_path / "m" / "model.onnx.nestpatch.json"
    apply_in_place(path.parent, pack)
    assert verify(path).packs == ("no-harm 1.0.0",)
    shutil.copy(path, tmp_path / "m" / "second.onnx")
    with pytest.raises(CheckpointFormatError, match=r"holds 2 ONNX models: model\.onnx, second\.onnx") as caught:
        open_checkpoint(path.parent)
    assert "Name the file" in caught.value.advice
    revert(path)
    assert verify(path, pack).verdict is Verdict.BASE


def test_safetensors_come_first(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "m")
    save(build(base), tmp_path / "m")
    assert not isinstance(open_checkpoint(tmp_path / "m"), OnnxCheckpoint)
    assert isinstance(open_checkpoint(tmp_path / "m" / "model.onnx"), OnnxCheckpoint)
    assert place_of(tmp_path / "m") != place_of(tmp_path / "m" / "model.onnx")


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


# What is found, and what is not believed.


def test_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    stranger = tiny_checkpoint(tmp_path / "stranger", seed=9, dtype="F32", hidden=32, inter=48)
    for style in ("kept", "nameless"):
        path = save(build(base, style), tmp_path / style)
        before = tree_digest(tmp_path)
        with pytest.raises(BaseMismatchError, match="another model"):
            apply_in_place(path, tiny_pack(stranger))
        assert tree_digest(tmp_path) == before


def test_layers_in_another_order_are_not_believed(base: Path, pack: Pack, tmp_path: Path) -> None:
    """Structure counts layers; the rows decide whether that was right."""
    stored = load_tensors(base)
    swapped = {n.replace(".0.", ".x.").replace(".1.", ".0.").replace(".x.", ".1."): t for n, t in stored.items()}
    path = save(build(write_checkpoint(tmp_path / "swapped", swapped), "nameless"), tmp_path / "m")
    with pytest.raises(BaseMismatchError, match="another model"):
        apply_in_place(path, pack)


def test_several_weights_of_one_name(base: Path, pack: Pack, tmp_path: Path) -> None:
    proto = build(base, "optimum")
    for node in proto.graph.node:
        node.name = node.name.replace("layers.1", "layers.0")
    path = save(proto, tmp_path / "m")
    before = tree_digest(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"2 weights of the model could be model\.layers\.0\.mlp\.gate_proj"):
        apply_in_place(path, pack)
    assert tree_digest(tmp_path) == before


def test_both_branches_of_an_if_may_share_a_weight(base: Path, merged: Path, pack: Pack, tmp_path: Path) -> None:
    """As optimum's merged decoders do: with and without a cache."""
    path, goal = (save(branched(build(model, "optimum")), tmp_path / name) for model, name in ((base, "m"), (merged, "goal")))
    onnx.checker.check_model(str(path))
    apply_in_place(path, pack)
    assert data_of(path) == data_of(goal)


def branched(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in both branches of an If, its tensors outside."""
    graph = proto.graph
    output = onnx.helper.make_tensor_value_info(graph.output[0].name, 1, ["batch", 32])
    branches = [onnx.helper.make_graph(list(graph.node), name, [], [output]) for name in ("with", "without")]
    node = onnx.helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1])
    flag = onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])
    y = onnx.helper.make_tensor_value_info("y", 1, ["batch", 32])
    outer = onnx.helper.make_graph([node], "outer", [*graph.input, flag], [y], list(graph.initializer))
    return onnx.helper.make_model(outer, opset_imports=list(proto.opset_import), ir_version=10)


# Everything else.


def test_differences(base: Path, pack: Pack, tmp_path: Path) -> None:
    path = save(build(base), tmp_path / "m")
    done = apply(path, pack, tmp_path / "out")
    assert diff(path, path).identical
    found = diff(path.parent, done.output)
    assert isinstance(found, CheckpointDiff)
    names = {delta.name.replace(".weight", ".MatMul.weight"): delta.rows[:5] for delta in pack}
    assert {tensor.name: tensor.first_rows for tensor in found.changed} == {n: tuple(r.tolist()) for n, r in names.items()}
    assert not found.mismatches
    with pytest.raises(ExtractionError, match="was converted"):
        extract_to(path, done.output, tmp_path / "x.nest", Label("x"))


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
    for module in ("formats.interface", "formats.rowio", "formats.onnx.layout", "patcher.journal"):
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
    """Columns that lie close together are read and written by themselves."""
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
