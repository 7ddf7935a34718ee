"""Every family: the bytes of each tensor, the logits in llama.cpp, and what is refused because llama.cpp computes otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFReader

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.export._gguf_writer import plan_gguf, write_gguf
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf.quants import file_type
from nestpatch.formats.opening import open_checkpoint
from tests.export.expected import expected_tensors, is_float32
from tests.export.families import FAMILIES, LLAMA3_ROPE, LONG, make
from tests.export.running import loaded, logits, reference_logits
from tests.export.tokenizers_made import edit
from tests.helpers import assert_same_bytes, load_tensors, write_checkpoint

Made = Callable[[str], Path]
IDS = [int(n) for n in np.random.default_rng(0).integers(0, 480, 40)]


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Tensor name -> (type, shape, bytes), by the gguf package's own reader."""
    return {
        tensor.name: (tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape)), tensor.data.tobytes())
        for tensor in GGUFReader(path).tensors
    }


def assert_holds(path: Path, want: dict[str, np.ndarray], kind: str, made: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """The file holds exactly these tensors, in that type where it may."""
    found = stored(path)
    assert found.keys() - made == want.keys()
    for name, values in want.items():
        dtype = "F32" if is_float32(name, values) else kind
        rows = values.astype(np.float32).reshape(-1, values.shape[-1])
        assert found[name][:2] == (dtype, values.shape)
        assert_same_bytes(found[name][2], quants.codec(dtype).encode(rows).tobytes(), "F32" if dtype == "F32" else "BF16")


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_the_expected_bytes(name: str, family: Made, exported: Made) -> None:
    made = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
    assert_holds(exported(name), expected_tensors(family(name)), "F32", made)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_in_llama_cpp_are_those_of_transformers(name: str, family: Made, exported: Made) -> None:
    pytest.importorskip("llama_cpp")
    with loaded(exported(name), 64) as model:
        found = logits(model, IDS)
    want = reference_logits(family(name), IDS)
    assert want.std() > 0.3  # a dead model would agree with anything
    assert np.abs(found - want).max() < FAMILIES[name].tolerance


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama2", "mixtral", "gemma2", "gpt_neox"])
def test_half_precision_is_copied_as_it_is(tmp_path: Path, name: str, dtype: str) -> None:
    folder = make(name, tmp_path / name, dtype=dtype, shards="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    done = write_gguf(open_checkpoint(folder), tmp_path / "out.gguf")
    assert done.type == {"bfloat16": "BF16", "float16": "F16"}[dtype]
    assert_holds(done.output, expected_tensors(folder), done.type)


def test_a_checkpoint_of_several_dtypes_loses_nothing(family: Made, tmp_path: Path) -> None:
    tensors = load_tensors(family("qwen3_moe"))
    kinds = {"down_proj": np.float16, "gate_proj": ml_dtypes.bfloat16}
    mixed = {name: t.astype(kinds.get(name.split(".")[-2], np.float32)) for name, t in tensors.items()}
    one = "model.layers.0.mlp.experts.1.gate_proj.weight"  # beside experts in bfloat16
    mixed[one] = tensors[one].astype(np.float16)
    folder = with_tensors(family("qwen3_moe"), tmp_path / "mixed", mixed)
    found = stored(write_gguf(open_checkpoint(folder), tmp_path / "out.gguf").output)
    want = expected_tensors(folder, mixed)
    for name, values in want.items():
        ours = quants.codec(found[name][0]).decode(
            np.frombuffer(found[name][2], np.uint8).reshape(values.size // values.shape[-1], -1)
        )
        assert np.array_equal(ours.reshape(values.shape), values.astype(np.float32)), name
    assert found["blk.1.ffn_down_exps.weight"][0] == "F16"
    assert found["blk.0.ffn_gate_exps.weight"][0] == "F32"
    assert found["blk.1.ffn_gate_exps.weight"][0] == "BF16"


def with_tensors(model: Path, folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A copy of a model with other weights."""
    write_checkpoint(folder, tensors)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_stacked_experts_are_taken_apart(family: Made, exported: Made, tmp_path: Path) -> None:
    """Checkpoints may hold the experts of a layer as one tensor, gate and up together."""
    tensors = load_tensors(family("qwen3_moe"))
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts"
        one = [{part: tensors.pop(f"{base}.{n}.{part}_proj.weight") for part in ("gate", "up", "down")} for n in range(4)]
        tensors[f"{base}.gate_up_proj"] = np.stack([np.concatenate([expert["gate"], expert["up"]]) for expert in one])
        tensors[f"{base}.down_proj"] = np.stack([expert["down"] for expert in one])
    folder = with_tensors(family("qwen3_moe"), tmp_path / "stacked", tensors)
    assert stored(write_gguf(open_checkpoint(folder), tmp_path / "out.gguf").output) == stored(exported("qwen3_moe"))


def test_long_texts_use_the_long_factors(family: Made, exported: Made) -> None:
    pytest.importorskip("llama_cpp")
    ids = (IDS * 5)[:180]  # over the 128 of short factors
    with loaded(exported("phi_long"), 256) as model:
        found = logits(model, ids)
    assert np.abs(found - reference_logits(family("phi_long"), ids)).max() < 1e-4


def changed(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model with another config.json. Links are for weights alone: others are not followed out of a model."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            (folder / file.name).write_bytes(file.read_bytes())
    edit(folder / "config.json", settings)
    return folder


def plan(folder: Path, kind: str = "auto") -> Any:
    return plan_gguf(open_checkpoint(folder), file_type(kind), folder.name, {})


REFUSED = [
    ("llama2", {"hidden_act": "relu"}, "activation 'relu'"),
    ("llama2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "rope_type 'dynamic'"),
    ("qwen2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}}, "rope_type 'llama3'"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "layers without experts"),
    ("gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar = 99"),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "irregular"),
    ("llama2", {"num_hidden_layers": 1}, "no place for the tensor model.layers.1"),
    ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ("phi", {"head_dim": 8}, "heads of 8"),
    ("phi_long", {"rope_parameters": {**LONG, "short_factor": [1.0] * 7}}, "7 short rope factors for 16"),
    ("gpt_neox", {"tie_word_embeddings": True}, "tied embeddings"),
]


@pytest.mark.parametrize(("name", "settings", "reason"), REFUSED)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, settings: dict[str, Any], reason: str, family: Made, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        plan(changed(family(name), tmp_path / "odd", **settings))


BROKEN = [
    ({"architectures": []}, "names no architecture"),
    ({"num_hidden_layers": 3}, "layer 2 of 3 lacks"),
    ({"num_hidden_layers": 10**9}, "1000000000 layers"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_attention_heads": "four"}, "num_attention_heads is 'four'"),
    ({"num_attention_heads": 3, "head_dim": None}, "not a whole number of heads of 21"),
    ({"num_attention_heads": 8}, "attn_q.weight has 64 rows; .* 128"),
    ({"num_key_value_heads": 1}, "attn_k.weight has 32 rows; .* 16"),
    ({"hidden_size": 32}, "ffn_down.weight has 64 rows; .* 32"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "factor"),
    ({"rope_parameters": "none"}, "broken"),
    ({"max_position_embeddings": 2**40}, "32 bits"),
    ({"rms_norm_eps": 1e300}, "32 bits"),
    ({"head_dim": 2**40}, "heads of 1099511627776"),
    ({"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 4.0}}, "broken: FloatingPointError"),
    ({"rms_norm_eps": float("nan")}, "finite"),
]


@pytest.mark.parametrize(("settings", "reason"), BROKEN)
def test_a_broken_config_is_named(settings: dict[str, Any], reason: str, family: Made, tmp_path: Path) -> None:
    folder = changed(family("llama2"), tmp_path / "odd", **settings)
    with pytest.raises(CheckpointFormatError, match=reason):
        plan(folder).header()


def test_an_unknown_architecture_is_named_with_the_list_and_the_way_out(family: Made, tmp_path: Path) -> None:
    folder = changed(family("llama2"), tmp_path / "odd", architectures=["FalconForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"FalconForCausalLM.*Gemma2ForCausalLM, .*Qwen3MoeForCausalLM") as caught:
        plan(folder)
    assert "--llama-cpp DIR" in caught.value.advice


def test_quantized_weights_are_refused(family: Made, tmp_path: Path) -> None:
    folder = changed(family("llama2"), tmp_path / "odd", quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match="gptq"):
        plan(folder)


def test_tensors_without_a_place_and_missing_ones_are_named(family: Made, tmp_path: Path) -> None:
    tensors = load_tensors(family("llama2"))
    more = with_tensors(family("llama2"), tmp_path / "more", {**tensors, "model.layers.0.adapter.weight": np.ones((4, 64))})
    with pytest.raises(CheckpointFormatError, match=r"adapter.weight is stored as F64"):
        plan(more)
    odd = {**tensors, "model.layers.0.adapter.weight": np.ones((4, 64), np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"no tensor for model.layers.0.adapter.weight"):
        plan(with_tensors(family("llama2"), tmp_path / "odd", odd))
    for lost, reason in (("lm_head.weight", "no lm_head"), ("model.layers.1.mlp.up_proj.weight", "layer 1 .* lacks ffn_up")):
        fewer = {name: values for name, values in tensors.items() if name != lost}
        with pytest.raises(CheckpointFormatError, match=reason):
            plan(with_tensors(family("llama2"), tmp_path / lost, fewer))
    narrow = {**tensors, "model.embed_tokens.weight": np.ones((480, 32), np.float32)}
    with pytest.raises(CheckpointFormatError, match="32 wide"):
        plan(with_tensors(family("llama2"), tmp_path / "narrow", narrow))
    experts = {n: t for n, t in load_tensors(family("mixtral")).items() if ".experts.2." not in n}
    with pytest.raises(CheckpointFormatError, match="not complete"):
        plan(with_tensors(family("mixtral"), tmp_path / "experts", experts))


def test_buffers_of_old_checkpoints_are_left_out(family: Made, exported: Made, tmp_path: Path) -> None:
    tensors = load_tensors(family("llama2"))
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    folder = with_tensors(family("llama2"), tmp_path / "old", tensors)
    assert stored(write_gguf(open_checkpoint(folder), tmp_path / "out.gguf").output) == stored(exported("llama2"))


def test_configs_of_transformers_4_say_the_same(family: Made, tmp_path: Path) -> None:
    """There, the rotary settings lay in other fields."""
    for name in ("llama3", "gemma3", "phi_long", "gpt_neox"):
        config = json.loads((family(name) / "config.json").read_text(encoding="utf-8"))
        rope = config["rope_parameters"]
        old: dict[str, Any] = {"rope_parameters": None}
        if name == "gemma3":
            old |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "layer_types": None, "sliding_window_pattern": 6}
        else:
            scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type", "partial_rotary_factor")}
            old |= {"rope_theta": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor")}
            old["rope_scaling"] = {"type": rope["rope_type"], **scaling} if scaling else None
        new, before = plan(family(name)), plan(changed(family(name), tmp_path / name, **old))
        assert new.facts == before.facts
        for ours, theirs in zip(new.targets, before.targets, strict=True):
            assert np.array_equal(ours.values, theirs.values) if ours.values is not None else ours.name == theirs.name


def test_another_period_of_the_sliding_window_is_said(family: Made, tmp_path: Path) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    facts = plan(changed(family("gemma3"), tmp_path / "three", layer_types=kinds)).facts
    assert facts["gemma3.attention.sliding_window_pattern"] == 3
    assert "gemma3.attention.sliding_window_pattern" not in plan(family("gemma3")).facts


def test_an_ignored_sliding_window_is_noted(family: Made, tmp_path: Path) -> None:
    notes = plan(changed(family("mistral"), tmp_path / "window", sliding_window=128)).notes
    assert any("128 tokens" in note for note in notes)
    assert not plan(family("mistral")).notes


def test_what_the_file_says_of_itself(family: Made, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(family("mixtral"))
    done = write_gguf(checkpoint, tmp_path / "out.gguf", name="My Model v2", kind="q8_0", keys={"x.y": "ä"})
    fields = {key: field.contents() for key, field in GGUFReader(done.output).fields.items()}
    assert fields["general.name"] == "My Model v2"
    assert fields["general.architecture"] == done.architecture == "llama"
    assert fields["general.file_type"] == 7
    assert fields["general.quantization_version"] == 2
    assert fields["general.size_label"] == "4x124K"
    assert fields["x.y"] == "ä"
    assert fields["nestpatch.version"]
    assert (fields["llama.expert_count"], fields["llama.expert_used_count"]) == (4, 2)
    assert fields["llama.rope.freq_base"] == 1e6
    assert done.tensors == len(GGUFReader(done.output).tensors)
