"""A GGUF file that llama.cpp has loaded: its metadata, its tokens and its chat template. Needs llama-cpp-python, no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from nestpatch.errors import CheckpointError, CheckpointFormatError, DataError, MissingExtraError
from nestpatch.runtimes._chat import chat_renderer
from nestpatch.runtimes.text import Conversation, plain_text
from nestpatch.runtimes.threads import wait_passively

_ERROR = 4
TEMPLATE = "tokenizer.chat_template"
"""Where the metadata has the chat template."""
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""The names that templates use -> those of GGUF files."""
_errors: list[str] = []
"""The errors that llama.cpp logged since the last call; the first one is the reason of a failure. Nothing is printed."""
_callbacks: list[Any] = []
"""Keeps the log callback alive: llama.cpp would call into freed memory."""
File = TypeVar("File", bound="LlamaFile")


@lru_cache(maxsize=1)
def library() -> Any:
    """The functions of llama.cpp.

    Returns:
        The module of llama-cpp-python.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        CheckpointError: Its library does not load.
    """
    wait_passively()
    try:
        from llama_cpp import llama_cpp as found
    except ImportError as error:
        raise MissingExtraError("llama", "running a GGUF file") from error
    except (OSError, RuntimeError) as error:
        reason = f"llama-cpp-python is installed, but its library does not load: {error}"
        advice = "Install it again for this machine: pip install --force-reinstall llama-cpp-python"
        raise CheckpointError(reason, advice=advice) from error

    def listen(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR and (line := text.decode("utf-8", "replace").strip()):
            _errors.append(line)

    _callbacks.append(found.llama_log_callback(listen))
    collect_errors(found)
    found.llama_backend_init()
    return found


def collect_errors(llama_cpp: Any) -> None:
    """Forgets what was collected, and sets our callback: another user of llama.cpp in this process may have set its own."""
    _errors.clear()
    llama_cpp.llama_log_set(_callbacks[0], None)


def reason() -> str:
    return f": {_errors[0]}" if _errors else ""


class LlamaFile:
    """A loaded GGUF file. Close it, or use it in a `with` statement.

    Attributes:
        path: The file.
        vocabulary: How many tokens there are.
        end: Id of the end token, or -1.
        experts: Experts of each layer; None for a model without experts.
    """

    def __init__(self, path: str | Path, device: str = "auto") -> None:
        """Loads a file.

        Args:
            path: A GGUF file.
            device: "auto", "cpu", "cuda", or "mps" for Metal.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            CheckpointFormatError: llama.cpp does not load the file.
            DataError: This llama.cpp cannot compute on the device.
        """
        self.path = Path(path)
        self._library = library()
        self._model: Any = None
        self._load(device)
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self.end = int(self._library.llama_vocab_eos(self._vocabulary))
        count = self.metadata(f"{self.metadata('general.architecture') or ''}.expert_count")
        self.experts = int(count) if count is not None and count.isdigit() and int(count) else None

    def _load(self, device: str) -> None:
        if not self.path.is_file():
            raise CheckpointFormatError(f"there is no model file {self.path}", advice="Check the path.")
        gpu = "mps" if sys.platform == "darwin" else "cuda"
        if device not in ("auto", "cpu") and not (device == gpu and self._library.llama_supports_gpu_offload()):
            raise DataError(
                f"this llama.cpp cannot run on the device {device!r}",
                advice="Use --device cpu, or install llama-cpp-python built for this device.",
            )
        parameters = self._library.llama_model_default_params()
        # Repacked and AMX weights are faster, but round differently and crash on some machines.
        parameters.use_extra_bufts = False
        if device == "cpu":
            parameters.n_gpu_layers = 0
        collect_errors(self._library)
        self._model = self._library.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if not self._model:
            raise CheckpointFormatError(f"llama.cpp cannot load {self.path}{reason()}")

    def __enter__(self: File) -> File:
        """Returns the file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Frees the model and what was loaded with it; closing again does nothing."""
        model, self._model = self._model, None
        if model:  # frees its adapters too
            self._library.llama_model_free(model)

    def metadata(self, key: str) -> str | None:
        """Reads a value of the file's metadata.

        Args:
            key: Such as "general.architecture".

        Returns:
            The value as text; None where the file has no such key.
        """
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < size:
                return buffer.raw[:length].decode("utf-8", "replace") if length >= 0 else None
            size = length + 1

    def token_text(self, key: str) -> str | None:
        """Reads the text of a special token.

        Args:
            key: Such as "bos": the id is in the metadata under `tokenizer.ggml.<key>_token_id`.

        Returns:
            The text; None where the file names no such token.
        """
        number = self.metadata(f"tokenizer.ggml.{key}_token_id")
        if number is None or not 0 <= int(number) < self.vocabulary:
            return None
        text: bytes = self._library.llama_vocab_get_text(self._vocabulary, int(number))
        return text.decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Reports whether a token ends an answer.

        Args:
            token: Its id.

        Returns:
            True for an end-of-text or end-of-turn token.
        """
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Turns a text into token ids.

        Args:
            text: Any text; special tokens in it are recognised.
            special: Whether to add the begin and end tokens that the file asks for.

        Returns:
            The ids.

        Raises:
            CheckpointError: llama.cpp cannot tokenize the text.
        """
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), ids, room, special, True)
        if count < 0:
            raise CheckpointError(f"llama.cpp cannot tokenize a text of {len(data)} bytes with {self.path}")
        return list(ids[:count])

    def decode(self, ids: Sequence[int]) -> str:
        """Turns token ids into text.

        Args:
            ids: Token ids.

        Returns:
            Their text, without special tokens.
        """
        given = (ctypes.c_int32 * len(ids))(*ids)
        size = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_detokenize(self._vocabulary, given, len(ids), buffer, size, False, False)
            if length >= 0:
                return buffer.raw[:length].decode("utf-8", "replace")
            size = -length

    def chat_texts(self, prompts: Sequence[Conversation]) -> list[str]:
        """Renders prompts with the chat template of the file.

        Args:
            prompts: What a user asks, or turns of conversations.

        Returns:
            The text that the model reads for each prompt, up to where its answer begins; without a template, lines.

        Raises:
            CheckpointFormatError: The chat template does not work.
        """
        template = self.metadata(TEMPLATE)
        if template is None:
            return [plain_text(prompt) for prompt in prompts]
        found = {name: self.token_text(key) for name, key in _TOKENS.items()}
        render = chat_renderer(template, {name: text for name, text in found.items() if text is not None})
        return [render(prompt) for prompt in prompts]

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at once at most; None where the file does not say."""
        return int(self._library.llama_model_n_ctx_train(self._model)) or None

    def text_ids(self, text: str) -> list[int]:
        """Turns plain text into token ids, without the chat template.

        Args:
            text: Any text.

        Returns:
            The ids, with the begin token where the file asks for one.

        Raises:
            CheckpointError: llama.cpp cannot tokenize the text.
        """
        return self.encode(text, special=True)
