"""Training on the numbers of a quantized GGUF file: the pack names the blocks, and folds into what was loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.checkpoint import float_rows
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import disk_name, fold, merged_parameters
from tests.gguf_files import write_gguf
from tests.helpers import load_tensors
from tests.nest_train.test_train import FAST, data, prompts  # noqa: F401 - fixtures

KINDS = ["Q8_0", "Q4_1"]


@pytest.fixture(params=KINDS)
def loaded(request: pytest.FixtureRequest, models, tmp_path: Path) -> tuple[Path, Path]:
    """A quantized GGUF file, and a folder with its numbers as transformers loads them."""
    file = write_gguf(models("llama"), tmp_path / "m.gguf", request.param)
    checkpoint, folder = open_checkpoint(file), Path(shutil.copytree(models("llama"), tmp_path / "loaded"))
    tensors = load_tensors(folder)
    for name in tensors:
        if ".mlp." in name:
            tensors[name] = float_rows(checkpoint, name, np.arange(len(tensors[name])))
    save_file(tensors, folder / "model.safetensors")
    return file, folder


def test_a_pack_of_a_quantized_base(loaded, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from nestpatch.nest_train import _run as module

    file, folder = loaded
    checkpoint = open_checkpoint(file)
    monkeypatch.setattr(module, "open_model", lambda _: (checkpoint, None))
    pack = train(folder, data, Label("test"), recipe=FAST).pack
    assert pack.manifest.format == "nest/2"
    assert (verify(file, pack, full=True).verdict, verify(file, pack).by) == (Verdict.BASE, "digests")
    before = file.read_bytes()
    apply_in_place(file, pack, dither=True)
    assert verify(file).verdict is Verdict.PATCHED
    revert(file)
    assert file.read_bytes() == before

    model, _ = load_model(folder, "cpu", "float32")
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        fold(model, checkpoint, pack)
    for delta in pack:
        wanted = old[delta.name].clone()
        wanted[torch.from_numpy(delta.rows.astype(np.int64))] += torch.from_numpy(delta.dense())
        assert torch.equal(model.get_parameter(delta.name), wanted)
    with pytest.raises(CheckpointFormatError, match="is not the weight that transformers loaded"):
        list(merged_parameters(model, checkpoint, pack))


def test_names_of_a_converted_file(loaded) -> None:
    checkpoint = open_checkpoint(loaded[0])
    name = "model.layers.0.mlp.gate_proj.weight"
    assert disk_name(name, checkpoint) == name
    with pytest.raises(UnsupportedModelError, match="another order"):
        disk_name("model.layers.0.self_attn.q_proj.weight", checkpoint)
    with pytest.raises(CheckpointFormatError, match="candidates: none"):
        disk_name("nothing.weight", checkpoint)
