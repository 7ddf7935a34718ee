"""Smaller types: half floats, and matrices of 8 and 4 bits as onnxruntime's own quantizer makes them."""

from __future__ import annotations

import json
import logging

import numpy as np
import onnx
import onnx_ir
import pytest

from nestpatch.errors import QuantizationError
from nestpatch.export.onnx._quantize import quantize, quantize_matrix, require_faithful
from nestpatch.export.onnx.exporter import save
from nestpatch.runtimes.onnx import OnnxRuntime
from tests.onnx_export.runs import Run, batch, reference, weights


@pytest.fixture(scope="module")
def four(exports):
    return exports("llama-tied", bits=4)


def by_onnxruntime(model, bits):
    """What onnxruntime's quantizer makes of it."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    root.setLevel(level)
    root.handlers[:] = handlers
    made = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=True, accuracy_level=4)
    made.process()
    return made.model.model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_matrices_are_those_of_onnxruntimes_quantizer(family, bits, exports, tmp_path):
    floats = exports(family).path / "model.onnx"
    ours = onnx_ir.load(str(floats))
    count = quantize(ours, bits)
    save(ours, tmp_path)
    got = weights(tmp_path)
    theirs = by_onnxruntime(onnx.load(str(floats)), bits)
    wanted = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in theirs.graph.initializer}
    packed = [name for name in wanted if name.endswith(f"_Q{bits}") and "lm_head" not in name]
    assert len(packed) == count - 1, "all but the head, which has 8 bits"
    for name in packed:
        scales = name.removesuffix(f"_Q{bits}") + "_scales"
        assert np.array_equal(got[name], wanted[name])
        assert np.array_equal(got[scales], wanted[scales])
    nodes = {node.name: node for node in onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.node}
    for node in theirs.graph.node:
        if node.op_type == "MatMulNBits" and "lm_head" not in node.name:
            assert sorted(map(str, node.attribute)) == sorted(map(str, nodes[node.name].attribute))
            assert list(node.input) == list(nodes[node.name].input)


def test_no_float_matrix_is_left_but_the_embeddings(four):
    stored = weights(four.path)
    left = [name for name, value in stored.items() if value.ndim == 2 and value.dtype == np.float32 and "scales" not in name]
    assert left == ["model.embed_tokens.weight"]
    assert stored["lm_head.MatMul.weight_Q8"].shape == (320, 2, 32)
    assert stored["model.layers.1.mlp.down_proj.MatMul.weight_Q4"].shape == (64, 3, 16)
    assert four.matrices == 15
    assert four.bits == 4
    assert [part.type for part in four.parity] == ["fp32", "int4"]
    assert four.parity[0].passed
    assert sorted(file.name for file in four.path.iterdir())[:3] == ["chat_template.jinja", "config.json", "genai_config.json"]
    assert not list(four.path.glob("*.tmp"))


@pytest.mark.parametrize(("bits", "least"), [(4, 0.85), (8, 0.999)])
def test_quantized_graphs_run_and_resemble_the_model(bits, least, exports, four, sources, torch_model, tmp_path):
    if bits == 4:
        folder = four.path
    else:
        model, folder = onnx_ir.load(str(exports("llama-tied").path / "model.onnx")), tmp_path
        quantize(model, bits)
        save(model, tmp_path)
    ids, mask = batch(3, 24, (0, 7, 20))
    wanted = reference(torch_model(sources("llama-tied")), ids, mask)[mask.astype(bool)]
    run = Run(folder / "model.onnx")
    whole = run(ids, mask)
    got = whole[mask.astype(bool)]
    assert np.corrcoef(got.ravel(), wanted.ravel())[0, 1] > least
    again = Run(folder / "model.onnx")
    steps = np.concatenate([again(ids[:, :10], mask[:, :10]), again(ids[:, 10:], mask)], 1)
    # Rounding activations can jump, so a step may differ a little more than floats would.
    assert np.abs(steps - whole)[mask.astype(bool)].max() < 0.05 * wanted.std()
    (answer,) = OnnxRuntime(folder, threads=1).greedy([ids[0].tolist()], 5, ends=())
    assert len(answer) == 5


def test_blocks_that_are_not_the_weights_are_noticed():
    weight = np.random.default_rng(0).standard_normal((70, 40)).astype(np.float32)
    for bits in (4, 8):
        packed, scales = quantize_matrix(weight, bits)
        require_faithful(weight, packed, scales, bits, "w")
        assert np.array_equal(quantize_matrix(np.asfortranarray(weight), bits)[0], packed)
        with pytest.raises(QuantizationError, match="w: onnxruntime's"):
            require_faithful(weight, packed[::-1], scales, bits, "w")


def test_half_floats_stay_close(exports, sources, torch_model):
    done = exports("qwen3", dtype="fp16")
    ids, mask = batch(3, 24, (0, 7, 20))
    wanted, real = reference(torch_model(sources("qwen3")), ids, mask), mask.astype(bool)
    assert np.abs(Run(done.path / "model.onnx")(ids, mask) - wanted)[real].max() < 0.05 * wanted.std()
    stored = weights(done.path)
    assert {value.dtype.name for value in stored.values() if value.ndim == 2} == {"float16"}
    # As in transformers, whatever the dtype of the weights.
    assert stored["model.rotary_emb.inv_freq"].dtype == np.float32
    config = json.loads((done.path / "config.json").read_text())
    assert config["transformers.js_config"]["kv_cache_dtype"] == "float16"
