"""A model in transformers: greedy answers, whole or piece by piece, logits, and a pack merged in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import DataError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import FloatArray
from nestpatch.runtimes._pieces import decoded
from nestpatch.runtimes.devices import pick_device, pick_dtype
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.sharded import is_sharded, no_gradients
from nestpatch.runtimes.states import layers_of, pooled_states
from nestpatch.runtimes.text import (
    IGNORED,
    MAX_TOKENS,
    Conversation,
    TokenPair,
    by_length,
    collate,
    encode_pairs,
    pad_left,
    prompt_ids,
    prompt_room,
)
from nestpatch.runtimes.threads import wait_passively
from nestpatch.runtimes.weights import find_mlps, merged_parameters, swapped_in

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_BATCH = 64
"""Prompts that run together on a CPU."""
_ACCELERATED_BATCH = 256
"""The same on an accelerator, where a token of a small model takes as long for 256 prompts as for 64."""


def answer_logits(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
    """The logits from which the answers of a batch are predicted.

    Args:
        model: A loaded model.
        batch: (ids, mask, labels) of `collate`.

    Returns:
        (logits, labels): float32 [answer tokens, vocabulary] and int64 [answer tokens].
    """
    ids, mask, labels = batch
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:] != IGNORED
    return logits[wanted].float(), labels[:, 1:][wanted]


def _context(model: PreTrainedModel) -> int | None:
    """Tokens that a model reads at once at most; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@dataclass(frozen=True, eq=False)
class TransformersRuntime:
    """A model in transformers, as `nestpatch.runtimes.protocol.Runtime`.

    Attributes:
        model: The loaded model.
        tokenizer: Its tokenizer; pads at the left.
        max_new_tokens: Length of an answer.
        max_prompt_tokens: A longer prompt keeps its last tokens.
        batch: Prompts that run together, at most; 0 chooses by the device.
        path: The model on disk, which a pack is merged with; None: no pack can be attached.
        active: Entered while the model computes: puts other weights in, and takes them out again.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 48
    max_prompt_tokens: int = MAX_TOKENS
    batch: int = 0
    path: Path | None = None
    active: Callable[[], AbstractContextManager[None]] = nullcontext

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = MAX_TOKENS,
    ) -> TransformersRuntime:
        """Loads a model.

        Args:
            path: A model directory, or a weight file beside its config.
            device: For `pick_device`.
            dtype: For `pick_dtype`.
            threads: Threads of PyTorch, for the whole process; None leaves PyTorch's own number, which OMP_NUM_THREADS sets.
            max_new_tokens: Length of an answer.
            max_prompt_tokens: A longer prompt keeps its last tokens; None: what the context leaves beside an answer.

        Returns:
            The runtime.

        Raises:
            CheckpointFormatError: transformers cannot load it.
            DataError: PyTorch cannot compute on the device, or an answer is longer than the context.
        """
        wait_passively()
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        device = pick_device(device)[0]
        model, tokenizer = load_model(path, device, pick_dtype(dtype, device)[0])
        if max_prompt_tokens is None:
            max_prompt_tokens = prompt_room(_context(model), max_new_tokens)
        return cls(model, tokenizer, max_new_tokens, max_prompt_tokens, path=path)

    @property
    def together(self) -> int:
        """Prompts that run together, at most."""
        return self.batch or (_BATCH if self.model.device.type == "cpu" else _ACCELERATED_BATCH)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at once at most; None where its configuration does not say."""
        return _context(self.model)

    def text_ids(self, text: str) -> list[int]:
        """Turns plain text into token ids, without the chat template.

        Args:
            text: Any text.

        Returns:
            The ids, with the begin token where the tokenizer adds one.
        """
        return list(self.tokenizer(text, verbose=False)["input_ids"])

    def token_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """Turns prompts in chat form into token ids.

        Args:
            prompts: What a user asks, or turns of conversations. A longer one keeps its last `max_prompt_tokens`.

        Returns:
            The ids of each prompt.
        """
        return prompt_ids(self.tokenizer, prompts, self.max_prompt_tokens)

    def token_pairs(self, answers: Mapping[str, str]) -> list[TokenPair]:
        """Turns prompts and answers into token ids.

        Args:
            answers: Prompt -> answer.

        Returns:
            One pair for each prompt; an answer has an end token unless it had to be cut.
        """
        return encode_pairs(self.tokenizer, list(answers.items()), MAX_TOKENS, MAX_TOKENS)

    def generate(self, prompts: Sequence[str], on_event: OnEvent = ignore) -> list[str]:
        """Generates greedy answers.

        Args:
            prompts: What a user asks.
            on_event: Receives the progress.

        Returns:
            One answer for each prompt, which ends at an end token or after `max_new_tokens`.
        """
        import torch

        config = self._greedily(self.max_new_tokens)
        rows = self.token_ids(prompts)
        answers, done = [""] * len(rows), 0
        for places in by_length(rows, self.together):
            padded = pad_left([rows[i] for i in places], int(self.tokenizer.pad_token_id))
            ids, mask = (torch.from_numpy(part).to(self.model.device) for part in padded)
            with self.active(), no_gradients(self.model):
                texts = self._completions(ids, mask, config)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
            done += len(places)
            on_event(Event("generate", done, len(rows)))
        return answers

    def _completions(self, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig) -> list[str]:
        """The answers to one batch; where memory does not suffice for all of it, half after half."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        try:
            out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
        except Exception as error:  # each device has its own
            # Processes that share one model make the same passes.
            if len(ids) == 1 or is_sharded(self.model) or not should_reduce_batch_size(error):
                raise
        else:
            return list(self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True))
        clear_device_cache(garbage_collection=True)
        half = len(ids) // 2
        halves = [(ids[:half], mask[:half]), (ids[half:], mask[half:])]
        return [text for part in halves for text in self._completions(*part, config)]

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Generates a greedy answer piece by piece.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Yields:
            Pieces of the answer; joined they are what `generate` returns for the prompt.
        """
        (row,) = self.token_ids([prompt])
        yield from decoded(self.tokenizer, self._steps(row))

    def _steps(self, row: Sequence[int]) -> Iterator[int]:
        """The tokens of an answer; other weights are in the model only while it computes one."""
        import torch
        from transformers import DynamicCache

        config = self._greedily(1)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ids, past = torch.tensor([list(row)], device=self.model.device), DynamicCache(config=self.model.config)
        for _ in range(self.max_new_tokens):
            with self.active(), torch.inference_mode():
                ids = self.model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, past_key_values=past
                )
            token = int(ids[0, -1])
            yield token
            if token in ends:
                return

    def _greedily(self, max_new_tokens: int) -> GenerationConfig:
        """A config of our own: a shipped one may ask for sampling, penalties or beams."""
        from transformers import GenerationConfig

        stop = self.model.generation_config.eos_token_id if self.model.generation_config else None
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=stop if stop is not None else self.tokenizer.eos_token_id,
        )

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """Runs the model on one text.

        Args:
            ids: Token ids.
            start: The first position whose prediction is returned.

        Returns:
            float32 [ids - start, vocabulary]: the logits after each of the ids from `start` on.
        """
        import torch

        with self.active(), torch.inference_mode():
            found = self.model(torch.tensor([list(ids)], device=self.model.device)).logits[0, start:]
        rows: FloatArray = found.float().cpu().numpy()
        return rows

    def prompt_states(self, prompts: Sequence[Conversation], layer: int, pooling: str) -> FloatArray:
        """Reads a hidden state of each prompt in chat form: the residual stream after a layer, pooled over the tokens.

        Args:
            prompts: What a user asks, or turns of conversations.
            layer: The layer, from 0.
            pooling: One of `nestpatch.detector.POOLINGS`.

        Returns:
            float32 [prompts, hidden].

        Raises:
            DataError: The model has no such layer.
            UnsupportedModelError: Its layers are not known.
        """
        import torch

        layers, _ = layers_of(self.model, find_mlps(self.model)[0])
        if layer >= len(layers):
            raise DataError(f"there is no layer {layer}: the model has {len(layers)}", advice="Give the model of the pack.")
        rows = self.token_ids(prompts)
        found: dict[int, FloatArray] = {}
        for places in by_length(rows, self.together):
            # Padded at the right, so that positions begin at 0 as they do in other runtimes.
            pairs = [TokenPair(tuple(rows[place]), ()) for place in places]
            ids, mask, _ = collate(pairs, int(self.tokenizer.pad_token_id), self.model.device)
            with self.active(), torch.inference_mode(), pooled_states(layers, [(layer, pooling)], mask.bool) as states:
                self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            found |= dict(zip(places, states[layer, pooling].cpu().numpy(), strict=True))
        return np.stack([found[place] for place in range(len(rows))])

    @contextmanager
    def with_pack(self, pack: Pack, strength: float = 1.0) -> Iterator[TransformersRuntime]:
        """Yields the same loaded model with a pack merged in memory; this runtime goes on without it.

        Args:
            pack: What to merge.
            strength: Factor of the pack's change.

        Raises:
            BaseMismatchError: The model is not the pack's base.
            DataError: The runtime has no model on disk.
        """
        if self.path is None:
            raise DataError(f"{pack.label} cannot be merged into a model that is in memory alone")
        parts = list(merged_parameters(self.model, open_model(self.path)[0], pack, strength))
        yield replace(self, active=partial(swapped_in, parts))

    def with_adapter(self, adapter: Path) -> AbstractContextManager[TransformersRuntime]:
        """Rejects the adapter: adapter files are for llama.cpp and onnxruntime.

        Args:
            adapter: Named in the error.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"the adapter {adapter} goes with a .gguf or an ONNX model",
            advice="Give the pack itself: nestpatch eval MODEL PACK",
        )
