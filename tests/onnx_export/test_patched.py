"""Exporting with a patch is exporting the patched model."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import onnx_ir
import pytest

import nestpatch
from nestpatch.errors import BusyError, DataError, OutputError, PackContentError, ParityError, UnsupportedModelError
from nestpatch.events import ignore
from nestpatch.export._source import open_request, source_of
from nestpatch.export.onnx import _graph as graphs
from nestpatch.export.onnx._quantize import quantize_graph
from nestpatch.export.onnx.exporter import _load, export_onnx, save
from nestpatch.formats import nest
from nestpatch.gate import prove
from nestpatch.pack import Pack
from tests.helpers import load_tensors, tiny_pack, tree_digest
from tests.onnx_export.runs import facts, unsigned
from tests.schemas import require_schema


@pytest.fixture(scope="module")
def pack(sources):
    return tiny_pack(sources("small", "bfloat16"), scale=0.2)


@pytest.fixture(scope="module")
def patched(sources, pack, tmp_path_factory):
    return export_onnx(sources("small", "bfloat16"), pack, tmp_path_factory.mktemp("x") / "patched", strength=0.75)


def test_a_patched_export_is_the_export_of_the_patched_model(sources, pack, patched, exports, tmp_path):
    source = sources("small", "bfloat16")
    before = tree_digest(source)
    nestpatch.apply(source, pack, tmp_path / "merged", strength=0.75)
    merged = export_onnx(tmp_path / "merged", output=tmp_path / "onnx")
    digests = [{file.name: file.sha256 for file in done.files} for done in (patched, merged)]
    assert digests[0]["model.onnx_data"] == digests[1]["model.onnx_data"]
    assert unsigned(patched.output) == unsigned(merged.output)
    assert digests[0]["model.onnx_data"] != exports("small", "bfloat16").files[1].sha256
    assert tree_digest(source) == before
    # The copy has a ledger, so its export names the pack too.
    assert patched.packs == merged.packs == ("no-harm 1.0.0",)


def test_patching_an_export_is_exporting_the_patched_model(sources, pack, patched, exports, tmp_path):
    """In place, with the bfloat16 model at hand: the bytes of its merged rows, widened."""
    model = shutil.copytree(exports("small", "bfloat16").output, tmp_path / "model")
    nestpatch.apply_in_place(model, pack, base=sources("small", "bfloat16"), strength=0.75)
    assert (model / "model.onnx_data").read_bytes() == (patched.output / "model.onnx_data").read_bytes()
    nestpatch.revert(model)
    assert (model / "model.onnx_data").read_bytes() == (exports("small", "bfloat16").output / "model.onnx_data").read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_patching_a_quantized_export_is_quantizing_the_patched_model(sources, pack, patched, exports, tmp_path, bits):
    for name, floats in (("base", exports("small", "bfloat16").output), ("goal", patched.output)):
        model = onnx_ir.load(str(floats / "model.onnx"))
        quantize_graph(model, bits)
        (tmp_path / name).mkdir()
        save(model, tmp_path / name)
    nestpatch.apply_in_place(tmp_path / "base", pack, base=sources("small", "bfloat16"), strength=0.75)
    got, wanted = ((tmp_path / name / "model.onnx_data").read_bytes() for name in ("base", "goal"))
    assert got == wanted


def test_the_graph_says_what_is_in_it(pack, patched, exports):
    require_schema({"model": "base", **patched.as_json()}, "export --to onnx")
    said = facts(patched.output)
    listed = {"name": "no-harm", "version": "1.0.0", "pack_id": nest.pack_id(pack), "strength": 0.75}
    assert json.loads(said["nestpatch.packs"]) == [listed]
    assert said["nestpatch.version"] == nestpatch.__version__
    assert "nestpatch.packs" not in facts(exports("llama").output)


def test_bfloat16_becomes_float32_and_is_told(patched):
    assert any("bfloat16 weights became fp32" in note for note in patched.notes)


def prepared(model, pack, folder):
    """(what is exported, the loaded model, tokenizer)."""
    request = open_request(model, prove(pack, trust="none"), 1.0)
    with source_of(request, folder / "out", on_event=ignore) as source:
        return source, *_load(request, source, ignore)


def assert_holds(loaded, folder):
    """The loaded weights are those of a directory."""
    stored = load_tensors(folder)
    for name, value in loaded.named_parameters():
        assert np.array_equal(value.numpy(), stored[name].astype(np.float32)), name


def test_an_applied_pack_is_not_merged_twice(sources, pack, tmp_path):
    nestpatch.apply(sources("small", "bfloat16"), pack, tmp_path / "merged")
    done, loaded, _ = prepared(tmp_path / "merged", pack, tmp_path)
    assert done.labels == ("no-harm 1.0.0",)
    assert_holds(loaded, tmp_path / "merged")


@pytest.mark.parametrize("whole", [True, False], ids=["directory", "file"])
def test_an_older_version_is_undone_first(sources, pack, tmp_path, whole):
    base = sources("small", "bfloat16")
    older = tiny_pack(base, seed=5, version="0.9.0")
    nestpatch.apply(base, older, tmp_path / "model")
    model = tmp_path / "model"
    if not whole:  # a file of any other name has a ledger of its own
        model = tmp_path / "model" / "weights.safetensors"
        # The state of what was there goes with it: one file has one state.
        (tmp_path / "model" / "model.safetensors").unlink()
        (tmp_path / "model" / "nestpatch.json").unlink()
        shutil.rmtree(tmp_path / "model" / ".nestpatch")
        nestpatch.apply(base / "model.safetensors", older, model)
    before = tree_digest(tmp_path / "model")
    source, loaded, _ = prepared(model, pack, tmp_path)
    assert source.labels == ("no-harm 1.0.0",)
    assert tree_digest(tmp_path / "model") == before
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    nestpatch.apply(base, pack, tmp_path / "wanted")
    assert_holds(loaded, tmp_path / "wanted")


def test_a_dry_run_checks_and_writes_nothing(sources, pack, tmp_path):
    done = export_onnx(sources("small", "bfloat16"), pack, tmp_path / "out", dry_run=True)
    assert done.dry_run
    assert done.packs == ("no-harm 1.0.0",)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(nestpatch.errors.BaseMismatchError):
        export_onnx(sources("llama"), pack, tmp_path / "out", dry_run=True)


def test_a_pack_that_promises_other_rows_is_refused(sources, pack, tmp_path):
    wrong = dict.fromkeys(pack.manifest.result, "0" * 64)
    lying = Pack(dataclasses.replace(pack.manifest, result=wrong), pack.deltas)
    with pytest.raises(PackContentError, match=r"not those that no-harm 1\.0\.0 promises"):
        export_onnx(sources("small", "bfloat16"), lying, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": "bf16"}, "'bf16' is not a type"),
        ({"bits": 3}, "4 or 8 bits"),
        ({"strength": 2.0}, "strength"),
        ({"adapter_ready": True}, "its packs are added at run time"),
    ],
)
def test_senseless_wishes_are_refused_before_any_work(sources, pack, tmp_path, options, reason):
    with pytest.raises(DataError, match=reason):
        export_onnx(sources("small", "bfloat16"), pack, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_or_impossible_place_is_refused(sources, tmp_path):
    (tmp_path / "taken").mkdir()
    for place in (tmp_path / "taken", tmp_path / "no" / "folder"):
        with pytest.raises(OutputError):
            export_onnx(sources("small"), output=place)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        # Its rotary frequencies depend on how long the text is: code that looks into a tensor.
        ("dynamic", "torch cannot trace LlamaForCausalLM"),
        ("experts", "MixtralForCausalLM is a mixture of experts"),
        ("recurrent", "MambaForCausalLM keeps no keys and values"),
    ],
)
def test_a_model_that_no_graph_can_hold_is_refused_with_the_reason(sources, tmp_path, family, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        export_onnx(sources(family), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_refused(sources, tmp_path, monkeypatch):
    right = graphs.decoder_graph

    def wrong(model, shapes):
        """One weight of one feed-forward block is off."""
        with_error = right(model, shapes)
        weight = with_error.graph.initializers["model.layers.0.mlp.up_proj.MatMul.weight"].const_value
        weight.numpy()[3, 5] += 3.0
        return with_error

    monkeypatch.setattr(graphs, "decoder_graph", wrong)
    with pytest.raises(ParityError, match="differs from its model"):
        export_onnx(sources("small"), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_changes_meanwhile_is_not_exported(sources, tmp_path):
    model = shutil.copytree(sources("small"), tmp_path / "model")

    def interfere(event):
        if event.stage == "onnx.check":
            with open(model / "model.safetensors", "r+b") as file:
                file.seek(-4, 2)
                file.write(b"\x00\x00\x00\x01")

    with pytest.raises(BusyError, match="was changed while it was exported"):
        export_onnx(model, output=tmp_path / "out", on_event=interfere)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
