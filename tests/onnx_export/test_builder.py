"""Models of onnxruntime-genai's own builder: patching what it made is building the patched model, byte for byte."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import nestpatch
from nestpatch.patcher.verify import Verdict
from tests.helpers import FUSED, tiny_pack, tree_digest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed"
)


def build(source, target, precision):
    """What `python -m onnxruntime_genai.models.builder` makes of a model directory, for CPUs."""
    module, places = "onnxruntime_genai.models.builder", ["-i", source, "-o", target, "-c", f"{target}.cache"]
    command = [sys.executable, "-m", module, *map(str, places), "-p", precision, "-e", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return target


@pytest.mark.parametrize(
    ("family", "dtype", "precision"),
    [("llama", "bfloat16", "fp32"), ("llama", "bfloat16", "int4"), ("phi3", "float32", "int4"), ("qwen3", "float32", "fp32")],
)
def test_patched_is_building_the_merged_model(sources, tmp_path, family, dtype, precision):
    source = sources(family, dtype)
    pack = tiny_pack(source, scale=0.2, tensors=FUSED if family == "phi3" else None)
    nestpatch.apply(source, pack, tmp_path / "merged")
    wanted = build(tmp_path / "merged", tmp_path / "wanted", precision) / "model.onnx.data"
    model = build(source, tmp_path / "model", precision)
    before = tree_digest(model)
    assert (model / "model.onnx.data").read_bytes() != wanted.read_bytes()
    nestpatch.apply_in_place(model, pack, base=source)
    assert (model / "model.onnx.data").read_bytes() == wanted.read_bytes()
    assert nestpatch.verify(model).verdict is Verdict.PATCHED
    nestpatch.revert(model)
    assert {name: digest for name, digest in tree_digest(model).items() if name in before} == before
