"""Texts to token batches: chat form, padding, labels, batches of similar length.

The functions that take a tokenizer take one of transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that PyTorch's cross entropy leaves out."""
MAX_TOKENS = 512
"""Tokens of a prompt, and of an answer, that an evaluation reads at most."""
_ALIGNED = 8
"""Tokens of which the width of a batch is a multiple on an accelerator."""
IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "user" or "assistant", as chat templates name them.
        content: What was said.
    """

    role: str
    content: str


Conversation: TypeAlias = str | Sequence[Turn]
"""What a model answers: the turns of a conversation, oldest first, or one prompt, which is a conversation of one turn."""


def prompt_room(context: int | None, answer: int) -> int:
    """How long a prompt may be in the context of a model.

    Args:
        context: Tokens that the model was made for; None where nothing says so.
        answer: Tokens that are kept free for an answer.

    Returns:
        Tokens of a prompt at most.

    Raises:
        DataError: An answer alone fills the context.
    """
    if context is None:
        return sys.maxsize
    if answer >= context:
        raise DataError(
            f"an answer of {answer} tokens leaves no room for a prompt: the context of the model has {context} tokens",
            advice="Give a smaller number with --max-new-tokens.",
        )
    return context - answer


def turns_of(prompt: Conversation) -> Sequence[Turn]:
    """The turns of a conversation.

    Args:
        prompt: What a user asks, or turns.

    Returns:
        The turns, oldest first.
    """
    return [Turn("user", prompt)] if isinstance(prompt, str) else prompt


def messages_of(prompt: Conversation) -> list[dict[str, Any]]:
    """A conversation as chat templates take it.

    Args:
        prompt: What a user asks, or turns.

    Returns:
        One message for each turn, with its role and its content.
    """
    return [{"role": turn.role, "content": turn.content} for turn in turns_of(prompt)]


def plain_text(prompt: Conversation) -> str:
    """A conversation as a model without a chat template reads it.

    Args:
        prompt: What a user asks, or turns.

    Returns:
        A line for each turn.
    """
    return "".join(f"{turn.content}\n" for turn in turns_of(prompt))


@dataclass(frozen=True)
class TokenPair:
    """Token ids of a prompt and of its answer, end token included.

    Attributes:
        prompt: Ids of the prompt in chat form.
        answer: Ids of the answer.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def chat_texts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Conversation]) -> list[str]:
    """The text that the model reads for each prompt, up to where its answer begins.

    Args:
        tokenizer: Its chat template is used; without one a turn becomes a line.
        prompts: What a user asks, or turns of conversations.

    Returns:
        One text for each prompt.
    """
    if tokenizer.chat_template is None:
        return [plain_text(prompt) for prompt in prompts]
    if not prompts:  # transformers takes no empty list
        return []
    # Those of some vision-language models take a list of parts, and write nothing of a text.
    wrap = _as_parts if _writes(tokenizer, _as_parts) and not _writes(tokenizer, messages_of) else messages_of
    texts = tokenizer.apply_chat_template([wrap(prompt) for prompt in prompts], tokenize=False, add_generation_prompt=True)
    return [str(text) for text in texts]


def _as_parts(prompt: Conversation) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": [{"type": "text", "text": turn.content}]} for turn in turns_of(prompt)]


def _writes(tokenizer: PreTrainedTokenizerBase, wrap: Callable[[Conversation], list[dict[str, Any]]]) -> bool:
    """Whether the chat template writes a prompt that is wrapped so, and nothing but the prompt of it."""
    try:
        text = str(tokenizer.apply_chat_template(wrap("a prompt"), tokenize=False))
    except Exception:  # noqa: BLE001 - a template may raise whatever it likes
        return False
    return "a prompt" in text and "'type'" not in text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Conversation], limit: int) -> list[list[int]]:
    """Token ids of the prompts in chat form.

    Args:
        tokenizer: Of the model.
        prompts: What a user asks, or turns of conversations.
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


def by_length(rows: Sequence[Sized], size: int, *, mixed: bool = True) -> list[list[int]]:
    """Chooses which rows run together: rows of similar length, shortest first, so that little is padded.

    Args:
        rows: Token ids or text of each prompt.
        size: Rows of a batch at most.
        mixed: Whether rows of different length may share a batch.

    Returns:
        The positions in `rows` of each batch.
    """
    batches: list[list[int]] = []
    for place in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        last = batches[-1] if batches else []
        if last and len(last) < size and (mixed or len(rows[last[0]]) == len(rows[place])):
            last.append(place)
        else:
            batches.append([place])
    return batches


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
        (ids, mask, labels), int64 [pairs, width]; labels are IGNORED except on answer tokens. The width is that of the longest
        pair; on an accelerator, whose kernels for attention want it and are chosen anew for each width, a multiple of 8.
    """
    import torch

    width = max(len(pair.prompt) + len(pair.answer) for pair in pairs)
    if torch.device(device).type != "cpu":
        width += -width % _ALIGNED
    ids = torch.full((len(pairs), width), pad)
    mask = torch.zeros(len(pairs), width, dtype=torch.long)
    labels = torch.full((len(pairs), width), IGNORED)
    for row, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt) + len(pair.answer)
        ids[row, :end] = torch.tensor(pair.prompt + pair.answer)
        mask[row, :end] = 1
        labels[row, start:end] = torch.tensor(pair.answer)
    return ids.to(device), mask.to(device), labels.to(device)
