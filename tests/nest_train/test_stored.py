"""Which tensors on disk the weights of a loaded model come from, whatever transformers does with them while loading."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.opening import open_checkpoint
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.stored import Home, StoredWeights
from tests.helpers import load_tensors


def stored_at(folder: Path, loaded: Path | None = None) -> tuple[Any, StoredWeights]:
    """The model of a directory, and its weights there, or in another directory."""
    model, _ = load_model(loaded or folder, "cpu", "float32")
    return model, StoredWeights(model, open_checkpoint(folder))


def renamed(base: Path, folder: Path, change: Any) -> Path:
    """The same model with other names of tensors; those that become None are left out."""
    shutil.copytree(base, folder)
    tensors = {change(name): values for name, values in load_tensors(base).items() if change(name)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def names(stored: StoredWeights, parameter: str) -> list[str]:
    return [tensor for _, tensor in stored.tensors(parameter)]


GATE = "model.layers.1.mlp.gate_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def test_names_on_disk_may_lack_the_prefix(models: Any, tmp_path: Path) -> None:
    folder = renamed(models("llama-tied"), tmp_path / "bare", lambda name: name.removeprefix("model."))
    _, stored = stored_at(folder)
    assert names(stored, GATE) == [GATE.removeprefix("model.")]
    stored.require_same(GATE, np.arange(64))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen2-vl", "model.layers.1.", "model.language_model.layers.1."),
        ("gemma3-vl", "language_model.model.layers.1.", "model.language_model.layers.1."),
    ],
)
def test_vision_language_models_may_have_old_or_new_names(models: Any, tmp_path: Path, family: str, old: str, new: str) -> None:
    parameter = "model.language_model.layers.1.mlp.up_proj.weight"
    for folder, name in (
        (models(family), old),
        (renamed(models(family), tmp_path / "new", lambda name: name.replace(old, new)), new),
    ):
        _, stored = stored_at(folder)
        assert names(stored, parameter) == [f"{name}mlp.up_proj.weight"]
        stored.require_same(parameter, np.arange(64))


@pytest.mark.parametrize(
    ("family", "single", "neurons"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.{}.{}.weight", 64),
        ("qwen3-moe", "model.layers.1.mlp.experts.{}.{}.weight", 48),
    ],
)
def test_a_stack_of_experts_is_one_tensor_or_many(models: Any, family: str, single: str, neurons: int) -> None:
    parts = ("w1", "w3") if family == "mixtral" else ("gate_proj", "up_proj")
    model, stored = stored_at(models(family))
    assert names(stored, STACK) == [single.format(expert, part) for expert in range(4) for part in parts]
    rows = np.asarray([0, neurons, 5 * neurons + 3, 8 * neurons - 1])
    found = [(some.tensor, some.part, some.rows.tolist()) for some in stored.split(STACK, rows)]
    wanted = [(0, 0, 0), (0, 1, 0), (2, 1, 3), (3, 1, neurons - 1)]
    assert found == [
        (single.format(expert, parts[part]), slice(place, place + 1), [row]) for place, (expert, part, row) in enumerate(wanted)
    ]
    assert stored.home(single.format(2, parts[1])) == Home(STACK, 5 * neurons, neurons)
    tensors = load_tensors(models(family))
    assert torch.equal(stored.matrix(single.format(2, parts[1])), torch.from_numpy(tensors[single.format(2, parts[1])].copy()))
    stored.require_same(STACK, np.arange(8 * neurons))
    _, stacked = stored_at(models(f"{family}-stacked"))
    assert names(stacked, STACK) == [STACK]
    stacked.require_same(STACK, np.arange(8 * neurons))
    assert torch.equal(stacked.matrix(STACK), model.get_parameter(STACK).flatten(0, 1))


def test_other_rows_are_noticed(models: Any, tmp_path: Path) -> None:
    tensors = {name: values.copy() for name, values in load_tensors(models("mixtral")).items()}
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][7, 0] += 1
    other = shutil.copytree(models("mixtral"), tmp_path / "other")
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    _, stored = stored_at(other, models("mixtral"))
    stored.require_same(STACK, np.asarray([0, 64 * 5 + 6, 64 * 5 + 8]))
    with pytest.raises(CheckpointFormatError, match=r"experts\.2\.w3\.weight of .* is not the weight that transformers loaded"):
        stored.require_same(STACK, np.asarray([0, 64 * 5 + 7]))


def test_a_missing_expert_is_noticed(models: Any, tmp_path: Path) -> None:
    base = models("mixtral")
    fewer = renamed(base, tmp_path / "fewer", lambda name: None if "1.block_sparse_moe.experts.2.w3" in name else name)
    _, stored = stored_at(fewer, base)
    with pytest.raises(CheckpointFormatError, match=f"no tensor for the parameter {STACK} "):
        stored.tensors(STACK)
    with pytest.raises(CheckpointFormatError, match=r"no parameter for elsewhere\.weight"):
        stored.home("elsewhere.weight")


def test_rows_that_are_rearranged_while_loading_are_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does with matrices that other libraries store otherwise."""
    from transformers.core_model_loading import Transpose, WeightConverter

    def conversions(_: Any) -> list[Any]:
        return [WeightConverter("mlp.gate_proj.weight", "mlp.gate_proj.weight", [Transpose(0, 1)])]

    model, _ = load_model(models("llama"), "cpu", "float32")
    monkeypatch.setattr(import_module("transformers.conversion_mapping"), "get_model_conversion_mapping", conversions)
    stored = StoredWeights(model, open_checkpoint(models("llama")))
    with pytest.raises(UnsupportedModelError, match=r"rearranges the rows of .*gate_proj.weight while loading \(Transpose"):
        stored.home(GATE)
    with pytest.raises(CheckpointFormatError, match="no tensor for the parameter"):
        stored.tensors(GATE)
    assert names(stored, GATE.replace("gate", "up")) == [GATE.replace("gate", "up")]
