"""Greedy generation in llama.cpp: the twin of `with_transformers`, fed with the same token ids."""

from __future__ import annotations

from collections.abc import Sequence

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import OnEvent, ignore
from nestpatch.nest_train.chat import chat_renderer
from nestpatch.nest_train.generate import Generate
from nestpatch.nest_train.llama import LlamaModel

_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""The names that templates use -> those of GGUF files."""


def chat_texts(model: LlamaModel, prompts: Sequence[str]) -> list[str]:
    """What the model reads for each prompt, up to where its answer begins, by the template in its file."""
    template = model.metadata("tokenizer.chat_template")
    if template is None:
        return [f"{prompt}\n" for prompt in prompts]
    found = {name: model.token_text(key) for name, key in _TOKENS.items()}
    render = chat_renderer(template, {name: text for name, text in found.items() if text is not None})
    return [render(prompt) for prompt in prompts]


def prompt_ids(model: LlamaModel, prompts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of the prompts in chat form; a longer one keeps its last `limit` tokens.

    Raises CheckpointFormatError for a template that does not work.
    """
    # A chat template writes its own begin-of-text token.
    special = model.metadata("tokenizer.chat_template") is None
    ids = [model.encode(text, special=special)[-limit:] for text in chat_texts(model, prompts)]
    if not all(ids):
        raise CheckpointFormatError(f"the chat template of {model.path} makes nothing of a prompt")
    return ids


def with_llama(
    model: LlamaModel,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    batch: int = 8,
    on_event: OnEvent = ignore,
) -> Generate:
    """Greedy generation in llama.cpp; every answer ends at an end token or after `max_new_tokens`.

    `batch` prompts run side by side, each with a KV cache of its own in F32.
    """

    def generate(prompts: Sequence[str]) -> list[str]:
        rows = prompt_ids(model, prompts, max_prompt_tokens)
        return [model.decode(ids).strip() for ids in model.greedy(rows, max_new_tokens, batch, on_event)]

    return generate
