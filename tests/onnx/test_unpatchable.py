"""Sound ONNX models whose weights cannot be patched safely where they are: refused by name, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from nestpatch.cli import main
from nestpatch.errors import CheckpointError, QuantizationError, UnsupportedModelError
from nestpatch.formats import nest
from nestpatch.patcher.inplace import apply_in_place
from tests.helpers import tree_digest
from tests.onnx.files import build, in_blocks, save, tensor_proto

GATE = "model.layers.0.mlp.gate_proj"
Change = Callable[[onnx.ModelProto], None]


def weight(proto: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name.startswith(f"{GATE}.MatMul.weight"))


def user(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if weight(proto).name in node.input)


def add(proto: onnx.ModelProto, name: str, array: np.ndarray) -> str:
    proto.graph.initializer.append(tensor_proto(name, array))
    return name


def qdq(proto: onnx.ModelProto) -> None:
    held = weight(proto)
    scale = add(proto, "scale", np.float32(0.01))
    held.CopyFrom(tensor_proto(held.name, np.ones(tuple(held.dims), np.int8)))
    node = user(proto)
    proto.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [held.name, scale], ["wide"]))
    node.input[1] = "wide"


def shared(proto: onnx.ModelProto) -> None:
    """Another operation reads the weight too, as a tied embedding would be read."""
    proto.graph.node.append(onnx.helper.make_node("Gather", [weight(proto).name, "x"], ["looked_up"]))


def shared_under_one_name(proto: onnx.ModelProto) -> None:
    """Two operations of one name multiply with the weight: it is turned for one of them."""
    held, node = weight(proto), user(proto)
    turned = onnx.helper.make_node("Transpose", [held.name], ["turned"], perm=[1, 0])
    proto.graph.node.extend([turned, onnx.helper.make_node("Gemm", ["x", "turned"], ["z"], name=node.name, transB=1)])


def integer(op: str, domain: str) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        held, node = weight(proto), user(proto)
        held.CopyFrom(tensor_proto(held.name, np.ones(tuple(held.dims), np.uint8)))
        node.op_type, node.domain = op, domain

    return change


def doubles(proto: onnx.ModelProto) -> None:
    held = weight(proto)
    held.CopyFrom(tensor_proto(held.name, np.ones(tuple(held.dims), np.float64)))


def one_by_one(proto: onnx.ModelProto) -> None:
    """Half floats in a field of integers."""
    held = weight(proto)
    values = np.frombuffer(held.raw_data, np.float32).astype(np.float16).view(np.uint16)
    held.CopyFrom(
        onnx.TensorProto(name=held.name, data_type=onnx.TensorProto.FLOAT16, dims=held.dims, int32_data=values.tolist())
    )


def in_a_branch(proto: onnx.ModelProto) -> None:
    """A graph inside a node has another tensor of that name."""
    other = onnx.TensorProto()
    other.CopyFrom(weight(proto))
    inner = onnx.helper.make_graph([], "inner", [], [], [other])
    proto.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=onnx.GraphProto(name="e")))


FLOATS: dict[str, tuple[Change, type[CheckpointError], str]] = {
    "QDQ": (qdq, QuantizationError, "QDQ form"),
    "shared": (shared, UnsupportedModelError, "2 operations read"),
    "shared under one name": (shared_under_one_name, UnsupportedModelError, "2 operations read"),
    "integers": (integer("MatMulInteger", ""), QuantizationError, "stored for MatMulInteger"),
    "bitsandbytes": (integer("MatMulBnb4", "com.microsoft"), QuantizationError, "stored for MatMulBnb4"),
    "doubles": (doubles, QuantizationError, "it is stored as F64"),
    "one by one": (one_by_one, UnsupportedModelError, "stored one by one"),
    "in a branch": (in_a_branch, UnsupportedModelError, "several graphs"),
}


def attribute(name: str, value: int) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        node = user(proto)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def part(position: int, array: np.ndarray | None) -> Change:
    """Puts another tensor, or a computed value, into the place of one of the weight's."""

    def change(proto: onnx.ModelProto) -> None:
        node = user(proto)
        while len(node.input) <= position:
            node.input.append("")
        node.input[position] = "computed" if array is None else add(proto, "other", array)

    return change


def scales_of_two(proto: onnx.ModelProto) -> None:
    """The scales of one weight are those of another one."""
    others = [node for node in proto.graph.node if node.op_type == "MatMulNBits" and node.name != user(proto).name]
    others[0].input[2] = user(proto).input[2]


BLOCKS: dict[str, tuple[Change, str]] = {
    "prepacked": (attribute("weight_prepacked", 1), "weight_prepacked"),
    "in another order": (part(4, np.zeros(32, np.int32)), "g_idx"),
    "float zero points": (part(3, np.zeros((48, 2), np.float32)), "zero points are not packed"),
    "zero points of another size": (part(3, np.zeros((48, 2), np.uint8)), "other has 96 bytes where 48 rows"),
    "scales of another size": (part(2, np.zeros((48, 1), np.float32)), "other has 192 bytes where 48 rows"),
    "integer scales": (part(2, np.zeros((48, 2), np.int8)), "scales of I8"),
    "computed scales": (part(2, None), "computed, not stored"),
    "three bits": (attribute("bits", 3), "3 bits"),
    "blocks of 24": (attribute("block_size", 24), "blocks of 24"),
    "endless blocks": (attribute("block_size", 1 << 40), "its form is not known"),
    "no rows": (attribute("N", 0), "0 rows of 32"),
    "negative rows": (attribute("N", -48), "-48 rows"),
    "more rows than there are": (attribute("N", 1 << 40), "bytes where"),
    "rows of another width": (attribute("K", 64), "bytes where"),
    "shared scales": (scales_of_two, "2 operations read"),
}


def refused(path: Path, shop: Path, kind: type[CheckpointError], says: str) -> None:
    """By library and command line, in place and into a copy; with nothing changed."""
    before = tree_digest(path.parent.parent)
    with pytest.raises(kind) as caught:
        apply_in_place(path, nest.read(shop / "p.nest"), base=shop / "base", allow_base_mismatch=True)
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert caught.value.advice
    for where in (["--in-place"], ["-o", str(path.parent.parent / "out")]):
        result = CliRunner().invoke(main, ["apply", str(path), str(shop / "p.nest"), *where])
        assert (result.exit_code, type(result.exception)) == (1, SystemExit), result.exception
        assert result.stderr.startswith(f"{kind.__name__}: ")
    assert tree_digest(path.parent.parent) == before


@pytest.mark.parametrize("case", FLOATS)
def test_weights_that_cannot_be_patched(case: str, shop: Path, tmp_path: Path) -> None:
    change, kind, says = FLOATS[case]
    proto = build(shop / "base")
    change(proto)
    refused(save(proto, tmp_path / "m"), shop, kind, says)


@pytest.mark.parametrize("case", BLOCKS)
def test_blocks_that_cannot_be_patched(case: str, shop: Path, tmp_path: Path) -> None:
    change, says = BLOCKS[case]
    proto = in_blocks(build(shop / "base"), shop / "base")
    change(proto)
    refused(save(proto, tmp_path / "m"), shop, QuantizationError, says)


def test_the_same_models_unchanged_are_patched(shop: Path, tmp_path: Path) -> None:
    """Without this, those above could be refused for a reason that has nothing to do with them."""
    pack = nest.read(shop / "p.nest")
    for name, proto in {"a": build(shop / "base"), "b": in_blocks(build(shop / "base"), shop / "base")}.items():
        assert apply_in_place(save(proto, tmp_path / name), pack, base=shop / "base").rows == 36


def retold(path: Path, change: Callable[[onnx.TensorProto, onnx.TensorProto], None]) -> Path:
    """Changes what a model says of the data of its first two feed-forward weights."""
    proto = onnx.load(path, load_external_data=False)
    found = [t for t in proto.graph.initializer if "gate_proj" in t.name]
    change(*found)
    path.write_bytes(proto.SerializeToString())
    return path


def same_place(one: onnx.TensorProto, other: onnx.TensorProto) -> None:
    del other.external_data[:]
    other.external_data.extend(one.external_data)


def checksum(one: onnx.TensorProto, other: onnx.TensorProto) -> None:
    entry = one.external_data.add()
    entry.key, entry.value = "checksum", "da39a3ee5e6b4b0d3255bfef95601890afd80709"


def test_weights_that_share_their_bytes(shop: Path, tmp_path: Path) -> None:
    path = retold(save(build(shop / "base"), tmp_path / "m"), same_place)
    refused(path, shop, UnsupportedModelError, "it shares its bytes with")


def test_data_with_a_checksum(shop: Path, tmp_path: Path) -> None:
    path = retold(save(build(shop / "base"), tmp_path / "m"), checksum)
    refused(path, shop, UnsupportedModelError, "states a checksum")
