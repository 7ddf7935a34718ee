"""A GGUF model in llama.cpp: token ids, logits and greedy answers. Needs llama-cpp-python, no torch.

The KV cache is F32, so that what is measured is the model's own rounding and nothing else.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointError, CheckpointFormatError, MissingExtraError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.rows import FloatArray
from nestpatch.runtimes.chat import chat_renderer
from nestpatch.runtimes.transformers import Generate

BATCH = 512
"""Tokens that llama.cpp computes at once."""
_F32 = 0
_ERROR = 4
_said: list[str] = []
"""The errors of llama.cpp since the last call: the first is the reason when it fails. Nothing is printed."""
_callbacks: list[Any] = []
"""What llama.cpp calls must outlive it."""


@lru_cache(maxsize=1)
def library() -> Any:
    """llama.cpp's functions, its log going to `_said`. Raises MissingExtraError when there is none."""
    try:
        from llama_cpp import llama_cpp as found
    except ImportError as error:
        raise MissingExtraError("llama", "running a GGUF file") from error
    except (OSError, RuntimeError) as error:
        reason = f"llama-cpp-python is installed, but its library does not load: {error}"
        advice = "Install it again for this machine: pip install --force-reinstall llama-cpp-python"
        raise CheckpointError(reason, advice=advice) from error

    _callbacks.append(found.llama_log_callback(_listen))
    found.llama_log_set(_callbacks[-1], None)
    found.llama_backend_init()
    return found


def _listen(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR and (line := text.decode("utf-8", "replace").strip()):
        _said.append(line)


def _reason() -> str:
    return f": {_said[0]}" if _said else ""


@dataclass
class _Slot:
    """One sequence on its way through a context."""

    number: int
    answer: list[int]
    position: int


class LlamaModel:
    """A loaded GGUF file, with an adapter or without. Close it, or use it in a `with` statement.

    Raises MissingExtraError without llama-cpp-python, CheckpointFormatError for files that llama.cpp does not load.
    """

    def __init__(
        self, path: str | Path, lora: str | Path | None = None, *, device: str = "auto", threads: int | None = None
    ) -> None:
        self.path = Path(path)
        self.threads = threads or len(_processors())
        self.adapted = lora is not None
        """Whether the adapter is in use; may be switched."""
        self._library = library()
        self._model: Any = None
        self._adapter: Any = None
        self._load(device)
        if lora is not None:
            self._load_adapter(Path(lora))
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        """How many tokens there are."""

    def _load(self, device: str) -> None:
        if not self.path.is_file():
            raise CheckpointFormatError(f"there is no model file {self.path}", advice="Check the path.")
        parameters = self._library.llama_model_default_params()
        # Repacked and AMX weights are faster, round in another way, and end the process on some machines.
        parameters.use_extra_bufts = False
        if device == "cpu":
            parameters.n_gpu_layers = 0
        _said.clear()
        self._model = self._library.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not self._model:
            raise CheckpointFormatError(f"llama.cpp cannot load {self.path}{_reason()}")

    def _load_adapter(self, lora: Path) -> None:
        _said.clear()
        if not lora.is_file():
            self.close()
            raise CheckpointFormatError(f"there is no adapter file {lora}", advice="Check the path.")
        self._adapter = self._library.llama_adapter_lora_init(self._model, os.fsencode(lora))
        if not self._adapter:
            self.close()
            raise CheckpointFormatError(
                f"llama.cpp cannot load the adapter {lora} for {self.path}{_reason()}",
                advice="An adapter fits models of one architecture and size: nestpatch export PATCH --to gguf-lora",
            )

    def __enter__(self) -> LlamaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model and its adapter; twice does no harm."""
        model, self._model, self._adapter = self._model, None, None
        if model:  # frees its adapters too
            self._library.llama_model_free(model)

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < size:
                return buffer.raw[:length].decode("utf-8", "replace") if length >= 0 else None
            size = length + 1

    def token_text(self, key: str) -> str | None:
        """The text of the token whose id is under `tokenizer.ggml.<key>_token_id`, or None."""
        number = self.metadata(f"tokenizer.ggml.{key}_token_id")
        if number is None or not 0 <= int(number) < self.vocabulary:
            return None
        text: bytes = self._library.llama_vocab_get_text(self._vocabulary, int(number))
        return text.decode("utf-8", "replace")

    @property
    def end(self) -> int:
        """The id of the end token, or -1."""
        return int(self._library.llama_vocab_eos(self._vocabulary))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids; with `special` also the begin and end tokens that the model wants around a text."""
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, special, True)
        if count < 0:
            raise CheckpointError(f"llama.cpp cannot tokenize a text of {len(data)} bytes with {self.path}")
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        given = (ctypes.c_int32 * len(ids))(*ids)
        size = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_detokenize(self._vocabulary, given, len(ids), buffer, size, False, False)
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", "replace")
            size = -length

    def ends(self, token: int) -> bool:
        """Whether a token ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """float32 [ids - start, vocabulary]: what the model expects after each of the ids from `start` on."""
        out = np.empty((len(ids) - start, self.vocabulary), np.float32)
        with self._context(1, len(ids)) as context:
            for first in range(0, len(ids), BATCH):
                part = enumerate(ids[first : first + BATCH], first)
                tokens = [(token, position, 0, position >= start) for position, token in part]
                for place, row in self._step(context, tokens):
                    out[first + place - start] = row
        return out

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sequences: int = 8, on_event: OnEvent = ignore
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, without the end token; `sequences` prompts run side by side."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), sequences):
            places = order[start : start + sequences]
            found = self._answer([prompts[i] for i in places], max_new_tokens)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
            on_event(Event("generate", min(start + sequences, len(order)), len(order)))
        return answers

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        slots = [_Slot(number, [], len(prompt)) for number, prompt in enumerate(prompts)]
        with self._context(len(prompts), max(map(len, prompts)) + max_new_tokens) as context:
            tokens = [
                (token, position, number, position + 1 == len(prompt))
                for number, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
            running = slots
            while tokens:
                chosen: dict[int, int] = {}
                for start in range(0, len(tokens), BATCH):
                    part = tokens[start : start + BATCH]
                    chosen |= {part[place][2]: int(row.argmax()) for place, row in self._step(context, part)}
                running = [slot for slot in running if self._take(slot, chosen[slot.number], max_new_tokens)]
                tokens = [(slot.answer[-1], slot.position - 1, slot.number, True) for slot in running]
        return [slot.answer for slot in slots]

    def _take(self, slot: _Slot, token: int, max_new_tokens: int) -> bool:
        """Adds a token to an answer; returns whether the answer goes on."""
        if self.ends(token):
            return False
        slot.answer.append(token)
        slot.position += 1
        return len(slot.answer) < max_new_tokens

    @contextmanager
    def _context(self, sequences: int, length: int) -> Iterator[Any]:
        """A context for some sequences of at most `length` tokens each."""
        library, parameters = self._library, self._library.llama_context_default_params()
        # llama.cpp divides the cells of the cache by the sequences, and wants whole blocks of 256.
        parameters.n_ctx = sequences * (-(-length // 256) * 256)
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.type_k = parameters.type_v = _F32
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.kv_unified = False
        parameters.no_perf = True
        _said.clear()
        context = library.llama_init_from_model(self._model, parameters)
        if not context:
            raise CheckpointError(f"llama.cpp cannot run {self.path}{_reason()}")
        try:
            if self.adapted and self._adapter:
                adapters = (library.llama_adapter_lora_p_ctypes * 1)(self._adapter)
                library.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
            yield context
        finally:
            library.llama_free(context)

    def _step(self, context: Any, tokens: Sequence[tuple[int, int, int, bool]]) -> Iterator[tuple[int, FloatArray]]:
        """Computes at most BATCH (token, position, sequence, wanted); yields (place, logits) of the wanted ones."""
        library = self._library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, (token, position, sequence, wanted) in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
                batch.logits[place] = wanted
            if code := library.llama_decode(context, batch):
                raise CheckpointError(f"llama.cpp fails on {self.path} with code {code}{_reason()}")
        finally:
            library.llama_batch_free(batch)
        for place, (_, _, _, wanted) in enumerate(tokens):
            if wanted:
                row = library.llama_get_logits_ith(context, place)
                yield place, np.ctypeslib.as_array(row, shape=(self.vocabulary,))


def _processors() -> Sequence[int]:
    """The processors that this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return range(os.cpu_count() or 1)


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
