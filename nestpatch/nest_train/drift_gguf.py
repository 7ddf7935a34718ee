"""What llama.cpp's tokenizer makes of prompts and answers, for measuring drift."""

from __future__ import annotations

from collections.abc import Mapping

from nestpatch.nest_train.drift_logits import MAX_TOKENS
from nestpatch.nest_train.generate_llama import prompt_ids
from nestpatch.nest_train.llama import LlamaModel
from nestpatch.nest_train.text import Pair


def pairs_of(model: LlamaModel, answers: Mapping[str, str]) -> list[Pair]:
    """Token ids of prompts and answers; answers end with the end token unless they had to be cut."""
    end = [model.end] if model.end >= 0 else []
    prompts = prompt_ids(model, list(answers), MAX_TOKENS)
    texts = [(*model.encode(answer, special=False), *end)[:MAX_TOKENS] for answer in answers.values()]
    return [Pair(tuple(prompt), answer) for prompt, answer in zip(prompts, texts, strict=True)]
