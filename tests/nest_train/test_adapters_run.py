"""Adapters where they are meant to run: base and adapter in PEFT and in llama.cpp give the logits of the merged model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from nestpatch.export.adapters import export_gguf_lora, export_lora
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.apply import apply
from nestpatch.runtimes.llama import LlamaRuntime
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import fold
from tests.gguf_files import needs_llama, write_gguf
from tests.helpers import load_tensors
from tests.varied_packs import varied_pack

IDS = [3 + (7 * i) % 300 for i in range(48)]
DENSE = ["llama", "llama-tied", "qwen2", "gemma2", "phi3"]
SINGLE = ["mixtral", "qwen3-moe"]
STACKED = [f"{family}-stacked" for family in (*SINGLE, "qwen2-moe")]
PARTS = ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3")


def touched(model: Path) -> list[str]:
    """The feed-forward matrices to patch: of experts those of layer 1, and not all of them."""
    names = [name for name in load_tensors(model) if name.removesuffix(".weight").rpartition(".")[2] in PARTS]
    if any(".experts." in name for name in names):
        names = [name for name in names if ".layers.1." in name and ".experts.0." not in name]
    # Something else than a feed-forward matrix too.
    return [*names, "model.layers.0.self_attn.o_proj.weight"]


def torch_logits(model) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def llama_logits(file: Path, lora: Path | None = None) -> np.ndarray:
    with LlamaRuntime(file, lora, threads=1) as model:
        return model.logits(IDS)


@pytest.fixture(scope="module")
def patched(models, tmp_path_factory):
    """(family, strength) -> (base, pack, logits of base and of the merged model)."""
    made = {}

    def get(family: str, strength: float):
        if (family, strength) not in made:
            base = models(family)
            # At other strengths than 1 every second tensor changes by a low rank.
            pack = varied_pack(base, touched(base), kind="clusters" if strength == 1 else "mixed")
            folder = tmp_path_factory.mktemp("merged") / "model"
            apply(base, pack, folder, strength=strength)
            logits = [torch_logits(load_model(path, "cpu", "float32")[0]) for path in (base, folder)]
            assert np.abs(logits[0] - logits[1]).max() > 0.1, "the patch must be visible"
            made[family, strength] = base, folder, pack, logits[1]
        return made[family, strength]

    return get


@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("family", [*DENSE, *SINGLE, *STACKED])
def test_peft_gives_the_logits_of_the_merged_model(patched, tmp_path, family, strength):
    peft = pytest.importorskip("peft")
    base, _, pack, merged = patched(family, strength)
    export_lora(pack, tmp_path / "lora", strength=strength, model=base)
    model, _ = load_model(base, "cpu", "float32")
    with warnings.catch_warnings():
        # PEFT speaks of patterns that it adds itself for experts, and of layers whose experts have no adapter.
        if family in SINGLE:
            warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    assert np.abs(torch_logits(adapted) - merged).max() <= 1e-5
    assert np.abs(torch_logits(adapted.merge_and_unload()) - merged).max() <= 1e-5


def test_a_shared_expert_is_a_matrix_like_others(models, tmp_path):
    peft = pytest.importorskip("peft")
    base = models("qwen2-moe")
    pack = varied_pack(base, [f"model.layers.1.mlp.shared_expert.{part}.weight" for part in ("gate_proj", "up_proj")])
    export_lora(pack, tmp_path / "lora")
    apply(base, pack, tmp_path / "merged")
    adapted = peft.PeftModel.from_pretrained(load_model(base, "cpu", "float32")[0], tmp_path / "lora")
    merged = torch_logits(load_model(tmp_path / "merged", "cpu", "float32")[0])
    assert np.abs(torch_logits(adapted) - merged).max() <= 1e-5
    assert np.abs(torch_logits(load_model(base, "cpu", "float32")[0]) - merged).max() > 0.1


@needs_llama
@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
@pytest.mark.parametrize("family", [*DENSE, *SINGLE])
def test_llama_cpp_gives_the_logits_of_the_merged_model(patched, tmp_path, family, strength):
    base, merged, pack, logits = patched(family, strength)
    export_gguf_lora(pack, tmp_path / "lora.gguf", strength=strength, model=base)
    adapted = llama_logits(write_gguf(base, tmp_path / "base.gguf"), tmp_path / "lora.gguf")
    plain = llama_logits(write_gguf(merged, tmp_path / "merged.gguf"))
    assert np.abs(adapted - plain).max() <= 1e-4
    assert np.abs(adapted - logits).max() <= (5e-3 if family.startswith("gemma") else 1e-4)


@pytest.mark.parametrize("family", [*DENSE, *SINGLE, *STACKED])
def test_a_pack_folded_into_a_loaded_model_is_the_merged_model(patched, family):
    """Experts too, which transformers stacks while it loads them."""
    base, _, pack, logits = patched(family, 1.5)
    model, _ = load_model(base, "cpu", "float32")
    fold(model, open_checkpoint(base), pack, 1.5)
    assert np.array_equal(torch_logits(model), logits)


@needs_llama
@pytest.mark.parametrize("family", SINGLE)
def test_stacked_and_single_experts_give_the_same_adapter(models, tmp_path, family):
    """However the base stores its experts, llama.cpp knows them as one tensor."""
    stacked = models(f"{family}-stacked")
    pack = varied_pack(stacked, ["model.layers.1.mlp.experts.gate_up_proj"], kind="mixed")
    export_gguf_lora(pack, tmp_path / "lora.gguf")
    apply(stacked, pack, tmp_path / "merged")
    adapted = llama_logits(write_gguf(models(family), tmp_path / "base.gguf"), tmp_path / "lora.gguf")
    merged = torch_logits(load_model(tmp_path / "merged", "cpu", "float32")[0])
    assert np.abs(adapted - merged).max() <= 1e-4


@needs_llama
def test_an_adapter_runs_on_a_quantized_base(models, tmp_path):
    """The change arrives whole, though the base is rounded: as on the float base, but for the base's own noise."""
    base = models("llama")
    pack = varied_pack(base, touched(base), scale=0.05, kind="mixed")
    export_gguf_lora(pack, tmp_path / "lora.gguf")
    shifts = []
    for kind in ("F32", "Q8_0"):
        file = write_gguf(base, tmp_path / f"{kind}.gguf", kind)
        shifts.append((llama_logits(file, tmp_path / "lora.gguf") - llama_logits(file)).ravel())
    assert np.corrcoef(*shifts)[0, 1] > 0.98
