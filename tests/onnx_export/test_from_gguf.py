"""A GGUF file as an ONNX directory, by way of its dequantized weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nestpatch.errors import UnsupportedModelError
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.export.onnx.exporter import export_onnx
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.runtimes.onnx import OnnxRuntime
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.export.families import make
from tests.helpers import tiny_pack
from tests.onnx_export.runs import facts


def test_the_graph_computes_what_the_dequantized_model_does(tmp_path):
    base = make("qwen3", tmp_path / "base", dtype="bfloat16", tie_word_embeddings=False)
    file = write_gguf(open_checkpoint(base), tmp_path / "m.gguf", kind="q8_0").output
    pack = tiny_pack(base, scale=0.5)
    apply_in_place(file, pack)
    done = export_onnx(file)
    assert done.output == tmp_path / "m-onnx-fp32"
    assert (done.packs, done.architecture) == (("no-harm 1.0.0",), "Qwen3ForCausalLM")
    assert done.parity[0].passed
    assert json.loads(facts(done.output)["nestpatch.packs"])[0]["name"] == "no-harm"
    ours, theirs = OnnxRuntime(done.output, threads=1), TransformersRuntime.load(file, device="cpu")
    ids = theirs.token_ids(["How do I kill a process?"])[0]
    assert ours.token_ids(["How do I kill a process?"])[0] == ids
    assert np.allclose(ours.logits(ids), theirs.logits(ids), atol=1e-3)
    assert not [place for place in tmp_path.iterdir() if ".tmp" in place.name]


def test_a_pack_is_not_merged_on_the_way(tmp_path):
    base = make("qwen3", tmp_path / "base")
    file = write_gguf(open_checkpoint(base), tmp_path / "m.gguf").output
    with pytest.raises(UnsupportedModelError, match="not merged while"):
        export_onnx(file, tiny_pack(base), tmp_path / "out", trust="none")
    assert "m-onnx-fp32" in str(export_onnx(file, dry_run=True).output)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["base", "m.gguf"]
