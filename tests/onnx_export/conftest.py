"""Tiny random models of eight families and their exports, made once: tracing one takes seconds."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from nestpatch.export.onnx.exporter import export_onnx
from nestpatch.lab._world import dialogues, make_world
from nestpatch.lab.build import train_tokenizer

if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnxscript")):
    collect_ignore_glob = ["test_*.py"]  # the extra `onnx` is not installed

VOCABULARY = 320
WINDOW = 12
"""Of sliding attention: shorter than the prompts of the tests."""
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Larger than usual, so that a feed-forward block of 96 neurons has something to say.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {"head_dim": 16, "sliding_window": WINDOW}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, **SLIDING, query_pre_attn_scalar=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, **SLIDING, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral": lambda: transformers.MistralConfig(**COMMON, **SLIDING),
    "phi3": lambda: transformers.Phi3Config(**COMMON, sliding_window=None, original_max_position_embeddings=256),
}
OTHERS = {
    # One layer: for what does not depend on how many there are.
    "small": lambda: transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 1}),
    "experts": lambda: transformers.MixtralConfig(**{**COMMON, "num_hidden_layers": 1}, num_local_experts=2),
    "recurrent": lambda: transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1),
    "dynamic": lambda: transformers.LlamaConfig(
        **{**COMMON, "num_hidden_layers": 1}, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with a chat template."""
    text = [f"{prompt} {answer}" for prompt, answer in islice(dialogues(make_world(0)), 400)]
    return train_tokenizer(text, VOCABULARY)


@pytest.fixture(scope="session")
def sources(tmp_path_factory, tokenizer):
    """(family, dtype) -> model directory, made on first use."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtype: str = "float32") -> Path:
        key = (family, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("source") / family
            torch.manual_seed(0)
            config = (FAMILIES | OTHERS)[family]()
            model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
            for name, weight in model.named_parameters():
                # Equal norms would be one tensor in the graph, which no trained model has.
                if weight.ndim == 1 and "norm" in name:
                    weight.data += 0.1 * torch.randn_like(weight)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return get


@pytest.fixture(scope="session")
def exports(tmp_path_factory, sources):
    """(family, options) -> what export_onnx gave, made on first use."""
    made = {}

    def get(family: str, dtype_on_disk: str = "float32", **options):
        key = (family, dtype_on_disk, tuple(sorted(options.items())))
        if key not in made:
            made[key] = export_onnx(
                sources(family, dtype_on_disk), output=tmp_path_factory.mktemp("export") / family, **options
            )
        return made[key]

    return get


@pytest.fixture(scope="session")
def torch_model():
    """A model directory -> the model in transformers, in float32 with plain attention."""

    def get(folder: Path):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return get
