"""A GGUF model in llama.cpp: logits and greedy answers, with or without an adapter. Needs llama-cpp-python, no torch.

The KV cache is F32, so that only the model's own rounding is measured.
"""

from __future__ import annotations

import copy
import ctypes
import os
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointError, CheckpointFormatError, DataError, NestpatchError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.lora import gguf as lora_gguf
from nestpatch.pack import Pack
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import FloatArray
from nestpatch.runtimes import _llama_states
from nestpatch.runtimes._pieces import pieces
from nestpatch.runtimes.llama_file import TEMPLATE, LlamaFile, collect_errors, reason
from nestpatch.runtimes.text import MAX_TOKENS, Conversation, TokenPair, by_length, prompt_room
from nestpatch.runtimes.threads import pick_threads

_BATCH = 512
"""Tokens that llama.cpp computes at once."""
_F32 = 0


@dataclass
class _Slot:
    """One sequence that is being continued in a context."""

    number: int
    answer: list[int]
    position: int


class LlamaRuntime(LlamaFile):
    """A loaded GGUF file, as `nestpatch.runtimes.protocol.Runtime`. Close it, or use it in a `with` statement.

    Attributes:
        path: The file.
        vocabulary: How many tokens there are.
        max_new_tokens: Length of an answer.
        max_prompt_tokens: A longer prompt keeps its last tokens.
        batch: Prompts that run side by side, each with a KV cache of its own.
        threads: Threads that compute.
        end: Id of the end token, or -1.
        experts: Experts of each layer; None for a model without experts.
    """

    def __init__(
        self,
        path: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = MAX_TOKENS,
        batch: int = 8,
    ) -> None:
        """Loads a file.

        Args:
            path: A GGUF file.
            adapter: A GGUF adapter that is in use from the beginning.
            device: "auto", "cpu", "cuda", or "mps" for Metal.
            threads: For `pick_threads`.
            max_new_tokens: Length of an answer.
            max_prompt_tokens: A longer prompt keeps its last tokens; None: what the context leaves beside an answer.
            batch: Prompts that run side by side.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            CheckpointFormatError: llama.cpp does not load the file.
            DataError: This llama.cpp cannot compute on the device, or an answer is longer than the context.
        """
        super().__init__(path, device)
        self.threads = pick_threads(threads)
        self.max_new_tokens, self.batch = max_new_tokens, batch
        self._adapter: Any = None
        try:
            self.max_prompt_tokens = (
                prompt_room(self.context, max_new_tokens) if max_prompt_tokens is None else max_prompt_tokens
            )
            if adapter is not None:
                self._adapter = self._load_adapter(Path(adapter))
        except NestpatchError:
            self.close()
            raise

    def _load_adapter(self, adapter: Path) -> Any:
        collect_errors(self._library)
        if not adapter.is_file():
            raise CheckpointFormatError(f"there is no adapter file {adapter}", advice="Check the path.")
        loaded = self._library.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not loaded:
            raise CheckpointFormatError(
                f"llama.cpp cannot load the adapter {adapter} for {self.path}{reason()}",
                advice="An adapter fits models of one architecture and size: nestpatch export PACK --to gguf-lora",
            )
        return loaded

    def close(self) -> None:
        """Frees the model and its adapters; closing again does nothing."""
        self._adapter = None
        super().close()

    def token_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """Turns prompts in chat form into token ids.

        Args:
            prompts: What a user asks, or turns of conversations. A longer one keeps its last `max_prompt_tokens`.

        Returns:
            The ids of each prompt.

        Raises:
            CheckpointFormatError: The chat template does not work.
        """
        # A chat template writes its own begin-of-text token.
        special = self.metadata(TEMPLATE) is None
        ids = [self.encode(text, special=special)[-self.max_prompt_tokens :] for text in self.chat_texts(prompts)]
        if not all(ids):
            raise CheckpointFormatError(f"the chat template of {self.path} turns a prompt into an empty text")
        return ids

    def token_pairs(self, answers: Mapping[str, str]) -> list[TokenPair]:
        """Turns prompts and answers into token ids.

        Args:
            answers: Prompt -> answer.

        Returns:
            One pair for each prompt; an answer has an end token unless it had to be cut.
        """
        end = [self.end] if self.end >= 0 else []
        texts = [(*self.encode(answer, special=False), *end)[:MAX_TOKENS] for answer in answers.values()]
        return [TokenPair(tuple(prompt), answer) for prompt, answer in zip(self.token_ids(list(answers)), texts, strict=True)]

    def generate(self, prompts: Sequence[str], on_event: OnEvent = ignore) -> list[str]:
        """Generates greedy answers.

        Args:
            prompts: What a user asks.
            on_event: Receives the progress.

        Returns:
            One answer for each prompt, which ends at an end token or after `max_new_tokens`.
        """
        rows = self.token_ids(prompts)
        return [self.decode(ids).strip() for ids in self.greedy(rows, self.max_new_tokens, on_event)]

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Generates a greedy answer piece by piece.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Yields:
            Pieces of the answer; joined they are what `generate` returns for the prompt.
        """
        with closing(self._steps(self.token_ids([prompt]), self.max_new_tokens)) as steps:
            yield from pieces((slots[0].answer[-1] for slots in steps), self.decode)

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """Runs the model on one text.

        Args:
            ids: Token ids.
            start: The first position whose prediction is returned.

        Returns:
            float32 [ids - start, vocabulary]: the logits after each of the ids from `start` on.

        Raises:
            CheckpointError: llama.cpp fails.
        """
        out = np.empty((len(ids) - start, self.vocabulary), np.float32)
        with self._context(1, len(ids)) as context:
            for first in range(0, len(ids), _BATCH):
                part = enumerate(ids[first : first + _BATCH], first)
                tokens = [(token, position, 0, position >= start) for position, token in part]
                for place, row in self._step(context, tokens):
                    out[first + place - start] = row
        return out

    def prompt_states(self, prompts: Sequence[Conversation], layer: int, pooling: str) -> FloatArray:
        """Reads a hidden state of each prompt in chat form: the residual stream after a layer, pooled over the tokens.

        Args:
            prompts: What a user asks, or turns of conversations.
            layer: The layer, from 0. Of the last one llama.cpp computes the last token alone.
            pooling: One of `nestpatch.detector.POOLINGS`.

        Returns:
            float32 [prompts, hidden].

        Raises:
            DataError: The model has no such layer, or it is the last one.
            CheckpointError: llama.cpp fails, or does not give the states of this architecture.
        """
        layers = int(self._library.llama_model_n_layer(self._model))
        if layer >= layers - 1:
            raise DataError(f"llama.cpp gives no states of layer {layer} of {layers}", advice="Give the model of the pack.")
        rows = self.token_ids(prompts)
        output = _llama_states.LayerOutput(self._library, layer, int(self._library.llama_model_n_embd(self._model)))
        found = np.empty((len(rows), int(self._library.llama_model_n_embd(self._model))), np.float32)
        with self._context(1, max(map(len, rows), default=1), output.callback) as context:
            for place, ids in enumerate(rows):
                self._library.llama_memory_clear(self._library.llama_get_memory(context), True)
                for part in _llama_states.positions(ids, _BATCH):
                    list(self._step(context, part))
                found[place] = _llama_states.pool(output.take(len(ids)), pooling)
        return found

    @contextmanager
    def with_adapter(self, adapter: Path) -> Iterator[LlamaRuntime]:
        """Yields the same loaded model with an adapter; this runtime goes on without it.

        Args:
            adapter: A GGUF adapter.

        Raises:
            CheckpointFormatError: llama.cpp does not load the adapter.
        """
        other = copy.copy(self)
        other._adapter = self._load_adapter(Path(adapter))
        yield other

    @contextmanager
    def with_pack(self, pack: Pack, strength: float = 1.0) -> Iterator[LlamaRuntime]:
        """Yields the same loaded model with a pack as an adapter; this runtime goes on without it.

        Args:
            pack: What to add.
            strength: Factor of the pack's change.

        Raises:
            BaseMismatchError: The file is not the pack's base, or holds the pack already.
        """
        make_plan(pack, open_model(self.path)[0])
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "pack.gguf"
            lora_gguf.write(pack, adapter, strength, self.experts)
            with self.with_adapter(adapter) as other:
                yield other

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_event: OnEvent = ignore) -> list[list[int]]:
        """Continues prompts with the likeliest tokens.

        Args:
            prompts: Token ids of each prompt; `batch` of them run side by side.
            max_new_tokens: Length of a continuation.
            on_event: Receives the progress.

        Returns:
            The new token ids of each prompt, without the end token.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for places in by_length(prompts, self.batch):
            found = self._answer([prompts[i] for i in places], max_new_tokens)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
            done += len(places)
            on_event(Event("generate", done, len(prompts)))
        return answers

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for slots in self._steps(prompts, max_new_tokens):
            for slot in slots:
                answers[slot.number] = slot.answer
        return answers

    def _steps(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Generator[list[_Slot]]:
        """Continues prompts side by side; yields after each step those that got a token."""
        running = [_Slot(number, [], len(prompt)) for number, prompt in enumerate(prompts)]
        with self._context(len(prompts), max(map(len, prompts)) + max_new_tokens) as context:
            tokens = [
                (token, position, number, position + 1 == len(prompt))
                for number, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
            while tokens:
                chosen: dict[int, int] = {}
                for start in range(0, len(tokens), _BATCH):
                    part = tokens[start : start + _BATCH]
                    chosen |= {part[place][2]: int(row.argmax()) for place, row in self._step(context, part)}
                running = [slot for slot in running if not self.ends(chosen[slot.number])]
                for slot in running:
                    slot.answer.append(chosen[slot.number])
                    slot.position += 1
                if running:
                    yield running
                running = [slot for slot in running if len(slot.answer) < max_new_tokens]
                tokens = [(slot.answer[-1], slot.position - 1, slot.number, True) for slot in running]

    @contextmanager
    def _context(self, sequences: int, length: int, watch: Any = None) -> Iterator[Any]:
        """A context for some sequences of at most `length` tokens each; `watch` is called for every tensor it computes."""
        library, parameters = self._library, self._library.llama_context_default_params()
        # llama.cpp divides the cells of the cache by the sequences; each needs whole blocks of 256.
        parameters.n_ctx = sequences * (-(-length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = _BATCH
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = _F32
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified = False
        parameters.no_perf = True
        if watch is not None:
            parameters.cb_eval = watch
        collect_errors(library)
        context = library.llama_init_from_model(self._model, parameters)
        if not context:
            raise CheckpointError(f"llama.cpp cannot run {self.path}{reason()}")
        try:
            if self._adapter:
                adapters = (library.llama_adapter_lora_p_ctypes * 1)(self._adapter)
                library.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
            yield context
        finally:
            library.llama_free(context)

    def _step(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> Iterator[tuple[int, FloatArray]]:
        """Computes at most _BATCH (token, position, sequence, wanted); yields (place, logits) of the wanted ones."""
        library = self._library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = wanted
            if code := library.llama_decode(context, batch):
                raise CheckpointError(f"llama.cpp fails on {self.path} with code {code}{reason()}")
        finally:
            library.llama_batch_free(batch)
        for place, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                row = library.llama_get_logits_ith(context, place)
                yield place, np.ctypeslib.as_array(row, shape=(self.vocabulary,))
