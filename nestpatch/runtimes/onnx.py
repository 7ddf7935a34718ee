"""An ONNX decoder in onnxruntime: logits and greedy answers. Needs onnxruntime, no torch.

Takes what nestpatch, optimum, transformers.js and onnxruntime-genai export: token ids, an attention mask, positions where the
graph wants them, and a cache that goes in as past_key_values.N.key/.value and comes out as present.N.key/.value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nestpatch.errors import CheckpointError, CheckpointFormatError, DataError, MissingExtraError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import MAX_JSON, read_bounded, read_text
from nestpatch.formats.lora.onnx import MAX_GRAPH, onnx_file
from nestpatch.rows import FloatArray
from nestpatch.runtimes.text import prompt_ids
from nestpatch.runtimes.transformers import Generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray: TypeAlias = npt.NDArray[np.int64]
Cache: TypeAlias = Mapping[str, Any]
"""Name of an input -> the OrtValue that a later step hands in there."""
_PAST, _PRESENT = "past_key_values.", "present."
_PLAIN = ("input_ids", "attention_mask", "position_ids")
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
_BATCH = 16
"""Prompts that run side by side."""


class OnnxModel:
    """A loaded ONNX model, with an adapter or without.

    `mapped`: float weights stay in their file instead of being rearranged in memory, which is better for a few runs.

    Raises MissingExtraError without onnxruntime, CheckpointFormatError for files that it does not load or that are no decoder.
    """

    def __init__(
        self,
        model: str | Path,
        adapter: str | Path | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        mapped: bool = False,
    ) -> None:
        file = onnx_file(Path(model))
        if file is None:
            raise CheckpointFormatError(
                f"there is no ONNX model at {model}", advice="Give the directory that holds model.onnx."
            )
        self.path = file
        self.adapted = adapter is not None
        """Whether the adapter is in use; may be switched."""
        self._runtime = _runtime()
        self._session = self._load(device, threads or _processors(), mapped=mapped)
        self._adapter = self._load_adapter(Path(adapter)) if adapter is not None else None
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._outputs = [entry.name for entry in self._session.get_outputs()]
        self._check()

    @property
    def folder(self) -> Path:
        """Where its configuration and its tokenizer lie."""
        inside = self.path.parent
        return inside.parent if inside.name == "onnx" and not (inside / "config.json").is_file() else inside

    @property
    def vocabulary(self) -> int:
        """How many tokens the logits are for; 0 where the graph does not say."""
        size = self._session.get_outputs()[self._outputs.index("logits")].shape[-1]
        return size if isinstance(size, int) else 0

    def _load(self, device: str, threads: int, *, mapped: bool) -> Any:
        runtime = self._runtime
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        providers = _providers(runtime, device)
        try:
            return runtime.InferenceSession(os.fspath(self.path), options, providers=providers)
        except Exception as error:  # onnxruntime's errors have no common base
            raise CheckpointFormatError(f"onnxruntime cannot load {self.path}: {error}") from error

    def _load_adapter(self, file: Path) -> Any:
        if not file.is_file():
            raise CheckpointFormatError(f"there is no adapter file {file}", advice="Check the path.")
        adapter = self._runtime.LoraAdapter()
        try:
            adapter.Load(os.fspath(file))
        except Exception as error:  # as above
            raise CheckpointFormatError(f"onnxruntime cannot load the adapter {file}: {error}") from error
        return adapter

    def _check(self) -> None:
        """Refuses graphs that want what is not known here."""
        odd = [name for name in self._inputs if name not in _PLAIN and not name.startswith(_PAST)]
        types = [entry.type for entry in self._inputs.values() if entry.type not in _TYPES]
        past = [entry for name, entry in self._inputs.items() if name.startswith(_PAST)]
        vague = [entry.name for entry in past if self._cache_shape(entry) is None]
        present = {_PRESENT + entry.name.removeprefix(_PAST) for entry in past}
        reason = None
        if "input_ids" not in self._inputs or "logits" not in self._outputs or not past:
            reason = "it has no input_ids, no logits or no cache"
        elif odd or types or vague:
            reason = f"it wants {(odd or types or vague)[0]}, which is not known here"
        elif not present <= set(self._outputs):
            reason = "its cache goes in and does not come out"
        if reason is not None:
            raise CheckpointFormatError(
                f"{self.path} is no decoder that nestpatch can run: {reason}",
                advice="Export the model with `nestpatch export MODEL --to onnx`.",
            )

    @cached_property
    def pads(self) -> bool:
        """Whether prompts of different length may run together, padded at the left.

        Graphs that compute positions themselves, and onnxruntime's own attention operator, count from the left end.
        """
        import onnx

        if "position_ids" not in self._inputs:
            return False
        graph = onnx.load_from_string(read_bounded(self.path, MAX_GRAPH, error=CheckpointFormatError)).graph
        return all(node.op_type != "GroupQueryAttention" for node in graph.node)

    def step(self, ids: IntArray, mask: IntArray, past: Cache | None = None) -> tuple[npt.NDArray[Any], Cache]:
        """Reads ids [batch, sequence] after `past`; mask is [batch, past + sequence], 0 where tokens are padding.

        Returns (logits [batch, sequence, vocabulary] in the graph's dtype, what to hand in next).

        Raises CheckpointError when onnxruntime fails.
        """
        runtime = self._runtime
        positions = np.clip(mask.cumsum(-1) - 1, 0, None)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feed = dict(past) if past is not None else self._empty(len(ids))
        for name in _PLAIN:
            if name in self._inputs:
                content = np.ascontiguousarray(given[name], _TYPES[self._inputs[name].type])
                feed[name] = runtime.OrtValue.ortvalue_from_numpy(content)
        how = runtime.RunOptions()
        how.log_severity_level = 4  # what goes wrong is raised
        if self._adapter is not None and self.adapted:
            how.add_active_adapter(self._adapter)
        try:
            values = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, feed, how), strict=True))
        except Exception as error:  # as above
            raise CheckpointError(f"onnxruntime fails on {self.path}: {error}") from error
        kept = {name.replace(_PRESENT, _PAST, 1): value for name, value in values.items() if name.startswith(_PRESENT)}
        return values["logits"].numpy(), {name: value for name, value in kept.items() if name in self._inputs}

    def _empty(self, batch: int) -> dict[str, Any]:
        """A cache of no tokens."""
        found = {}
        for name, entry in self._inputs.items():
            if name.startswith(_PAST) and (shape := self._cache_shape(entry)) is not None:
                content = np.zeros((batch, shape[0], 0, shape[1]), _TYPES[entry.type])
                found[name] = self._runtime.OrtValue.ortvalue_from_numpy(content)
        return found

    def _cache_shape(self, entry: Any) -> tuple[int, int] | None:
        """(heads, width) of an input of the cache, as the graph says or the files beside it; None where nothing does."""
        if len(entry.shape) != 4:
            return None
        sizes: list[Any] = [entry.shape[1], entry.shape[3]]
        if not all(isinstance(size, int) for size in sizes):
            said = _genai_decoder(self.folder)
            known = said.get("num_key_value_heads"), said.get("head_size")
            sizes = [size if isinstance(size, int) else other for size, other in zip(sizes, known, strict=True)]
        heads, width = sizes
        return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """float32 [ids - start, vocabulary]: what the model expects after each of the ids from `start` on."""
        row = np.asarray([list(ids)], np.int64)
        found: FloatArray = self.step(row, np.ones_like(row))[0][0, start:].astype(np.float32)
        return found

    def greedy(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Collection[int],
        sequences: int = _BATCH,
        on_event: OnEvent = ignore,
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, up to `max_new_tokens` or one of `ends`, which is its last token then."""
        answers: list[list[int]] = [[] for _ in prompts]
        done = 0
        for places in self._batches(prompts, sequences):
            found = self._answer([prompts[i] for i in places], max_new_tokens, ends)
            for place, answer in zip(places, found, strict=True):
                answers[place] = answer
            done += len(places)
            on_event(Event("generate", done, len(prompts)))
        return answers

    def _batches(self, prompts: Sequence[Sequence[int]], sequences: int) -> list[list[int]]:
        """Which prompts run together, by their places: similar lengths, or equal ones where nothing may be padded."""
        batches: list[list[int]] = []
        for place in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            last = batches[-1] if batches else []
            fits = self.pads or (last and len(prompts[last[0]]) == len(prompts[place]))
            if last and fits and len(last) < sequences:
                last.append(place)
            else:
                batches.append([place])
        return batches

    def _answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]:
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
            if not running.any():
                break
            ids = chosen[:, None]
            mask = np.concatenate([mask, np.ones_like(ids)], 1)
        return answers


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no file. Raises CheckpointFormatError for a broken one."""
    try:
        value = json.loads(read_text(path, MAX_JSON, error=CheckpointFormatError))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} holds no object")
    return value


def _genai_decoder(folder: Path) -> dict[str, Any]:
    """What genai_config.json says of the decoder; its builder leaves sizes of the cache out of the graph."""
    value: Any = read_json(folder / "genai_config.json")
    for key in ("model", "decoder"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def pad_left(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[IntArray, IntArray]:
    """(ids, mask): int64 [rows, longest], padded at the left so that all prompts end together."""
    width = max(map(len, rows))
    ids = np.asarray([[pad] * (width - len(row)) + list(row) for row in rows], np.int64)
    mask = np.asarray([[0] * (width - len(row)) + [1] * len(row) for row in rows], np.int64)
    return ids, mask


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnx", "running an ONNX model") from error
    return onnxruntime


def _providers(runtime: Any, device: str) -> list[str]:
    """What may compute, best first. Raises DataError for a device that this onnxruntime has no part for."""
    wanted = {"auto": "CPU", "cpu": "CPU", "cuda": "CUDA"}.get(device, device)
    name = f"{wanted}ExecutionProvider"
    if name not in runtime.get_available_providers():
        raise DataError(f"this onnxruntime cannot run on {device!r}", advice="Use --device cpu, or install onnxruntime-gpu.")
    return [name] if wanted == "CPU" else [name, "CPUExecutionProvider"]


def _processors() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def load_tokenizer(model: OnnxModel) -> PreTrainedTokenizerBase:
    """The tokenizer beside an ONNX model.

    Raises MissingExtraError without transformers, CheckpointFormatError when there is none.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("onnx", "running an ONNX model") from error
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model.folder))
    except Exception as error:  # transformers raises whatever the files provoke
        raise CheckpointFormatError(
            f"transformers cannot load the tokenizer of {model.folder}: {error}",
            advice="Put tokenizer.json and tokenizer_config.json beside the ONNX model.",
        ) from error
    return found


def ends_of(model: OnnxModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer, as the files beside the model say, in the order in which transformers asks them."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(model.folder / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [int(found)])
    return frozenset() if tokenizer.eos_token_id is None else frozenset([int(tokenizer.eos_token_id)])


def with_onnx(
    model: OnnxModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    max_prompt_tokens: int = 512,
    batch: int = 16,
    on_event: OnEvent = ignore,
) -> Generate:
    """Greedy generation in onnxruntime; every answer ends at an end token or after `max_new_tokens`.

    `batch` prompts of similar length run side by side, padded at the left.
    """
    ends = ends_of(model, tokenizer)

    def generate(prompts: Sequence[str]) -> list[str]:
        rows = prompt_ids(tokenizer, prompts, max_prompt_tokens)
        if not all(rows):
            raise CheckpointFormatError(f"the chat template of {model.folder} makes nothing of a prompt")
        answers = model.greedy(rows, max_new_tokens, ends, batch, on_event)
        return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]

    return generate
