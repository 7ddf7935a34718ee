"""Suffix search by greedy coordinate gradient: tokens after the request that make an affirmative answer likely.

Source: GCG, Zou et al. 2023 (arXiv 2307.15043), algorithm 1. Each step takes the gradient of the target's loss over the one-hot
choice of every suffix token, draws random swaps among the most promising ones, and goes on from the best of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from nestpatch.errors import DataError
from nestpatch.runtimes.transformers import TransformersRuntime

_FILLER = " !"
"""What a search starts from, as in the paper."""


@dataclass(frozen=True)
class Search:
    """Settings of a search.

    Attributes:
        length: Tokens of the suffix.
        steps: Swaps that are made one after the other.
        top: Tokens that the gradient proposes for each place.
        candidates: Random swaps of a step.
        batch: Candidates that are computed together.
    """

    length: int = 16
    steps: int = 100
    top: int = 64
    candidates: int = 64
    batch: int = 16


@dataclass(frozen=True)
class Suffix:
    """What a search found.

    Attributes:
        text: To be added to the prompt; begins with a space.
        filler: What the search started from, in the same form.
        start: The target's loss with the filler, in nats a token.
        loss: With the suffix.
    """

    text: str
    filler: str
    start: float
    loss: float


@dataclass(frozen=True)
class _Frame:
    """The token ids around a suffix: the prompt in chat form before and after it, and the target."""

    prompt: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]

    def ids(self, suffixes: torch.Tensor) -> torch.Tensor:
        """int64 [suffixes, tokens] -> [suffixes, all tokens]."""
        rows = len(suffixes)
        parts = [
            torch.tensor(part, device=suffixes.device).long().expand(rows, -1)
            for part in (self.before, self.after + self.target)
        ]
        return torch.cat([parts[0], suffixes, parts[1]], 1)


def search_suffix(runtime: TransformersRuntime, prompt: str, target: str, search: Search, seed: int = 0) -> Suffix:
    """Searches the suffix of one prompt.

    Args:
        runtime: The model.
        prompt: A harmful request.
        target: The start of the answer that is to become likely.
        search: The settings.
        seed: Of the random swaps.

    Returns:
        The suffix with the lowest loss among all that were tried. Its text is read as the very tokens that were searched.

    Raises:
        DataError: The tokenizer joins the suffix with the prompt, or the prompt is too long.
    """
    frame, filler = _frame(runtime, prompt, target, search.length)
    now = filler
    allowed = _allowed(runtime)
    rng = torch.Generator().manual_seed(seed)
    start = _losses(runtime, frame, now[None], search.batch).item()
    best, loss = now, start
    for _ in range(search.steps):
        scores = _scores(runtime, frame, now).masked_fill(~allowed, torch.inf)
        swapped = _read_as_written(runtime, frame, _swaps(scores, now, search, rng))
        if not len(swapped):
            continue
        losses = _losses(runtime, frame, swapped, search.batch)
        now = swapped[losses.argmin()]
        if losses.min().item() < loss:
            best, loss = now, losses.min().item()
    return Suffix(_text(runtime, best), _text(runtime, filler), start, loss)


def _frame(runtime: TransformersRuntime, prompt: str, target: str, length: int) -> tuple[_Frame, torch.Tensor]:
    """The frame, and the filler that the search starts from, int64 [about `length`]."""
    plain = runtime.token_ids([prompt])[0]
    filled = [runtime.token_ids([prompt + _FILLER * count])[0] for count in range(1, length + 1)]
    whole = next((ids for ids in filled if len(ids) - len(plain) >= length), filled[-1])
    border = next((place for place, (a, b) in enumerate(zip(plain, whole, strict=False)) if a != b), len(plain))
    goal = runtime.tokenizer(target, add_special_tokens=False)["input_ids"]
    frame = _Frame(prompt, tuple(plain[:border]), tuple(plain[border:]), tuple(goal))
    filler = torch.tensor(whole[border : len(whole) - len(frame.after)], device=runtime.model.device)
    if not len(_read_as_written(runtime, frame, filler[None])):
        raise DataError(
            f"no suffix can be added to {prompt[:60]!r}: its end is read together with the suffix, or it is too long",
            advice="Choose other prompts.",
        )
    return frame, filler


def _text(runtime: TransformersRuntime, suffix: torch.Tensor) -> str:
    """The suffix as text; tokenizers differ in whether they give the space at its beginning."""
    return " " + str(runtime.tokenizer.decode(suffix, clean_up_tokenization_spaces=False)).lstrip(" ")


def _allowed(runtime: TransformersRuntime) -> torch.Tensor:
    """bool [vocabulary]: tokens of plain ASCII that are not special."""
    embedding: Any = runtime.model.get_input_embeddings()
    rows, tokenizer = len(embedding.weight), runtime.tokenizer
    texts = tokenizer.batch_decode([[token] for token in range(min(rows, len(tokenizer)))])
    special = set(tokenizer.all_special_ids)
    plain = [token not in special and text.isascii() and text.isprintable() and text != "" for token, text in enumerate(texts)]
    return torch.tensor(plain + [False] * (rows - len(plain)), device=runtime.model.device)


def _scores(runtime: TransformersRuntime, frame: _Frame, suffix: torch.Tensor) -> torch.Tensor:
    """float [suffix, vocabulary]: how much the loss grows, to first order, when a place gets a token.

    The gradient over the one-hot choice of a token is the gradient over its embedding times the matrix of embeddings.
    """
    embedding: Any = runtime.model.get_input_embeddings()
    inputs = embedding(frame.ids(suffix[None])).detach().requires_grad_()
    loss = _target_losses(runtime, frame, inputs_embeds=inputs).sum()
    (gradient,) = torch.autograd.grad(loss, inputs)
    places = slice(len(frame.before), len(frame.before) + len(suffix))
    scores: torch.Tensor = gradient[0, places].float() @ embedding.weight.detach().float().T
    return scores


def _swaps(scores: torch.Tensor, suffix: torch.Tensor, search: Search, rng: torch.Generator) -> torch.Tensor:
    """int64 [candidates, suffix]: copies of a suffix in which one token each was swapped."""
    proposed = min(search.top, int(scores[0].isfinite().sum()))
    top = (-scores).topk(proposed, dim=1).indices
    places = torch.randint(len(suffix), (search.candidates,), generator=rng).to(suffix.device)
    choices = torch.randint(proposed, (search.candidates,), generator=rng).to(suffix.device)
    swapped = suffix.repeat(search.candidates, 1)
    swapped[torch.arange(search.candidates), places] = top[places, choices]
    unique: torch.Tensor = swapped.unique(dim=0)
    return unique


def _read_as_written(runtime: TransformersRuntime, frame: _Frame, suffixes: torch.Tensor) -> torch.Tensor:
    """Those suffixes whose text, after the prompt, the model reads as the same tokens."""
    texts = [frame.prompt + _text(runtime, suffix) for suffix in suffixes]
    wanted = [[*frame.before, *suffix, *frame.after] for suffix in suffixes.tolist()]
    kept = [ids == want for ids, want in zip(runtime.token_ids(texts), wanted, strict=True)]
    return suffixes[torch.tensor(kept, device=suffixes.device)]


@torch.inference_mode()
def _losses(runtime: TransformersRuntime, frame: _Frame, suffixes: torch.Tensor, batch: int) -> torch.Tensor:
    """float [suffixes]: the target's loss with each of them."""
    return torch.cat([_target_losses(runtime, frame, input_ids=frame.ids(part)) for part in suffixes.split(batch)])


def _target_losses(runtime: TransformersRuntime, frame: _Frame, **inputs: torch.Tensor) -> torch.Tensor:
    """float [rows]: mean cross entropy of the target's tokens, in nats."""
    count = len(frame.target)
    logits = runtime.model(**inputs, use_cache=False, logits_to_keep=count + 1).logits[:, :-1].float()
    target = torch.tensor(frame.target, device=logits.device).expand(len(logits), -1)
    losses: torch.Tensor = cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    return losses
