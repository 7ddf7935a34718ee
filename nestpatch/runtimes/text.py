"""Texts to token batches: chat form, padding, labels, shuffling. What reads a tokenizer is for tokenizers of transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from nestpatch.errors import PromptDataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""
MAX_TOKENS = 512
"""Tokens of a prompt, and of an answer, that an evaluation reads at most."""
IntArray: TypeAlias = npt.NDArray[np.int64]
_T = TypeVar("_T")


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and of its answer, end token included.

    Attributes:
        prompt: Ids of the prompt in chat form.
        answer: Ids of the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def chat_texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The text that the model reads for each prompt, up to where its answer begins.

    Args:
        tokenizer: Its chat template is used; without one a prompt becomes a line.
        prompts: What a user asks.

    Returns:
        One text for each prompt.
    """
    if tokenizer.chat_template is None:
        return [f"{prompt}\n" for prompt in prompts]
    if not prompts:  # transformers takes no empty list
        return []
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return [str(text) for text in texts]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], limit: int) -> list[list[int]]:
    """Token ids of the prompts in chat form.

    Args:
        tokenizer: Of the model.
        prompts: What a user asks.
        limit: A longer prompt keeps its last `limit` tokens.

    Returns:
        The ids of each prompt.
    """
    if not prompts:
        return []
    # A chat template writes its own begin-of-text token.
    special = tokenizer.chat_template is None
    ids = tokenizer(chat_texts(tokenizer, prompts), add_special_tokens=special)["input_ids"]
    return [list(row)[-limit:] for row in ids]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], max_prompt: int, max_answer: int
) -> list[TokenPair]:
    """(prompt, answer) texts to token ids.

    Args:
        tokenizer: Of the model.
        texts: Prompts and answers.
        max_prompt: A longer prompt keeps its last tokens.
        max_answer: A longer answer keeps its first tokens, and has no end token then.

    Returns:
        One pair for each text.
    """
    if not texts:
        return []
    prompts = prompt_ids(tokenizer, [prompt for prompt, _ in texts], max_prompt)
    answers = tokenizer([answer for _, answer in texts], add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [TokenPair(tuple(p), tuple([*a, end][:max_answer])) for p, a in zip(prompts, answers, strict=True)]


def pad_left(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[IntArray, IntArray]:
    """Token ids as one array, padded at the left so that all prompts end together.

    Args:
        rows: Token ids of each prompt.
        pad: The id to pad with.

    Returns:
        (ids, mask), int64 [rows, longest]; the mask is 0 where ids are padding.
    """
    width = max(map(len, rows))
    ids = np.asarray([[pad] * (width - len(row)) + list(row) for row in rows], np.int64)
    mask = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    return ids, mask


def collate(pairs: Sequence[TokenPair], pad: int, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs as one batch, padded at the right.

    Args:
        pairs: Prompts and answers.
        pad: The id to pad with.
        device: Where the tensors are put.

    Returns:
        (ids, mask, labels), int64 [pairs, longest]; labels are IGNORED except on answer tokens.
    """
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


def split_off(items: Sequence[_T], share: float, rng: random.Random) -> tuple[list[_T], list[_T]]:
    """Holds out a random share of the items.

    Args:
        items: What to split.
        share: Between 0 and 1; at least one item is held out.
        rng: Decides which.

    Returns:
        (kept, held out).

    Raises:
        PromptDataError: There are fewer than two items.
    """
    if len(items) < 2:
        raise PromptDataError(f"{len(items)} prompts are too few: some must be held out to decide when to stop")
    order = rng.sample(list(items), len(items))
    held_out = max(1, round(len(items) * share))
    return order[held_out:], order[:held_out]


def endless(items: Sequence[_T], size: int, rng: random.Random) -> Iterator[list[_T]]:
    """Batches without end; every item is seen once before any is seen again.

    Args:
        items: What to draw from.
        size: Items of a batch.
        rng: Decides the order.

    Yields:
        The next batch.
    """
    queue: list[_T] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(list(items), len(items))
        batch, queue = queue[:size], queue[size:]
        yield batch
