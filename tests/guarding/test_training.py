"""Trainings keep to their guard: real ones, of transformers and PEFT, on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import nestpatch
from nestpatch.errors import DataError, GuardMismatchError, UnsupportedModelError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.guarding.guard import Guard
from tests.helpers import load_tensors, tiny_pack
from tests.nest_train.conftest import models, tokenizer

__all__ = ["models", "tokenizer"]
MODES = ("subspace", "rows")


class Scene:
    """A patched model of a family, with its guard."""

    def __init__(self, folder: Path, base: Path, part: str = "gate_proj", **sizes: Any) -> None:
        names = [name for name in load_tensors(base) if part in name]
        self.pack, self.model = tiny_pack(base, neurons=20, clusters=3, tensors=names, **sizes), folder / "model"
        nest.write(self.pack, folder / "p.nest")
        nestpatch.apply(base, folder / "p.nest", self.model)
        self.file = folder / "guard.safetensors"
        self.guard = nestpatch.export_guard(self.model, folder / "p.nest", self.file).guard

    def load(self, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.model, **options)


@pytest.fixture(scope="module")
def scene(tmp_path_factory, models) -> Scene:
    return Scene(tmp_path_factory.mktemp("guarded"), models("llama"))


def train(model: Any, folder: Path, *callbacks: Any, steps: int = 3, **options: Any) -> None:
    """A few steps of transformers' own Trainer, with large ones."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 300, (8, 12))]
    arguments = transformers.TrainingArguments(
        str(folder / "run"),
        max_steps=steps,
        learning_rate=0.02,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks)).train()


def off(weights: dict[str, Any], guard: Guard) -> float:
    """The largest change of a protected coordinate."""
    return max(float(np.abs(weights[one.name][one.rows] @ one.basis.T - one.coordinates).max(initial=0.0)) for one in guard)


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy().copy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("mode", MODES)
def test_a_full_fine_tune_keeps_to_its_guard(scene: Scene, tmp_path: Path, mode: str) -> None:
    model = scene.load()
    before = weights_of(model)
    train(model, tmp_path, nestpatch.GuardCallback(scene.file, mode=mode))
    after = weights_of(model)
    assert off(after, scene.guard) < 1e-5
    for one in scene.guard:
        moved = after[one.name] - before[one.name]
        spared = np.setdiff1d(np.arange(len(moved)), one.rows)
        assert np.abs(moved[spared]).max() > 0.01
        assert bool(np.abs(moved[one.rows]).max() == 0) is (mode == "rows")
        assert np.abs(moved[spared] @ one.basis.T).max() > 0.01


def test_without_the_guard_the_same_training_leaves_it(scene: Scene, tmp_path: Path) -> None:
    model = scene.load()
    train(model, tmp_path)
    assert off(weights_of(model), scene.guard) > 0.01


def test_rows_in_bfloat16_keep_to_their_guard_but_for_rounding(scene: Scene, tmp_path: Path) -> None:
    model = scene.load(dtype=torch.bfloat16)
    train(model, tmp_path, nestpatch.GuardCallback(scene.guard))
    bare = scene.load(dtype=torch.bfloat16)
    train(bare, tmp_path)
    assert off(weights_of(model), scene.guard) < 0.1 * off(weights_of(bare), scene.guard)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_merged_lora_keeps_to_its_guard(models, tmp_path: Path, mode: str, family: str) -> None:
    peft = pytest.importorskip("peft")
    scene = Scene(tmp_path, models(family), "gate_proj" if family == "llama" else "gate_up_proj")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(scene.load(), config)
    train(model, tmp_path, nestpatch.GuardCallback(scene.file, mode=mode))
    after, before = weights_of(model.merge_and_unload()), weights_of(scene.load())
    assert off(after, scene.guard) < 1e-5
    for one in scene.guard:
        moved = after[one.name] - before[one.name]
        assert np.abs(moved).max() > 0.01
        assert bool(np.abs(moved[one.rows]).max() < 1e-7) is (mode == "rows")


def test_an_adapter_of_transformers_itself(scene: Scene, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = scene.load()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    held = nestpatch.guard_model(model, scene.guard)
    train(model, tmp_path, nestpatch.GuardCallback(scene.guard))
    for layer, one in zip(held.held, scene.guard, strict=True):
        (factor,) = layer.factors
        assert factor.abs().max() > 0.01
        np.testing.assert_allclose((factor @ torch.from_numpy(one.basis).T).detach(), 0, atol=1e-6)


def test_what_is_not_trained_is_not_held(scene: Scene) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(scene.load(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert nestpatch.guard_model(model, scene.guard).held == ()


def test_experts_that_are_stacked(tmp_path: Path, models) -> None:
    """Two tensors of each expert on disk are rows of one parameter."""
    base = models("qwen3-moe")
    scene = Scene(tmp_path, base, ".experts.1.gate_proj")
    model = scene.load()
    held = nestpatch.guard_model(model, scene.guard)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    held.project()
    model.save_pretrained(tmp_path / "after")
    stored = load_tensors(tmp_path / "after")
    assert off(stored, scene.guard) < 1e-4
    spared = scene.guard.tensors[0].name.replace("experts.1", "experts.2")
    assert np.abs(stored[spared] - load_tensors(scene.model)[spared]).max() > 1


def test_another_model_is_refused(scene: Scene, models, tmp_path: Path, tokenizer) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(GuardMismatchError, match="off by 100% of the change of no-harm"):
        nestpatch.guard_model(load(models("llama")), scene.guard)
    with pytest.raises(GuardMismatchError, match="no parameter for"):
        nestpatch.guard_model(load(models("gpt-neox")), scene.guard)
    wider = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=320
        )
    )
    with pytest.raises(GuardMismatchError, match="instead of"):
        train(wider, tmp_path, nestpatch.GuardCallback(scene.file))
    with pytest.raises(DataError, match="there is no mode 'columns'"):
        nestpatch.GuardCallback(scene.guard, "columns")  # type: ignore[arg-type]


@pytest.mark.parametrize("other", ["dora", "ia3"])
def test_other_adapters_are_refused(scene: Scene, other: str) -> None:
    peft = pytest.importorskip("peft")
    config = (
        peft.LoraConfig(r=4, target_modules=["gate_proj"], use_dora=True)
        if other == "dora"
        else peft.IA3Config(target_modules=["gate_proj"], feedforward_modules=[])
    )
    with pytest.raises(UnsupportedModelError, match="not plain LoRA"):
        nestpatch.guard_model(peft.get_peft_model(scene.load(), config), scene.guard)


def test_adapters_of_stacked_experts_are_refused(tmp_path: Path, models) -> None:
    peft = pytest.importorskip("peft", minversion="0.17")
    scene = Scene(tmp_path, models("qwen3-moe"), ".experts.1.gate_proj")
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedModelError, match=r"experts\.gate_up_proj has an adapter"):
        nestpatch.guard_model(peft.get_peft_model(scene.load(), config), scene.guard)


def test_a_guard_of_a_model_on_disk_is_that_of_the_export(scene: Scene) -> None:
    again = Guard.of(scene.pack, scene.guard.pack_id, open_checkpoint(scene.model))
    assert all(np.array_equal(a.coordinates, b.coordinates) for a, b in zip(again, scene.guard, strict=True))
