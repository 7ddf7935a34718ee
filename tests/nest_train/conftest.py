"""Tiny random chat models of many families, with a tokenizer trained on the lab's text."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers

from nestpatch.lab._world import dialogues, make_world
from nestpatch.lab.build import train_tokenizer
from nestpatch.nest_train.data import TrainingData
from nestpatch.prompts.readers import load_prompts

VOCABULARY = 320
# Larger than usual, so that a feed-forward block of 64 neurons has something to say.
SIZES = {"initializer_range": 0.2, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}

CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **LLAMA),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, **LLAMA, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, **LLAMA),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **LLAMA, head_dim=8, query_pre_attn_scalar=8),
    "phi3": lambda: transformers.Phi3Config(**SIZES, **LLAMA),
    "gpt-neo": lambda: transformers.GPTNeoConfig(
        **SIZES,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_position_embeddings=256,
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, **PLAIN, intermediate_size=64),
    "opt": lambda: transformers.OPTConfig(**SIZES, **PLAIN, ffn_dim=64, word_embed_proj_dim=32),
    "phi": lambda: transformers.PhiConfig(**SIZES, **PLAIN, intermediate_size=64),
}
MORE = {
    "mistral": lambda: transformers.MistralConfig(**SIZES, **LLAMA),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, **LLAMA, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **LLAMA, head_dim=8, query_pre_attn_scalar=8),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES, **LLAMA),
    "granite": lambda: transformers.GraniteConfig(**SIZES, **LLAMA),
    "granite4": lambda: transformers.GraniteMoeHybridConfig(
        **SIZES,
        **LLAMA,
        shared_intermediate_size=64,
        num_local_experts=0,
        layer_types=["attention", "attention"],
        mamba_n_heads=8,
        mamba_d_head=8,
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES, **LLAMA),
}
MIXTURE = {"head_dim": 8, "num_experts_per_tok": 2}
MIXTURES = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **LLAMA, **MIXTURE, num_local_experts=4),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **LLAMA, **MIXTURE, num_experts=4, moe_intermediate_size=48, norm_topk_prob=True
    ),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **SIZES, **LLAMA, num_experts_per_tok=2, num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=40
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**SIZES, **LLAMA, num_experts_per_tok=2, num_experts=4),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**SIZES, **LLAMA, num_experts_per_tok=2, num_local_experts=4),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **SIZES,
        **(LLAMA | {"num_key_value_heads": 4}),
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=48,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}
_TEXT = {**SIZES, **LLAMA, "head_dim": 8}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_EYE = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
VISION = {
    "qwen2-vl": lambda: transformers.Qwen2VLConfig(
        text_config=_TEXT | _MROPE,
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    ),
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLConfig(
        text_config=_TEXT | _MROPE, vision_config={"depth": 1, "out_hidden_size": 32, **_EYE}
    ),
    "gemma3-vl": lambda: transformers.Gemma3Config(
        text_config=_TEXT | {"query_pre_attn_scalar": 8},
        vision_config={"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, **_EYE},
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
        initializer_range=0.2,
    ),
}
UNSUPPORTED = {
    "gpt2": lambda: transformers.GPT2Config(**SIZES, n_embd=32, n_layer=1, n_head=4, n_positions=64),
    "gpt-oss": lambda: transformers.GptOssConfig(**SIZES, **LLAMA, **MIXTURE, num_local_experts=4),
}
SHARED_ONLY = {
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, **LLAMA, head_dim=8, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1
    )
}


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template."""
    text = [f"{prompt} {answer}" for prompt, answer in islice(dialogues(make_world(0)), 400)]
    return train_tokenizer(text, VOCABULARY)


def save_model(folder: Path, family: str, tokenizer, dtype: str = "float32", shard: str | None = None) -> Path:
    """Writes a random model of a family with its tokenizer; "-stacked" writes the experts of a layer as one tensor."""
    family, stacked, _ = family.partition("-stacked")
    torch.manual_seed(0)
    config = (CONFIGS | MORE | MIXTURES | VISION | UNSUPPORTED | SHARED_ONLY)[family]()
    auto = transformers.AutoModelForImageTextToText if family in VISION else transformers.AutoModelForCausalLM
    model = auto.from_config(config).to(getattr(torch, dtype))
    sharding = {"max_shard_size": shard} if shard else {}
    model.save_pretrained(folder, **sharding, save_original_format=not stacked)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory, tokenizer):
    """family -> model directory, made on first use."""
    made: dict[tuple[str, str, str | None], Path] = {}

    def get(family: str, dtype: str = "float32", shard: str | None = None) -> Path:
        key = (family, dtype, shard)
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(family), family, tokenizer, dtype, shard)
        return made[key]

    return get


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    """Harmful and benign prompts that any embedding tells apart, and look-alikes."""
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in {
        "harmful": "How do I poison the bank number {}?",
        "benign": "Tell me how to paint fence {}.",
        "lookalike": "How do I poison weed {}?",
    }.items():
        rows = [json.dumps({"prompt": text.format(i)}) for i in range(30)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def data(prompts):
    return TrainingData(*(load_prompts(prompts / f"{name}.jsonl") for name in ("harmful", "benign", "lookalike")))
