"""A base that takes patches at run time: with the adapter of a pack it computes what the merged model computes."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from nestpatch.errors import BaseMismatchError, CheckpointFormatError, DataError, OutputError, UnsupportedModelError
from nestpatch.export.adapters import export_onnx_adapter
from nestpatch.export.onnx._adapter_ready import add_inputs
from nestpatch.export.onnx._quantize import quantize_graph
from nestpatch.export.onnx.exporter import save
from nestpatch.formats import nest
from nestpatch.formats.lora.onnx import onnx_file, read_inputs
from nestpatch.formats.provenance import PACKS, packs_json
from nestpatch.pack import Pack
from nestpatch.patcher.inplace import apply_in_place, revert
from tests.helpers import FUSED, tiny_pack, tree_digest
from tests.onnx_export.runs import Run, batch, facts, reference


@pytest.fixture(scope="module", params=["llama", "phi3"])
def family(request):
    return request.param


def pack_of(family, sources, kind):
    tensors = FUSED if family == "phi3" else None
    return tiny_pack(sources(family), scale=0.3, clusters=3, delta_dtype="F32", tensors=tensors, kind=kind)


@pytest.fixture(scope="module")
def pack(family, sources):
    return pack_of(family, sources, "mixed")


@pytest.fixture(scope="module")
def ready(family, exports):
    return exports(family, adapter_ready=True)


@pytest.fixture(scope="module")
def adapter(pack, ready, tmp_path_factory):
    return export_onnx_adapter(pack, tmp_path_factory.mktemp("adapter") / "patch.onnx_adapter", model=ready.output)


def merged(model, pack, strength=1.0):
    """The model with the change of a pack added to its float32 weights."""
    with torch.no_grad():
        for delta in pack:
            weight = model.get_parameter(delta.name)
            weight[torch.from_numpy(delta.rows.astype(np.int64))] += strength * torch.from_numpy(delta.dense())
    return model


def compared(run, model, ids, mask):
    """(largest difference of logits, their deviation)."""
    wanted, real = reference(model, ids, mask), mask.astype(bool)
    return np.abs(run(ids, mask) - wanted)[real].max(), wanted[real].std()


def test_the_adapter_makes_the_merged_model(family, sources, torch_model, pack, ready, adapter):
    ids, mask = batch(3, 24, (0, 7, 20))
    model = torch_model(sources(family))
    without = Run(ready.output / "model.onnx")
    distance, _ = compared(without, model, ids, mask)
    assert distance < 1e-4, "without an adapter it is the base"
    with_it = Run(ready.output / "model.onnx", adapter.output)
    effect, deviation = compared(Run(ready.output / "model.onnx", adapter.output), model, ids, mask)
    assert effect > 0.1 * deviation, "the patch must matter for this test to say anything"
    distance, _ = compared(with_it, merged(model, pack), ids, mask)
    assert distance < 1e-4


def test_the_result_counts(family, pack, ready, adapter):
    matrices = 2 if family == "phi3" else 4
    assert (adapter.pack, adapter.pack_id) == ("no-harm 1.0.0", nest.pack_id(pack))
    assert (adapter.matrices, adapter.rank, ready.adapter_weights) == (matrices, 3, matrices)
    assert adapter.format == "onnx-adapter"
    assert adapter.nbytes == adapter.output.stat().st_size < 10_000


def test_the_strength_is_in_the_adapter(family, sources, torch_model, pack, ready, tmp_path):
    made = export_onnx_adapter(pack, tmp_path / "half.onnx_adapter", model=ready.output, strength=0.5)
    ids, mask = batch(2, 20, seed=4)
    model = merged(torch_model(sources(family)), pack, 0.5)
    distance, _ = compared(Run(ready.output / "model.onnx", made.output), model, ids, mask)
    assert distance < 1e-4


def test_a_graph_has_the_usual_inputs_and_others_that_nobody_has_to_give(family, ready):
    session = onnxruntime.InferenceSession(str(ready.output / "model.onnx"), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    assert names == {"input_ids", "attention_mask", "position_ids"} | {
        f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")
    }
    part = "gate_up_proj" if family == "phi3" else "gate_proj"
    extra = {value.name for value in session.get_overridable_initializers()}
    assert {f"model.layers.0.mlp.{part}.nest_{what}" for what in ("delta", "factors", "map")} <= extra
    assert all(name.endswith((".nest_delta", ".nest_factors", ".nest_map")) for name in extra)


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_work_on_quantized_matrices(family, bits, exports, ready, sources, torch_model, pack, tmp_path):
    model = onnx_ir.load(str(exports(family).output / "model.onnx"))
    quantize_graph(model, bits)
    add_inputs(model, {name: name for name in read_inputs(ready.output).inputs})
    model.metadata_props.update(facts(ready.output))
    save(model, tmp_path)
    made = export_onnx_adapter(pack, tmp_path / "patch.onnx_adapter", model=tmp_path)
    ids, mask = batch(3, 24, (0, 7, 20))
    plain = torch_model(sources(family))
    before, _ = compared(Run(tmp_path / "model.onnx"), plain, ids, mask)
    untouched, deviation = compared(Run(tmp_path / "model.onnx", made.output), plain, ids, mask)
    after, _ = compared(Run(tmp_path / "model.onnx", made.output), merged(plain, pack), ids, mask)
    # What is left is the rounding of the matrices, which the patched model has as the base had: of other activations.
    assert after < 3 * before
    assert bits == 4 or after < untouched / 3
    assert deviation > 0.5


def test_an_export_of_everything_at_once(exports, sources, torch_model, tmp_path):
    done = exports("small", "bfloat16", dtype="fp16", bits=8, adapter_ready=True)
    pack = tiny_pack(sources("small", "bfloat16"), scale=0.3)
    made = export_onnx_adapter(pack, tmp_path / "patch.onnx_adapter", model=done.output)
    assert read_inputs(done.output).dtype == np.float16
    ids, mask = batch(2, 20)
    model = merged(torch_model(sources("small", "bfloat16")), pack)
    distance, deviation = compared(Run(done.output / "model.onnx", made.output), model, ids, mask)
    assert distance < 0.5 * deviation


def test_a_model_that_is_not_the_base_is_refused(pack, ready, tmp_path):
    other = dataclasses.replace(
        pack.manifest.base,
        tensors={name: dataclasses.replace(t, sha256="0" * 64) for name, t in pack.manifest.base.tensors.items()},
    )
    foreign = Pack(dataclasses.replace(pack.manifest, base=other), pack.deltas)
    with pytest.raises(BaseMismatchError, match="was not made from the base of no-harm"):
        export_onnx_adapter(foreign, tmp_path / "x.onnx_adapter", model=ready.output)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_has_the_pack_already_is_refused(pack, ready, tmp_path):
    model = onnx_ir.load(str(ready.output / "model.onnx"))
    model.metadata_props[PACKS] = packs_json(pack, 1.0)
    save(model, tmp_path)
    before = tree_digest(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"hold no-harm 1\.0\.0 already"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=tmp_path)
    assert tree_digest(tmp_path) == before


def test_a_model_that_was_patched_where_it_lies_is_refused(pack, ready, tmp_path):
    """Its record is still that of the base: the rows tell."""
    model = shutil.copytree(ready.output, tmp_path / "model")
    apply_in_place(model, pack)
    with pytest.raises(BaseMismatchError, match="not the base of no-harm"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=model)
    revert(model)
    export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=model)


def test_a_model_without_the_inputs_is_refused(family, pack, exports, tmp_path):
    with pytest.raises(UnsupportedModelError, match="takes no packs at run time") as caught:
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=exports(family).output)
    assert "--adapter-ready" in caught.value.advice


def test_weights_without_inputs_are_named(sources, exports, tmp_path):
    pack = tiny_pack(sources("llama"), tensors=["model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(UnsupportedModelError, match=r"takes no patch of model.layers.0.mlp.down_proj.weight$"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=exports("llama", adapter_ready=True).output)


@pytest.mark.parametrize(
    "said",
    [
        '{"format": "nest-adapter/1", "weights": {"a.weight": {"shape": [3, 4], "sha256": ""}}}',
        '{"format": "nest-adapter/1", "weights": {}}',
        '{"format": "nest-adapter/1", "weights": []}',
        '{"format": "nest-adapter/2", "weights": {}}',
        '{"format": "nest-adapter/3", "weights": {}}',
        '{"format": "nest-adapter/1"}',
        "[]",
        "{",
        "[" * 5000,
    ],
)
def test_broken_records_are_refused(pack, ready, tmp_path, said):
    model = onnx_ir.load(str(ready.output / "model.onnx"))
    model.metadata_props["nestpatch.adapter"] = said
    save(model, tmp_path)
    with pytest.raises(CheckpointFormatError, match="adapters"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=tmp_path)


def test_models_of_before_there_were_factors_take_clusters(family, sources, torch_model, ready, tmp_path):
    """The graph that such a model has: one product, and the column of zeros among the vectors."""
    model = onnx_ir.load(str(ready.output / "model.onnx"))
    for node in [node for node in model.graph if node.name.endswith(".nest/Factors")]:
        onnx_ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        value = node.inputs[1]
        model.graph.remove(node, safe=True)
        model.graph.inputs.remove(value)
        del model.graph.initializers[value.name]
    record = model.metadata_props["nestpatch.adapter"]
    model.metadata_props["nestpatch.adapter"] = record.replace("nest-adapter/2", "nest-adapter/1")
    save(model, tmp_path)
    output = tmp_path / "x.onnx_adapter"
    with pytest.raises(UnsupportedModelError, match="before changes of low rank") as caught:
        export_onnx_adapter(pack_of(family, sources, "low rank"), output, model=tmp_path)
    assert "--adapter-ready" in caught.value.advice
    pack = pack_of(family, sources, "clusters")
    assert export_onnx_adapter(pack, output, model=tmp_path).rank == 3
    ids, mask = batch(3, 24, (0, 7, 20))
    distance, _ = compared(Run(tmp_path / "model.onnx", output), merged(torch_model(sources(family)), pack), ids, mask)
    assert distance < 1e-4


def test_what_is_no_model_is_refused(pack, tmp_path):
    with pytest.raises(CheckpointFormatError, match="there is no ONNX model"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointFormatError, match="is not a sound ONNX model"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=tmp_path)


def test_places_and_strengths_are_checked(pack, ready, tmp_path):
    done = export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=ready.output, dry_run=True)
    assert done.dry_run
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.onnx_adapter").write_bytes(b"taken")
    with pytest.raises(OutputError, match="exists already"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=ready.output)
    with pytest.raises(DataError, match="strength"):
        export_onnx_adapter(pack, tmp_path / "y.onnx_adapter", model=ready.output, strength=7.0)


def unknown_operator(model):
    next(node for node in model.graph if node.op_type == "Softmax").op_type = "NoSuchOperator"


def no_number(model):
    weight = model.graph.initializers["model.norm.weight"]
    weight.const_value = onnx_ir.tensor(np.full(64, np.nan, np.float32), name="model.norm.weight")


@pytest.mark.parametrize(
    ("damage", "reason"), [(unknown_operator, "onnxruntime cannot run"), (no_number, "no finite numbers with the adapter")]
)
def test_an_adapter_that_the_model_does_not_run_with_is_not_written(pack, ready, tmp_path, damage, reason):
    model = onnx_ir.load(str(ready.output / "model.onnx"))
    damage(model)
    save(model, tmp_path)
    before = tree_digest(tmp_path)
    with pytest.raises(OutputError, match=reason):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=tmp_path)
    assert tree_digest(tmp_path) == before


def test_an_onnx_file_is_found_where_tools_put_it(tmp_path):
    assert onnx_file(tmp_path) is None
    (tmp_path / "decoder.onnx").touch()
    assert onnx_file(tmp_path) == tmp_path / "decoder.onnx"
    (tmp_path / "other.onnx").touch()
    assert onnx_file(tmp_path) is None
    assert onnx_file(tmp_path / "other.onnx") == tmp_path / "other.onnx"
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    assert onnx_file(tmp_path) == tmp_path / "onnx" / "model.onnx"
    (tmp_path / "model.onnx").touch()
    assert onnx_file(tmp_path) == tmp_path / "model.onnx"
    assert onnx_file(tmp_path / "none.onnx") is None


def test_numbers_that_half_floats_cannot_hold_are_refused(sources, exports, tmp_path):
    done = exports("small", "bfloat16", dtype="fp16", bits=8, adapter_ready=True)
    pack = tiny_pack(sources("small", "bfloat16"), scale=1e5, delta_dtype="F32")
    with pytest.raises(UnsupportedModelError, match="float16 cannot hold"):
        export_onnx_adapter(pack, tmp_path / "x.onnx_adapter", model=done.output)
