"""One protocol for a loaded model, whatever runs it, and `open_runtime`, which loads one.

`open_runtime` chooses by name: an address is asked, a .gguf file is run by llama.cpp, an ONNX model by onnxruntime, anything
else by transformers.
Nothing here imports torch; only transformers needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, TypedDict

from nestpatch.events import OnEvent, ignore
from nestpatch.formats.lora.onnx import onnx_file
from nestpatch.pack import Pack
from nestpatch.rows import FloatArray
from nestpatch.runtimes.connection import EndpointSettings, is_endpoint
from nestpatch.runtimes.text import MAX_TOKENS, Conversation, TokenPair

Kind: TypeAlias = Literal["transformers", "llama.cpp", "onnxruntime", "endpoint"]
Generate: TypeAlias = Callable[[Sequence[str]], list[str]]
"""Prompts -> answers, in the same order."""


class Runtime(Protocol):
    """A loaded model that answers prompts and exposes its logits."""

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at once at most; None where its files do not say."""
        ...

    def text_ids(self, text: str) -> list[int]:
        """Turns plain text into token ids, without the chat template.

        Args:
            text: Any text.

        Returns:
            The ids, with the begin token where the model has one.
        """
        ...

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt in chat form at most; a longer one keeps its last tokens."""
        ...

    def token_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:
        """Turns prompts in chat form into token ids, as the model reads them.

        Args:
            prompts: What a user asks, or the turns of conversations.

        Returns:
            The ids of each prompt.
        """
        ...

    def token_pairs(self, answers: Mapping[str, str]) -> list[TokenPair]:
        """Turns prompts and answers into token ids, as the model reads them.

        Args:
            answers: Prompt -> answer.

        Returns:
            One pair for each prompt.
        """
        ...

    def generate(self, prompts: Sequence[str], on_event: OnEvent = ignore) -> list[str]:
        """Generates greedy answers.

        Args:
            prompts: What a user asks.
            on_event: Receives the progress.

        Returns:
            The answers, in the same order.
        """
        ...

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Generates a greedy answer piece by piece.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Returns:
            An iterator of pieces, which never end inside a character; joined they are what `generate` returns for the prompt.
            Closing it ends the answer.
        """
        ...

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """Runs the model on one text.

        Args:
            ids: Token ids.
            start: The first position whose prediction is returned.

        Returns:
            float32 [ids - start, vocabulary]: the logits after each of the ids from `start` on.
        """
        ...

    def prompt_states(self, prompts: Sequence[Conversation], layer: int, pooling: str) -> FloatArray:
        """Reads a hidden state of each prompt in chat form: the residual stream after a layer, pooled over the tokens.

        Args:
            prompts: What a user asks, or the turns of conversations.
            layer: The layer, from 0.
            pooling: One of `nestpatch.detector.POOLINGS`.

        Returns:
            float32 [prompts, hidden].

        Raises:
            DataError: The runtime gives no hidden states, or the model has no such layer.
        """
        ...

    def with_pack(self, pack: Pack, strength: float = 1.0) -> AbstractContextManager[Runtime]:
        """Opens the same model with a pack merged in memory; this runtime goes on without it.

        Args:
            pack: What to merge.
            strength: Factor of the pack's change.

        Returns:
            A context manager that yields the patched model.

        Raises:
            BaseMismatchError: The model is not the pack's base, or holds the pack already.
        """
        ...

    def with_adapter(self, adapter: Path) -> AbstractContextManager[Runtime]:
        """Opens the same model with an adapter file; this runtime goes on without it.

        Args:
            adapter: A file of the runtime's own format.

        Returns:
            A context manager that yields the model with the adapter.

        Raises:
            CheckpointFormatError: The runtime does not load the adapter.
            DataError: The runtime takes no adapter files.
        """
        ...


def runtime_of(model: str | Path) -> Kind:
    """Chooses the runtime of a model.

    Args:
        model: A directory, a file, a Hub id, or the address of a server.

    Returns:
        "endpoint" for http:// and https://; "llama.cpp" for a .gguf file; "onnxruntime" for an .onnx file, or a directory with
        one and without safetensors weights; else "transformers".
    """
    if is_endpoint(model):
        return "endpoint"
    path = Path(model)
    if path.suffix == ".gguf":
        return "llama.cpp"
    if path.suffix == ".onnx" or (onnx_file(path) is not None and not any(path.glob("*.safetensors"))):
        return "onnxruntime"
    return "transformers"


class _Lengths(TypedDict):
    """What all runtimes take alike."""

    max_new_tokens: int
    max_prompt_tokens: int | None


@contextmanager
def open_runtime(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 48,
    max_prompt_tokens: int | None = MAX_TOKENS,
    endpoint: EndpointSettings | None = None,
    kind: Kind | None = None,
) -> Iterator[Runtime]:
    """Loads a model in the runtime that it is for, and frees it at the end.

    Args:
        model: A directory, a file, a Hub id, or the address of a server.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", or the torch dtype to compute in; only transformers uses it.
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        max_prompt_tokens: A longer prompt keeps its last tokens; None: what the model's context leaves beside an answer.
        endpoint: How a server is asked.
        kind: Another runtime than that of `runtime_of`: transformers also runs a .gguf file.

    Yields:
        The loaded model.

    Raises:
        CheckpointError: The model cannot be loaded.
        DataError: The runtime cannot compute on the device, or an answer is longer than the model's context.
        EndpointError: The server does not answer.
        MissingExtraError: The packages of the runtime are not installed.
    """
    kind = kind or runtime_of(model)
    lengths: _Lengths = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
    if kind == "endpoint":
        from nestpatch.runtimes.served import ServedRuntime

        with ServedRuntime(str(model), endpoint, max_new_tokens=max_new_tokens) as served:
            yield served
    elif kind == "llama.cpp":
        from nestpatch.runtimes.llama import LlamaRuntime

        with LlamaRuntime(model, device=device, threads=threads, **lengths) as loaded:
            yield loaded
    elif kind == "onnxruntime":
        from nestpatch.runtimes.onnx import OnnxRuntime

        yield OnnxRuntime(model, device=device, threads=threads, **lengths)
    else:
        from nestpatch.runtimes.loading import locate
        from nestpatch.runtimes.transformers import TransformersRuntime

        path = locate(model).path
        yield TransformersRuntime.load(path, device=device, dtype=dtype, threads=threads, **lengths)
