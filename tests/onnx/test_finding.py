"""Weights found without their names; and what is found, but not believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from nestpatch.errors import (
    BaseMismatchError,
    UnsupportedModelError,
)
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.inplace import apply_in_place, revert
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint
from tests.onnx.files import LINEARS, build, data_of, save


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("packed", ["", "gate first", "up first"])
def test_structure_alone(act: str, packed: str, base: Path, pack: Pack, tmp_path: Path) -> None:
    """Gate and up are distinguished by the activation, whichever comes first."""
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
