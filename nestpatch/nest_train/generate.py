"""Batched greedy generation behind one function type, whatever runs the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from nestpatch.events import Event, OnEvent, ignore
from nestpatch.nest_train.text import pad_left, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Generate: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Prompts in, answers out, in the same order."""


def with_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    batch: int = 64,
    on_event: OnEvent = ignore,
) -> Generate:
    """Greedy generation in transformers; every answer ends at the end token or after `max_new_tokens`."""
    import torch
    from transformers import GenerationConfig

    stop = model.generation_config.eos_token_id if model.generation_config else None
    # A config of our own: a shipped one may ask for sampling, penalties or beams.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=stop if stop is not None else tokenizer.eos_token_id,
    )

    def generate(prompts: Sequence[str]) -> list[str]:
        rows = prompt_ids(tokenizer, prompts, max_prompt_tokens)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        answers = [""] * len(rows)
        for start in range(0, len(order), batch):
            places = order[start : start + batch]
            ids, mask = pad_left([rows[i] for i in places], tokenizer.pad_token_id, model.device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
            on_event(Event("generate", min(start + batch, len(order)), len(order)))
        return answers

    return generate
