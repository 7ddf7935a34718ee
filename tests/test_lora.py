"""Adapters: what they hold is the pack, number by number; what they cannot hold is refused by name. No torch here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from nestpatch.errors import CheckpointFormatError, DataError, OutputError, PackContentError, UnsupportedModelError
from nestpatch.export.adapters import _count_experts, export_gguf_lora, export_lora
from nestpatch.formats import nest
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.rows import merge
from tests.helpers import load_tensors, tiny_checkpoint, tiny_pack, tiny_tensors, tree_digest, write_checkpoint
from tests.varied_packs import varied_pack, with_architecture

MLP = "model.layers.{}.mlp.{}.weight"
FFN = [MLP.format(layer, part) for layer in (0, 1) for part in ("gate_proj", "up_proj")]
HIDDEN, INNER, EXPERTS = 16, 24, 3


def expert_names(layer: int, part: str) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{number}.{part}.weight" for number in range(EXPERTS)]


def model_of(folder: Path, shapes: dict[str, tuple[int, ...]], architecture: str) -> Path:
    """A model directory with random float32 tensors of these shapes."""
    random = np.random.default_rng(5)
    write_checkpoint(folder, {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}), encoding="utf-8")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", dtype="F32", hidden=HIDDEN, inter=INNER)


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Experts one by one, as Qwen3-MoE is published."""
    shapes: dict[str, tuple[int, ...]] = {"model.layers.1.self_attn.o_proj.weight": (HIDDEN, HIDDEN)}
    for layer in (0, 1):
        shapes |= dict.fromkeys(expert_names(layer, "gate_proj") + expert_names(layer, "up_proj"), (INNER, HIDDEN))
        shapes |= dict.fromkeys(expert_names(layer, "down_proj"), (HIDDEN, INNER))
    return model_of(tmp_path / "mixture", shapes, "Qwen3MoeForCausalLM")


@pytest.fixture
def stacked(tmp_path: Path) -> Path:
    """The same as one tensor per layer."""
    shapes = {}
    for layer in (0, 1):
        shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (EXPERTS, 2 * INNER, HIDDEN)
        shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = (EXPERTS, HIDDEN, INNER)
    return model_of(tmp_path / "stacked", shapes, "Qwen3MoeForCausalLM")


def read_gguf(file: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    reader = gguf.GGUFReader(file)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def expected_rows(pack: Pack, name: str, strength: float) -> np.ndarray:
    """What the merge rule adds to a tensor, float32 in the tensor's shape."""
    shape = pack.manifest.base.tensors[name].shape
    change = np.zeros((int(np.prod(shape[:-1])), shape[-1]), np.float32)
    delta = next(delta for delta in pack if delta.name == name)
    change[delta.rows] = merge(np.zeros((delta.neurons, shape[-1]), np.float32), delta.dense(), strength)
    return change.reshape(shape)


@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_a_peft_adapter_is_the_pack(base: Path, tmp_path: Path, strength: float) -> None:
    pack = varied_pack(base, FFN)
    done = export_lora(pack, tmp_path / "lora", strength=strength)
    assert (done.matrices, done.rank, done.format) == (4, 4, "lora")
    assert done.nbytes == sum(file.stat().st_size for file in (tmp_path / "lora").iterdir())
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(factors) == 8
    for name in FFN:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"]
        assert (a.shape, b.shape) == ((4, HIDDEN), (INNER, 4)), "vLLM knows one rank"
        assert np.array_equal(b @ a, expected_rows(pack, name, strength))
        assert set(np.unique(b)) == {0.0, 1.0}


def test_the_peft_settings_are_those_that_peft_and_vllm_take(base: Path, tmp_path: Path) -> None:
    pack = varied_pack(base, FFN)
    export_lora(pack, tmp_path / "lora", strength=0.5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == config["lora_alpha"] == 4, "the scale is 1; the strength is in the numbers"
    assert config["target_modules"] == [name.removesuffix(".weight") for name in FFN]
    assert config["base_model_name_or_path"] == "tiny/llama"
    assert config["revision"] == "0123abc"
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {}}
    assert plain.items() <= config.items()
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    (patch,) = json.loads(metadata["nestpatch.packs"])
    assert patch == {"name": "no-harm", "version": "1.0.0", "pack_id": nest.pack_id(pack), "strength": 0.5}


@pytest.mark.parametrize("strength", [1.0, 0.5, 1.5])
def test_a_gguf_adapter_is_the_pack(base: Path, tmp_path: Path, strength: float) -> None:
    pack = varied_pack(base, FFN)
    done = export_gguf_lora(pack, tmp_path / "lora.gguf", strength=strength)
    assert (done.matrices, done.rank, done.format) == (4, 4, "gguf-lora")
    assert done.nbytes == (tmp_path / "lora.gguf").stat().st_size
    tensors, facts = read_gguf(tmp_path / "lora.gguf")
    assert len(tensors) == 8
    for number, name in enumerate(FFN):
        layer, part = number // 2, ("ffn_gate", "ffn_up")[number % 2]
        a, b = tensors[f"blk.{layer}.{part}.weight.lora_a"], tensors[f"blk.{layer}.{part}.weight.lora_b"]
        assert (a.shape, b.shape) == ((1 + number, HIDDEN), (INNER, 1 + number)), "every matrix has its own rank"
        assert np.array_equal(b @ a, expected_rows(pack, name, strength))
    assert facts["general.type"] == "adapter"
    assert facts["adapter.type"] == "lora"
    assert facts["adapter.lora.alpha"] == 0, "llama.cpp divides any other alpha by each matrix' rank"
    assert facts["general.architecture"] == "llama"
    (patch,) = json.loads(str(facts["nestpatch.packs"]))
    assert patch == {"name": "no-harm", "version": "1.0.0", "pack_id": nest.pack_id(pack), "strength": strength}


def test_what_an_adapter_adds_is_what_apply_merges(base: Path, tmp_path: Path) -> None:
    pack = varied_pack(base, FFN)
    apply(base, pack, tmp_path / "patched", strength=1.5)
    export_lora(pack, tmp_path / "lora", strength=1.5)
    before, after = load_tensors(base), load_tensors(tmp_path / "patched")
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in FFN:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        assert np.array_equal(before[name] + factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"], after[name])


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_the_same_pack_gives_the_same_bytes_from_a_file_too(base: Path, tmp_path: Path, export) -> None:
    pack = varied_pack(base, FFN)
    nest.write(pack, tmp_path / "x.nest")
    one, two = export(pack, tmp_path / "one", strength=0.5), export(tmp_path / "x.nest", tmp_path / "two", strength=0.5)
    assert tree_digest(one.output) == tree_digest(two.output)
    assert one.pack_id == two.pack_id == nest.pack_id(pack)


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_a_dry_run_writes_nothing(base: Path, tmp_path: Path, export) -> None:
    before = tree_digest(tmp_path)
    done = export(varied_pack(base, FFN), tmp_path / "out", dry_run=True)
    assert done.dry_run
    assert done.nbytes > 0
    assert tree_digest(tmp_path) == before


def test_an_adapter_lies_beside_its_pack_when_no_place_is_named(base: Path, tmp_path: Path, monkeypatch) -> None:
    pack = varied_pack(base, FFN)
    (tmp_path / "packs").mkdir()
    nest.write(pack, tmp_path / "packs" / "x.nest")
    assert export_lora(tmp_path / "packs" / "x.nest").output == tmp_path / "packs" / "no-harm-1.0.0-lora"
    monkeypatch.chdir(tmp_path)
    export_gguf_lora(pack)
    assert (tmp_path / "no-harm-1.0.0-lora.gguf").is_file()
    assert (tmp_path / "packs" / "no-harm-1.0.0-lora" / "adapter_config.json").is_file()


def test_a_fused_matrix_is_one_matrix(tmp_path: Path) -> None:
    name = MLP.format(0, "gate_up_proj")
    model = model_of(tmp_path / "phi3", {name: (2 * INNER, HIDDEN)}, "Phi3ForCausalLM")
    pack = varied_pack(model, [name])
    export_gguf_lora(pack, tmp_path / "lora.gguf")
    tensors, facts = read_gguf(tmp_path / "lora.gguf")
    assert facts["general.architecture"] == "phi3"
    a, b = tensors["blk.0.ffn_up.weight.lora_a"], tensors["blk.0.ffn_up.weight.lora_b"]
    assert np.array_equal(b @ a, expected_rows(pack, name, 1.0))
    export_lora(pack, tmp_path / "lora")
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert sorted(factors) == [f"base_model.model.model.layers.0.mlp.gate_up_proj.lora_{x}.weight" for x in "AB"]


def test_single_experts_are_stacked_for_llama_cpp(mixture: Path, tmp_path: Path) -> None:
    names = [expert_names(0, "gate_proj")[2], expert_names(0, "gate_proj")[0], expert_names(1, "down_proj")[1]]
    pack = varied_pack(mixture, [*names, "model.layers.1.self_attn.o_proj.weight"])
    export_gguf_lora(pack, tmp_path / "lora.gguf", model=mixture)
    tensors, _ = read_gguf(tmp_path / "lora.gguf")
    whole = [f"blk.{place}.weight.lora_{x}" for place in ("0.ffn_gate_exps", "1.attn_output", "1.ffn_down_exps") for x in "ab"]
    assert sorted(tensors) == whole
    gate = tensors["blk.0.ffn_gate_exps.weight.lora_b"] @ tensors["blk.0.ffn_gate_exps.weight.lora_a"]
    assert gate.shape == (EXPERTS, INNER, HIDDEN)
    for number in (0, 2):
        assert np.array_equal(gate[number], expected_rows(pack, expert_names(0, "gate_proj")[number], 1.0))
    assert not gate[1].any()
    down = tensors["blk.1.ffn_down_exps.weight.lora_b"] @ tensors["blk.1.ffn_down_exps.weight.lora_a"]
    assert np.array_equal(down[1], expected_rows(pack, names[2], 1.0))


def test_single_experts_are_all_or_none_for_peft(mixture: Path, tmp_path: Path) -> None:
    names = [expert_names(0, "up_proj")[2], expert_names(0, "down_proj")[1]]
    pack = varied_pack(mixture, [*names, "model.layers.1.self_attn.o_proj.weight"])
    export_lora(pack, tmp_path / "lora", model=mixture)
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(factors) == 2 * (3 * EXPERTS + 1)
    for part in ("gate_proj", "up_proj", "down_proj"):
        for name in expert_names(0, part):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            change = factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
            assert np.array_equal(change, expected_rows(pack, name, 1.0) if name in names else np.zeros_like(change))
            assert change.shape == ((HIDDEN, INNER) if part == "down_proj" else (INNER, HIDDEN))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["down_proj", "gate_proj", "model.layers.1.self_attn.o_proj", "up_proj"]


def test_stacked_experts_are_taken_apart_for_llama_cpp(stacked: Path, tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    pack = varied_pack(stacked, names)
    export_gguf_lora(pack, tmp_path / "lora.gguf")
    tensors, _ = read_gguf(tmp_path / "lora.gguf")
    wanted = expected_rows(pack, names[0], 1.0)
    for half, place in enumerate(("gate", "up")):
        change = (
            tensors[f"blk.0.ffn_{place}_exps.weight.lora_b"] @ tensors[f"blk.0.ffn_{place}_exps.weight.lora_a"]
            if f"blk.0.ffn_{place}_exps.weight.lora_a" in tensors
            else np.zeros((EXPERTS, INNER, HIDDEN))
        )
        assert np.array_equal(change, wanted[:, half * INNER : (half + 1) * INNER])
    down = tensors["blk.1.ffn_down_exps.weight.lora_b"] @ tensors["blk.1.ffn_down_exps.weight.lora_a"]
    assert np.array_equal(down, expected_rows(pack, names[1], 1.0))


def test_stacked_experts_lie_as_peft_wraps_them(stacked: Path, tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    pack = varied_pack(stacked, names)
    done = export_lora(pack, tmp_path / "lora")
    factors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, inner in zip(names, (".base_layer", ""), strict=True):
        key = f"base_model.model.model.layers.0.mlp.experts{inner}"
        a, b = factors[f"{key}.lora_A.weight"], factors[f"{key}.lora_B.weight"]
        split = a.reshape(EXPERTS, done.rank, -1), b.reshape(-1, done.rank, EXPERTS).transpose(2, 0, 1)
        assert np.array_equal(split[1] @ split[0], expected_rows(pack, name, 1.0))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["target_modules"], config["target_parameters"]) == ([], sorted(names))


def test_a_model_saved_without_its_head_gets_the_names_that_it_has_with_it(tmp_path: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    model = model_of(tmp_path / "bare", {name: (INNER, HIDDEN)}, "LlamaForCausalLM")
    export_lora(varied_pack(model, [name]), tmp_path / "lora")
    assert "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight" in load_file(
        tmp_path / "lora" / "adapter_model.safetensors"
    )


def test_experts_are_counted_in_models_of_every_format(mixture: Path, base: Path, tmp_path: Path) -> None:
    assert _count_experts(mixture) == EXPERTS
    assert _count_experts(base) is None
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    writer.add_expert_count(11)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert _count_experts(tmp_path / "m.gguf") == 11
    (tmp_path / "broken.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CheckpointFormatError, match="GGUF version"):
        _count_experts(tmp_path / "broken.gguf")


def odd_model(tmp_path: Path, name: str, shape: tuple[int, ...], architecture: str) -> Pack:
    return varied_pack(model_of(tmp_path / "odd", {name: shape}, architecture), [name])


@pytest.mark.parametrize(
    ("name", "shape", "architecture", "reason"),
    [
        ("model.embed_tokens.weight", (32, HIDDEN), "LlamaForCausalLM", "embedding"),
        ("model.layers.0.mlp.scale", (32, HIDDEN), "LlamaForCausalLM", "weights of modules"),
        ("transformer.h.0.mlp.c_fc.weight", (HIDDEN, 32), "GPT2LMHeadModel", "transposed"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, HIDDEN, 32), "GptOssForCausalLM", "transposed"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 32, HIDDEN), "NewMoeForCausalLM", "stacks its experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 33, HIDDEN), "Qwen3MoeForCausalLM", "not the shape of a stack"),
        ("model.layers.0.mlp.experts.1.up_proj.weight", (32, HIDDEN), "Qwen3MoeForCausalLM", "how many"),
        ("model.layers.0.mlp.experts.1.w9.weight", (32, HIDDEN), "MixtralForCausalLM", "not a gate, up or down"),
        ("model.layers.0.mlp.experts.1.up_proj.weight", (32, HIDDEN), "Qwen2MoeForCausalLM", "not known to load"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", (32, HIDDEN), "DeepseekV3ForCausalLM", "as an expert"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, HIDDEN), "MixtralForCausalLM", "as an expert"),
    ],
)
def test_what_peft_cannot_load_is_refused(tmp_path: Path, name, shape, architecture, reason) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        export_lora(odd_model(tmp_path, name, shape, architecture), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


@pytest.mark.parametrize(
    ("name", "shape", "architecture", "reason"),
    [
        ("model.embed_tokens.weight", (32, HIDDEN), "LlamaForCausalLM", "embedding"),
        ("model.layers.0.mlp.scale", (32, HIDDEN), "LlamaForCausalLM", "weights of modules"),
        ("model.layers.0.self_attn.q_proj.weight", (32, HIDDEN), "MistralForCausalLM", "another order"),
        ("model.layers.0.mlp.wide_proj.weight", (32, HIDDEN), "LlamaForCausalLM", "have no tensor"),
        ("model.layers.999999999.mlp.up_proj.weight", (32, HIDDEN), "LlamaForCausalLM", "layer 999999999"),
        ("transformer.h.0.mlp.c_fc.weight", (HIDDEN, 32), "GPT2LMHeadModel", "GPT2LMHeadModel"),
        ("model.layers.0.mlp.up_proj.weight", (32, HIDDEN), "", "architecture of ''"),
        ("model.layers.0.mlp.experts.gate_up_proj", (2, 33, HIDDEN), "Qwen3MoeForCausalLM", "not the shape of a stack"),
        ("model.layers.0.mlp.experts.1.up_proj.weight", (32, HIDDEN), "Qwen3MoeForCausalLM", "how many"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused(tmp_path: Path, name, shape, architecture, reason) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        export_gguf_lora(odd_model(tmp_path, name, shape, architecture), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_an_expert_that_the_model_does_not_have_is_refused(mixture: Path, tmp_path: Path, export) -> None:
    name = "model.layers.0.mlp.experts.7.up_proj.weight"
    other = model_of(tmp_path / "other", {name: (INNER, HIDDEN)}, "Qwen3MoeForCausalLM")
    with pytest.raises(UnsupportedModelError, match="has 3 experts"):
        export(varied_pack(other, [name]), tmp_path / "out", model=mixture)


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_a_pack_that_claims_a_giant_matrix_is_refused(base: Path, tmp_path: Path, export) -> None:
    """Shapes in a manifest are claims: a pack of kilobytes must not make somebody write terabytes."""
    pack = tiny_pack(base, tensors=[FFN[0]])
    identity = dataclasses.replace(pack.manifest.base.tensors[FFN[0]], shape=(2**31, HIDDEN))
    huge = dataclasses.replace(pack.manifest.base, tensors={FFN[0]: identity})
    claimed = Pack(dataclasses.replace(pack.manifest, base=huge), pack.deltas)
    with pytest.raises(OutputError, match=r"would take 17.2 GB"):
        export(claimed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_a_stack_of_billions_is_refused(stacked: Path, tmp_path: Path, export) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    pack = varied_pack(stacked, [name])
    identity = dataclasses.replace(pack.manifest.base.tensors[name], shape=(2**31, HIDDEN, INNER))
    huge = dataclasses.replace(pack.manifest.base, tensors={name: identity})
    with pytest.raises(UnsupportedModelError, match="not the shape of a stack of experts"):
        export(Pack(dataclasses.replace(pack.manifest, base=huge), pack.deltas), tmp_path / "out")


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
@pytest.mark.parametrize("strength", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_strength_that_makes_no_sense_is_refused(base: Path, tmp_path: Path, export, strength: float) -> None:
    with pytest.raises(DataError, match="strength"):
        export(tiny_pack(base), tmp_path / "out", strength=strength)


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_deltas_that_the_strength_blows_up_are_refused(tmp_path: Path, export) -> None:
    model = write_checkpoint(tmp_path / "m", tiny_tensors(dtype="F32", seed=0, hidden=HIDDEN, inter=INNER, layers=1))
    pack = tiny_pack(model, delta_dtype="F32", scale=1.1e38)
    with pytest.raises(PackContentError, match="leave the range of F32"):
        export(pack, tmp_path / "out", strength=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("export", [export_lora, export_gguf_lora])
def test_a_place_that_is_taken_stays_as_it_is(base: Path, tmp_path: Path, export) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="exists already"):
        export(tiny_pack(base), tmp_path / "out")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"
    with pytest.raises(OutputError, match="there is no directory"):
        export(tiny_pack(base), tmp_path / "no" / "where")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_the_known_architectures_are_llama_cpps_own() -> None:
    from nestpatch.formats.gguf.names import GGUF_ARCHITECTURES

    assert set(GGUF_ARCHITECTURES.values()) <= set(gguf.MODEL_ARCH_NAMES.values())


def test_packs_for_other_classes_of_a_family_differ_by_the_architecture_alone(base: Path, tmp_path: Path) -> None:
    pack = varied_pack(base, FFN)
    export_gguf_lora(with_architecture(pack, "Gemma2ForCausalLM"), tmp_path / "gemma.gguf")
    export_gguf_lora(pack, tmp_path / "llama.gguf")
    gemma, llama = read_gguf(tmp_path / "gemma.gguf"), read_gguf(tmp_path / "llama.gguf")
    assert gemma[1]["general.architecture"] == "gemma2"
    assert all(np.array_equal(gemma[0][name], llama[0][name]) for name in llama[0])
