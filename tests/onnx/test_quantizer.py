"""The rows of MatMulNBits, against onnxruntime itself."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from nestpatch.errors import QuantizationError
from nestpatch.formats.onnx._nbits import NBitsCodec

onnxruntime = pytest.importorskip("onnxruntime")
FORMS = list(itertools.product((2, 4, 8), (16, 32, 128), (False, True)))
WIDTHS = (64, 96, 256, 100, 40, 36)
"""Multiples of a block, and others."""


def by_onnxruntime(rows: np.ndarray, codec: NBitsCodec) -> np.ndarray:
    """The rows of its own quantizer, put together as a codec's."""
    from onnxruntime.capi import _pybind_state as library

    quantize = {2: "quantize_matmul_2bits", 4: "quantize_matmul_4bits", 8: "quantize_matmul_8bits"}[codec.depth]
    count, numbers = len(rows), codec.span * codec.depth // 8
    turned = np.pad(rows.T, ((0, codec.blocks * codec.span - codec.width), (0, 0)))
    blocks = np.zeros((count, codec.blocks, numbers), np.uint8)
    scales = np.zeros((count, codec.blocks), rows.dtype)
    zero_points = np.zeros((count, -(-codec.blocks * codec.depth // 8)), np.uint8)
    symmetric = not codec.zero_points
    arrays = np.ascontiguousarray(turned), scales, zero_points
    getattr(library, quantize)(blocks, *arrays, codec.span, count, codec.width, symmetric)
    parts = [blocks.reshape(count, -1), scales.view(np.uint8)] + ([] if symmetric else [zero_points])
    return np.concatenate(parts, axis=1)


def samples(width: int, dtype: type) -> np.ndarray:
    """Plain rows, and such as make quantizers stumble: zeros, one sign, constants, tiny and large numbers, halves."""
    random = np.random.default_rng(width)
    rows = (0.1 * random.standard_normal((64, width))).astype(dtype)
    rows[3] = 0
    rows[4], rows[5] = np.abs(rows[4]), -np.abs(rows[5])
    rows[6, ::2] = 0
    rows[7] = rows[7, 0]
    rows[8] *= dtype(1e-3 if dtype is np.float16 else 1e-30)
    rows[9] = dtype(6e-8 if dtype is np.float16 else 1e-40)
    rows[10, :5] = [1, -1, 0.5, -0.5, 0]
    rows[11:30] = np.round(rows[11:30] * 64) / 64
    rows[40] *= dtype(100 if dtype is np.float16 else 1e37)
    return rows


@pytest.mark.parametrize(("depth", "span", "zero_points"), FORMS)
@pytest.mark.parametrize("scale", ["F32", "F16"])
def test_bytes_are_those_of_onnxruntime(depth: int, span: int, zero_points: bool, scale: str) -> None:
    for width in WIDTHS:
        rows = samples(width, np.float32 if scale == "F32" else np.float16)
        codec = NBitsCodec(depth, span, width, scale, zero_points)
        found, expected = codec.encode(rows.astype(np.float32)), by_onnxruntime(rows, codec)
        wrong = np.flatnonzero((found != expected).any(axis=1))
        assert not len(wrong), (
            f"width {width}: rows {wrong[:8]}, first at byte {np.flatnonzero(found[wrong[0]] != expected[wrong[0]])[:4]}"
        )
        # A row does not depend on those beside it.
        assert np.array_equal(codec.encode(rows[5:9].astype(np.float32)), expected[5:9])


def multiplied(codec: NBitsCodec, blocks: np.ndarray) -> np.ndarray:
    """What onnxruntime takes the rows for: the product of MatMulNBits with the identity, turned."""
    count = len(blocks)
    numbers, scales, zeros = np.split(blocks, np.cumsum(codec.parts)[:2], axis=1)
    kind, code = (np.float32, TensorProto.FLOAT) if codec.scale == "F32" else (np.float16, TensorProto.FLOAT16)
    tensors = {
        "b": numbers.reshape(count, codec.blocks, -1),
        "s": np.ascontiguousarray(scales).view(kind),
        "z": np.ascontiguousarray(zeros),
    }
    names = ["x", "b", "s", *(["z"] if codec.zero_points else [])]
    sizes = {"bits": codec.depth, "block_size": codec.span, "K": codec.width, "N": count}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **sizes)
    types = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(kind): code}
    made = [helper.make_tensor(n, types[tensors[n].dtype], tensors[n].shape, tensors[n].tobytes(), raw=True) for n in names[1:]]
    values = [
        helper.make_tensor_value_info(name, code, shape) for name, shape in (("x", [None, codec.width]), ("y", [None, count]))
    ]
    graph = helper.make_graph([node], "g", values[:1], values[1:], made)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, {"x": np.eye(codec.width, dtype=kind)})[0].T
    return answer


@pytest.mark.parametrize(("depth", "span", "zero_points"), [form for form in FORMS if form[0] != 2])
def test_values_are_those_of_onnxruntime(depth: int, span: int, zero_points: bool) -> None:
    rows = samples(96, np.float32)[:40]
    codec = NBitsCodec(depth, span, 96, "F32", zero_points)
    blocks = codec.encode(rows)
    assert np.array_equal(codec.decode(blocks), multiplied(codec, blocks))


@pytest.mark.parametrize("depth", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_values_are_near(depth: int, zero_points: bool) -> None:
    rows = samples(96, np.float32)[:3]
    codec = NBitsCodec(depth, 32, 96, "F32", zero_points)
    step = np.abs(rows).max() * 2 / codec.steps
    assert np.abs(codec.decode(codec.encode(rows)) - rows).max() <= 1.01 * step


@pytest.mark.parametrize(("first", "last"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("scale", ["F16", "BF16"])
def test_ways_to_narrow_are_told_apart(scale: str, first: bool, last: bool) -> None:
    rows = samples(1024, np.float32)[:8]
    made = NBitsCodec(4, 32, 1024, scale, True, narrow_first=first, narrow_last=last)
    for last in (False, True):
        assert NBitsCodec(4, 32, 1024, scale, True, narrow_last=last).fitted(rows, made.encode(rows)) == made


def test_scales_of_bf16_are_narrowed_late() -> None:
    """As onnxruntime's quantizer does it, which widens such weights first."""
    rows = samples(128, np.float32)[:9].astype(ml_dtypes.bfloat16).astype(np.float32)
    wide, narrow = NBitsCodec(4, 32, 128, "F32", False), NBitsCodec(4, 32, 128, "BF16", False, narrow_last=True)
    numbers = narrow.parts[0]
    assert np.array_equal(wide.encode(rows)[:, :numbers], narrow.encode(rows)[:, :numbers])
    scales = np.ascontiguousarray(wide.encode(rows)[:, numbers:]).view(np.float32)
    assert np.array_equal(narrow.encode(rows)[:, numbers:], scales.astype(ml_dtypes.bfloat16).view(np.uint8))


def test_other_quantizers_are_refused() -> None:
    rows = samples(128, np.float32)[-8:]
    codec = NBitsCodec(4, 32, 128, "F32", False)
    stored = codec.encode(rows)
    other = codec.encode(rows * np.float32(1.01))
    assert codec.fitted(rows, np.where(np.arange(8)[:, None] < 4, stored, other)) == codec, "half of the rows may be patched"
    with pytest.raises(QuantizationError, match="not quantized by onnxruntime's default quantizer"):
        codec.fitted(rows, np.where(np.arange(8)[:, None] < 3, stored, other))


def test_rows_that_end_inside_a_byte_are_refused() -> None:
    with pytest.raises(QuantizationError, match="end inside a byte"):
        NBitsCodec(4, 16, 33, "F32", False).require()
    NBitsCodec(8, 16, 33, "F32", False).require()
