"""Guards of real models, and trainings of transformers and PEFT that keep to them, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import nestpatch
from nestpatch.errors import BaseMismatchError, DataError, GuardMismatchError, OutputError, UnsupportedModelError
from nestpatch.formats import nest
from nestpatch.guarding.guard import Guard
from nestpatch.prompts.readers import Prompt, PromptSet
from nestpatch.runtimes.text import prompt_ids
from tests.calls import answer, refused, run
from tests.helpers import load_tensors, tiny_pack
from tests.nest_train.conftest import models, tokenizer
from tests.schemas import require_schema

__all__ = ["models", "tokenizer"]
PROMPTS = PromptSet("harmful", tuple(Prompt(f"How do I rob the {what}?") for what in ("bank", "old shop", "train", "museum")))
ENERGY = 0.6


class Scene:
    """A patched model of a family, with its guard."""

    def __init__(self, folder: Path, base: Path, part: str = "gate_proj", **sizes: Any) -> None:
        names = [name for name in load_tensors(base) if part in name]
        self.pack, self.model = tiny_pack(base, neurons=20, clusters=3, tensors=names, **sizes), folder / "model"
        nest.write(self.pack, folder / "p.nest")
        nestpatch.apply(base, folder / "p.nest", self.model)
        self.file = folder / "guard.safetensors"
        self.base, self.patch = base, folder / "p.nest"
        made = nestpatch.export_guard(self.model, self.patch, self.file, prompts=PROMPTS, energy=ENERGY, device="cpu")
        self.guard = made.guard

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


def off(before: dict[str, Any], after: dict[str, Any], guard: Guard) -> float:
    """The largest change of what the guarded directions are mapped to."""
    return max(float(np.abs((after[one.name] - before[one.name]) @ one.basis.T).max()) for one in guard.matrices)


def weights_of(model: Any) -> dict[str, np.ndarray]:
    return {name: value.detach().float().numpy().copy() for name, value in model.state_dict().items()}


def test_the_directions_hold_the_energy_of_the_inputs_of_harmful_prompts(scene: Scene) -> None:
    model, seen = scene.load(), {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(scene.model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(f"{name}.weight", []).append(args[0][0].detach().numpy())
            )
    with torch.inference_mode():
        for ids in prompt_ids(tokenizer, [prompt.text for prompt in PROMPTS.prompts], 512):
            model(torch.tensor([ids]))
    assert [one.name for one in scene.guard.matrices] == sorted(seen)
    for one in scene.guard.matrices:
        inputs = np.concatenate(seen[one.name]).astype(np.float64)
        inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
        held = [float(((inputs @ basis.T) ** 2).sum() / len(inputs)) for basis in (one.basis, one.basis[:-1])]
        assert held[0] >= ENERGY - 1e-6 > held[1], "as few directions as hold the energy"
    assert scene.guard.prompts == len(PROMPTS.prompts)


def test_a_full_fine_tune_keeps_to_its_guard(scene: Scene, tmp_path: Path) -> None:
    model = scene.load()
    before = weights_of(model)
    train(model, tmp_path, nestpatch.GuardCallback(scene.file))
    after = weights_of(model)
    assert off(before, after, scene.guard) < 1e-5
    assert all(np.abs(after[one.name] - before[one.name]).max() > 0.01 for one in scene.guard.matrices)


def test_without_the_guard_the_same_training_leaves_it(scene: Scene, tmp_path: Path) -> None:
    model = scene.load()
    before = weights_of(model)
    train(model, tmp_path)
    assert off(before, weights_of(model), scene.guard) > 0.01


def test_weights_in_bfloat16_keep_to_their_guard_but_for_rounding(scene: Scene, tmp_path: Path) -> None:
    model, bare = (scene.load(dtype=torch.bfloat16) for _ in range(2))
    before = weights_of(model)
    train(model, tmp_path, nestpatch.GuardCallback(scene.guard))
    train(bare, tmp_path)
    assert off(before, weights_of(model), scene.guard) < 0.2 * off(before, weights_of(bare), scene.guard)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_merged_lora_keeps_to_its_guard(models, tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    scene = Scene(tmp_path, models(family), "gate_proj" if family == "llama" else "gate_up_proj")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(scene.load(), config)
    train(model, tmp_path, nestpatch.GuardCallback(scene.file))
    after, before = weights_of(model.merge_and_unload()), weights_of(scene.load())
    assert off(before, after, scene.guard) < 1e-5
    assert all(np.abs(after[one.name] - before[one.name]).max() > 0.01 for one in scene.guard.matrices)


def test_an_adapter_of_transformers_itself(scene: Scene, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = scene.load()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["gate_proj", "down_proj"]))
    held = nestpatch.guard_model(model, scene.guard)
    train(model, tmp_path, nestpatch.GuardCallback(scene.guard))
    assert len(held.held) == 4  # two matrices of two layers
    for layer in held.held:
        (factor,) = layer.factors
        assert factor.abs().max() > 0.01
        np.testing.assert_allclose((factor @ layer.basis.T).detach(), 0, atol=1e-6)


def test_what_is_not_trained_is_not_held(scene: Scene) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(scene.load(), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    assert nestpatch.guard_model(model, scene.guard).held == ()


def test_experts_that_are_stacked_have_no_guard(tmp_path: Path, models) -> None:
    """They are no linear layers; the model is known by the pack in them all the same."""
    scene = Scene(tmp_path, models("qwen3-moe"), ".experts.1.gate_proj")
    assert {one.name.split(".")[3] for one in scene.guard.matrices} == {"self_attn"}
    assert nestpatch.guard_model(scene.load(), scene.guard).guard is scene.guard


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


def test_what_has_no_guard(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(BaseMismatchError, match=r"does not hold no-harm 1\.0\.0"):
        nestpatch.export_guard(scene.base, scene.patch, tmp_path / "g")
    with pytest.raises(DataError, match="an energy of 1 is out of range"):
        nestpatch.export_guard(scene.model, scene.patch, tmp_path / "g", energy=1.0)
    with pytest.raises(DataError, match="no harmful prompts"):
        nestpatch.export_guard(scene.model, scene.patch, tmp_path / "g", prompts=PromptSet("none", ()))
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="exists already"):
        nestpatch.export_guard(scene.model, scene.patch, tmp_path / "taken")


def test_the_command(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": prompt.text}) for prompt in PROMPTS.prompts))
    words = ("guard", scene.model, scene.patch, "--harmful", tmp_path / "harmful.jsonl", "--energy", ENERGY)
    file = tmp_path / "g.safetensors"
    value = answer(*words, "-o", file)
    require_schema(value, "guard")
    assert (value["matrices"], value["prompts"], value["bytes"]) == (14, 4, file.stat().st_size)
    assert file.read_bytes() == scene.file.read_bytes()
    assert "14 matrices" in run(*words, "-o", tmp_path / "h").stdout
    assert "does not hold" in refused("BaseMismatchError", "guard", scene.base, scene.patch, "-o", tmp_path / "i")
    assert "exists already" in refused("OutputError", *words, "-o", file)
    wrong = run(*words[:-1], 2, "-o", tmp_path / "i")
    assert (wrong.exit_code, "out of range" in wrong.stderr) == (2, True)
    assert run("guard", scene.patch, scene.model, "-o", tmp_path / "i").exit_code == 2
