"""An ONNX decoder in onnxruntime: logits and greedy answers. Needs onnxruntime, no torch.

Takes what nestpatch, optimum, transformers.js and onnxruntime-genai export: token ids, an attention mask, positions where the
graph has such an input, and a cache that goes in as past_key_values.N.key/.value and comes out as present.N.key/.value.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import CheckpointError, CheckpointFormatError, DataError, MissingExtraError, UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import read_bounded, read_json
from nestpatch.formats.lora import onnx as lora_onnx
from nestpatch.formats.lora.onnx import MAX_GRAPH, SUFFIX, onnx_file
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import FloatArray
from nestpatch.runtimes._pieces import decoded
from nestpatch.runtimes.text import (
    MAX_TOKENS,
    Conversation,
    IntArray,
    TokenPair,
    by_length,
    encode_pairs,
    pad_left,
    prompt_ids,
    prompt_room,
)
from nestpatch.runtimes.threads import may_spin, pick_threads, wait_passively

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Cache: TypeAlias = Mapping[str, Any]
"""Name of an input -> the OrtValue that the next step passes there."""
_PAST, _PRESENT = "past_key_values.", "present."
_PLAIN = ("input_ids", "attention_mask", "position_ids")
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_PROVIDERS = {"auto": "CPU", "cpu": "CPU", "cuda": "CUDA"}


class OnnxRuntime:
    """A loaded ONNX decoder, as `nestpatch.runtimes.protocol.Runtime`.

    Attributes:
        path: The .onnx file.
        folder: The directory of its configuration and its tokenizer.
        max_new_tokens: Length of an answer.
        max_prompt_tokens: A longer prompt keeps its last tokens.
        batch: Prompts of similar length that run side by side, padded at the left.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        max_new_tokens: int = 48,
        max_prompt_tokens: int | None = MAX_TOKENS,
        batch: int = 16,
        mapped: bool = False,
    ) -> None:
        """Loads a model.

        Args:
            model: An .onnx file, or a directory with one.
            adapter: An .onnx_adapter file that is in use from the beginning.
            device: "auto", "cpu", "cuda", or the prefix of an execution provider's name, such as "CoreML".
            threads: For `pick_threads`.
            max_new_tokens: Length of an answer.
            max_prompt_tokens: A longer prompt keeps its last tokens; None: what the context leaves beside an answer.
            batch: Prompts that run side by side.
            mapped: Leaves float weights in their file instead of rearranging them in memory: faster for a few runs.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            CheckpointFormatError: onnxruntime does not load the files, or they are no decoder.
            DataError: This onnxruntime cannot compute on the device, or an answer is longer than the context.
        """
        file = onnx_file(Path(model))
        if file is None:
            raise CheckpointFormatError(
                f"there is no ONNX model at {model}", advice="Give the directory that holds model.onnx."
            )
        self.path, self._given = file, Path(model)
        inside = file.parent
        self.folder = inside.parent if inside.name == "onnx" and not (inside / "config.json").is_file() else inside
        self.max_new_tokens, self.batch = max_new_tokens, batch
        self.max_prompt_tokens = prompt_room(self.context, max_new_tokens) if max_prompt_tokens is None else max_prompt_tokens
        wait_passively()
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnx", "running an ONNX model") from error
        self._runtime: Any = onnxruntime
        self._device, self._threads = device, pick_threads(threads)
        self._session = self._load(mapped=mapped)
        self._adapter = self._load_adapter(Path(adapter)) if adapter is not None else None
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self._check()

    def _load(self, *, mapped: bool) -> Any:
        runtime = self._runtime
        name = f"{_PROVIDERS.get(self._device, self._device)}ExecutionProvider"
        if name not in runtime.get_available_providers():
            advice = "Use --device cpu, or install onnxruntime-gpu."
            raise DataError(f"this onnxruntime cannot run on {self._device!r}", advice=advice)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self._threads
        if not may_spin():
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        providers = list(dict.fromkeys([name, "CPUExecutionProvider"]))
        try:
            return runtime.InferenceSession(os.fspath(self.path), options, providers=providers)
        except lora_onnx.runtime_errors() as error:
            raise CheckpointFormatError(f"onnxruntime cannot load {self.path}: {error}") from error

    def _load_adapter(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointFormatError(f"there is no adapter file {file}", advice="Check the path.")
        adapter = self._runtime.LoraAdapter()
        try:
            adapter.Load(os.fspath(file))
        except lora_onnx.runtime_errors() as error:
            raise CheckpointFormatError(f"onnxruntime cannot load the adapter {file}: {error}") from error
        return adapter

    def _check(self) -> None:
        """Raises CheckpointFormatError for a graph that is not a decoder, or has unknown inputs."""
        odd = [name for name in self._inputs if name not in _PLAIN and not name.startswith(_PAST)]
        types = [entry.type for entry in self._inputs.values() if entry.type not in _TYPES]
        past = [entry for name, entry in self._inputs.items() if name.startswith(_PAST)]
        vague = [entry.name for entry in past if self._cache_shape(entry) is None]
        present = {_PRESENT + entry.name.removeprefix(_PAST) for entry in past}
        reason = None
        if "input_ids" not in self._inputs or "logits" not in self._outputs or not past:
            reason = "it has no input_ids, no logits or no cache"
        elif odd or types or vague:
            reason = f"it has the input {(odd or types or vague)[0]}, which is not known here"
        elif not present <= set(self._outputs):
            reason = "its cache is an input, but not an output"
        if reason is not None:
            raise CheckpointFormatError(
                f"{self.path} is not a decoder that nestpatch can run: {reason}",
                advice="Export the model with `nestpatch export MODEL --to onnx`.",
            )

    def _cache_shape(self, entry: Any) -> tuple[int, int] | None:
        """(heads, width) of an input of the cache, from the graph or the files beside it; None where neither has it."""
        if len(entry.shape) != 4:
            return None
        heads, width = entry.shape[1], entry.shape[3]
        if not (isinstance(heads, int) and isinstance(width, int)):
            # The builder of onnxruntime-genai leaves these sizes out of the graph.
            found: Any = _read_object(self.folder / "genai_config.json")
            for key in ("model", "decoder"):
                found = found.get(key) if isinstance(found, dict) else None
            known = found if isinstance(found, dict) else {}
            heads = heads if isinstance(heads, int) else known.get("num_key_value_heads")
            width = width if isinstance(width, int) else known.get("head_size")
        return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the model.

        Raises:
            MissingExtraError: transformers is not installed.
            CheckpointFormatError: There is no tokenizer that transformers loads.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise MissingExtraError("onnx", "running an ONNX model") from error
        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(self.folder))
        except Exception as error:  # transformers raises whatever the files provoke
            raise CheckpointFormatError(
                f"transformers cannot load the tokenizer of {self.folder}: {error}",
                advice="Put tokenizer.json and tokenizer_config.json in the model's directory.",
            ) from error
        return found

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer: those of generation_config.json, else of config.json, else of the tokenizer.

        Raises:
            CheckpointFormatError: One of the files is broken.
        """
        for name in ("generation_config.json", "config.json"):
            found = _read_object(self.folder / name).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [int(found)])
        own = self.tokenizer.eos_token_id
        return frozenset() if own is None else frozenset([int(own)])

    @cached_property
    def pads(self) -> bool:
        """Whether prompts of different length may share a batch, padded at the left.

        Graphs that compute positions themselves, and onnxruntime's own attention operator, count from the left end.
        """
        import onnx

        if "position_ids" not in self._inputs:
            return False
        graph = onnx.load_from_string(read_bounded(self.path, MAX_GRAPH, error=CheckpointFormatError)).graph
        return all(node.op_type != "GroupQueryAttention" for node in graph.node)

    @property
    def context(self) -> int | None:
        """Tokens that the model reads at once at most; None where the files beside it do not say."""
        found = _read_object(self.folder / "config.json").get("max_position_embeddings")
        if not isinstance(found, int):
            model = _read_object(self.folder / "genai_config.json").get("model")
            found = model.get("context_length") if isinstance(model, dict) else None
        return found if isinstance(found, int) and found > 0 else None

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

        Raises:
            CheckpointFormatError: The chat template does not work.
        """
        rows = prompt_ids(self.tokenizer, prompts, self.max_prompt_tokens)
        if not all(rows):
            raise CheckpointFormatError(f"the chat template of {self.folder} turns a prompt into an empty text")
        return rows

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
        found = self.greedy(self.token_ids(prompts), self.max_new_tokens, self.ends, on_event)
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in found]

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Generates a greedy answer piece by piece.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Yields:
            Pieces of the answer; joined they are what `generate` returns for the prompt.
        """
        steps = self._steps(self.token_ids([prompt]), self.max_new_tokens, self.ends)
        yield from decoded(self.tokenizer, (answers[0][-1] for answers in steps))

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """Runs the model on one text.

        Args:
            ids: Token ids.
            start: The first position whose prediction is returned.

        Returns:
            float32 [ids - start, vocabulary]: the logits after each of the ids from `start` on.

        Raises:
            CheckpointError: onnxruntime fails.
        """
        row = np.asarray([list(ids)], np.int64)
        found: FloatArray = self.step(row, np.ones_like(row))[0][0, start:].astype(np.float32)
        return found

    @contextmanager
    def with_adapter(self, adapter: Path) -> Iterator[OnnxRuntime]:
        """Yields the same loaded model with an adapter; this runtime goes on without it.

        Args:
            adapter: An .onnx_adapter file.

        Raises:
            CheckpointFormatError: onnxruntime does not load the adapter.
        """
        other = copy.copy(self)
        other._adapter = self._load_adapter(Path(adapter))
        yield other

    def prompt_states(self, prompts: Sequence[Conversation], layer: int, pooling: str) -> FloatArray:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: the graph has no output for hidden states."""
        raise DataError(
            f"the ONNX model {self.path} gives no hidden states",
            advice="Give the model as a directory of transformers, or as a .gguf file.",
        )

    @contextmanager
    def with_pack(self, pack: Pack, strength: float = 1.0) -> Iterator[OnnxRuntime]:
        """Yields the model with a pack: an adapter where the graph takes one, else a temporary patched copy that is loaded too.

        Args:
            pack: What to add.
            strength: Factor of the pack's change.

        Raises:
            BaseMismatchError: The model is not the pack's base, or holds the pack already.
        """
        with tempfile.TemporaryDirectory() as folder:
            adapter, patched = Path(folder) / f"pack{SUFFIX}", Path(folder) / "patched"
            try:
                ready = lora_onnx.read_inputs(self.path)
                content = lora_onnx.parameters(pack, ready, strength)
                make_plan(pack, open_model(ready.file)[0])
                lora_onnx.write(content, ready, adapter)
            except UnsupportedModelError:  # not adapter-ready, or not for these weights
                apply(self._given, pack, patched, strength=strength, trust="none", sync=False, listed=False)
                yield OnnxRuntime(
                    patched,
                    device=self._device,
                    threads=self._threads,
                    max_new_tokens=self.max_new_tokens,
                    max_prompt_tokens=self.max_prompt_tokens,
                    batch=self.batch,
                )
                return
            with self.with_adapter(adapter) as other:
                yield other

    def step(self, ids: IntArray, mask: IntArray, past: Cache | None = None) -> tuple[npt.NDArray[Any], Cache]:
        """One run of the graph.

        Args:
            ids: int64 [batch, sequence], the tokens after `past`.
            mask: int64 [batch, past + sequence], 0 where tokens are padding.
            past: The cache of the step before.

        Returns:
            (logits [batch, sequence, vocabulary] in the graph's dtype, the cache for the next step).

        Raises:
            CheckpointError: onnxruntime fails.
        """
        runtime = self._runtime
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = dict(past or {})
        for name, entry in self._inputs.items() if past is None else ():
            if name.startswith(_PAST) and (shape := self._cache_shape(entry)) is not None:
                empty = np.zeros((len(ids), shape[0], 0, shape[1]), _TYPES[entry.type])
                feed[name] = runtime.OrtValue.ortvalue_from_numpy(empty)
        for name in _PLAIN:
            if name in self._inputs:
                content = np.ascontiguousarray(given[name], _TYPES[self._inputs[name].type])
                feed[name] = runtime.OrtValue.ortvalue_from_numpy(content)
        how = runtime.RunOptions()
        how.log_severity_level = 4  # errors are raised
        if self._adapter is not None:
            how.add_active_adapter(self._adapter)
        try:
            values = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feed, how), strict=True))
        except lora_onnx.runtime_errors() as error:
            raise CheckpointError(f"onnxruntime fails on {self.path}: {error}") from error
        kept = {name.replace(_PRESENT, _PAST, 1): value for name, value in values.items() if name.startswith(_PRESENT)}
        return values["logits"].numpy(), {name: value for name, value in kept.items() if name in self._inputs}

    def greedy(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int], on_event: OnEvent = ignore
    ) -> list[list[int]]:
        """The likeliest continuations.

        Args:
            prompts: Token ids of each prompt.
            max_new_tokens: Length of a continuation.
            ends: Tokens that end one; the one that does is its last token.
            on_event: Receives the progress.

        Returns:
            The new token ids of each prompt.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for places in by_length(prompts, self.batch, mixed=self.pads):
            found = self._answer([prompts[i] for i in places], max_new_tokens, ends)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
            done += len(places)
            on_event(Event("generate", done, len(prompts)))
        return answers

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        for answers in self._steps(prompts, max_new_tokens, ends):  # noqa: B007 - the last ones are whole
            pass
        return answers

    def _steps(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> Iterator[list[list[int]]]:
        """Continues prompts side by side; yields all answers after each step."""
        ids, mask = pad_left(prompts)
        answers: list[list[int]] = [[] for _ in prompts]
        running = np.ones(len(prompts), bool)
        past: Cache | None = None
        for _ in range(max_new_tokens):
            logits, past = self.step(ids, mask, past)
            chosen = logits[:, -1].argmax(-1)
            for place in np.flatnonzero(running):
                answers[place].append(int(chosen[place]))
                running[place] = chosen[place] not in ends
            yield answers
            if not running.any():
                break
            ids = chosen[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], 1)


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises CheckpointFormatError for a broken one."""
    value = read_json(path, missing={})
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
