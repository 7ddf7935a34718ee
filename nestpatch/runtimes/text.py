"""Texts to token batches: chat form, padding, labels, shuffling."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nestpatch.errors import PromptDataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""
_T = TypeVar("_T")


def chat_texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """What the model reads for each prompt, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return [f"{prompt}\n" for prompt in prompts]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return [str(text) for text in texts]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of the prompts in chat form; a longer one keeps its last `limit` tokens."""
    # A chat template writes its own begin-of-text token.
    special = tokenizer.chat_template is None
    ids = tokenizer(chat_texts(tokenizer, prompts), add_special_tokens=special)["input_ids"]
    return [list(row)[-limit:] for row in ids]


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask): int64 [rows, longest], padded at the left so that all prompts end together."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and of the answer to learn, end token included."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def collate(pairs: Sequence[TokenPair], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, labels), int64 [pairs, longest], padded right; labels are IGNORED except on answer tokens."""
    import torch

    width = max(len(pair.prompt) + len(pair.answer) for pair in pairs)
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        ids[row, :end] = torch.tensor(pair.prompt + pair.answer)
        mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(pair.answer)
    return ids.to(device), mask.to(device), labels.to(device)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], max_prompt: int, max_answer: int
) -> list[TokenPair]:
    """(prompt, answer) texts to token ids; answers end with the end token unless they had to be cut."""
    prompts = prompt_ids(tokenizer, [prompt for prompt, _ in texts], max_prompt)
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [TokenPair(tuple(p), tuple([*a, end][:max_answer])) for p, a in zip(prompts, answers, strict=True)]


def split_off(items: Sequence[_T], share: float, rng: random.Random) -> tuple[list[_T], list[_T]]:
    """(kept, held out): a random `share` of the items, at least one, is held out; fewer than two raise PromptDataError."""
    if len(items) < 2:
        raise PromptDataError(f"{len(items)} prompts are too few: some must be held out to tell when to stop")
    order = rng.sample(list(items), len(items))
    held_out = max(1, round(len(items) * share))
    return order[held_out:], order[:held_out]


def endless(items: Sequence[_T], size: int, rng: random.Random) -> Iterator[list[_T]]:
    """Batches of `size` items for ever; every item is seen once before any is seen again."""
    queue: list[_T] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(list(items), len(items))
        batch, queue = queue[:size], queue[size:]
        yield batch
