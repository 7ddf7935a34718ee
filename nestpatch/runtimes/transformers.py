"""Models in transformers: finding and loading them, greedy answers, logits, and a pack merged in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, DataError, NestpatchError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import MAX_JSON, open_regular, read_text
from nestpatch.formats.gguf.checkpoint import GgufCheckpoint
from nestpatch.formats.gguf.hf.model import FloatModel
from nestpatch.formats.safetensors import SINGLE
from nestpatch.hub.client import Reference
from nestpatch.pack import Pack
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import DTYPES, FloatArray
from nestpatch.runtimes._pieces import decoded
from nestpatch.runtimes.quantized import keep_gradients, loading_options
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

_FETCHED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
"""The files of a Hub repository that are needed: no weights of other formats."""
READ_WHOLE = (".json", ".model", ".jinja", ".txt")
"""Endings of the files that transformers reads into memory."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".gguf", ".nest")
_LARGE = 50_000_000
"""Bytes of a model from which the arithmetic outweighs everything else."""
_WORTHWHILE = 1.5
"""Gain from which a CPU computes in bfloat16."""


def pick_device(wanted: str) -> tuple[str, str]:
    """Chooses where PyTorch computes.

    Args:
        wanted: "auto", or a device of PyTorch such as "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        (device, reason).

    Raises:
        DataError: PyTorch cannot compute on that device here.
    """
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda", f"{torch.cuda.get_device_name()} found"
        if torch.backends.mps.is_available():
            return "mps", "Apple GPU found"
        return "cpu", "no GPU found"
    try:
        torch.zeros(1, device=wanted).item()
    except Exception as error:  # PyTorch's errors of devices and drivers have no common base
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(
            f"PyTorch cannot compute on the device {wanted!r} here: {reason}",
            advice="Use the device cpu, or install a PyTorch that supports this one.",
        ) from error
    return wanted, "asked for"


def pick_dtype(wanted: str, device: str, nbytes: int = 0) -> tuple[str, str]:
    """Chooses in which type PyTorch computes.

    Args:
        wanted: "auto", or the name of a torch dtype.
        device: From `pick_device`.
        nbytes: Size of the model's files. On a CPU a large model is computed in bfloat16 where that is faster here, which is
            measured; 0 leaves float32.

    Returns:
        (torch dtype name, reason).
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device != "cpu":
        return "bfloat16", "accelerators compute it natively"
    if nbytes < _LARGE:
        return "float32", "exact, and fast enough for this model"
    # The reason goes into the pack, whose bytes must not depend on a measured number.
    if _bfloat16_gain() >= _WORTHWHILE:
        return "bfloat16", f"this processor multiplies it at least {_WORTHWHILE:g} times as fast as float32"
    return "float32", f"this processor does not multiply bfloat16 {_WORTHWHILE:g} times as fast"


def _bfloat16_gain() -> float:
    """How many times as fast this processor multiplies bfloat16 as float32, by a product of a typical layer."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows, matrix = torch.ones(512, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(rows, matrix)
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is on this machine, and where it came from.

    Attributes:
        path: A directory or file.
        model_id: The Hub id, or the name of the directory.
        revision: The commit of the Hub; empty for a local model.
    """

    path: Path
    model_id: str
    revision: str = ""


def locate(model: str | Path) -> ModelLocation:
    """Finds a model, or downloads it from the Hub into the Hub's cache.

    Args:
        model: A directory or file, or a Hub id: "owner/name", "owner/name@revision".

    Returns:
        Its location on this machine.

    Raises:
        CheckpointFormatError: It is neither.
    """
    # os.path answers no where Path.exists raises.
    if os.path.exists(model):  # noqa: PTH110
        return ModelLocation(Path(model), Path(model).resolve().name)
    reference = Reference.parse(str(model))
    if reference is None or Path(model).suffix in (".gguf", ".onnx", ".safetensors"):
        raise CheckpointFormatError(
            f"there is no model at {model}", advice="Check the path. A model of the Hub is named owner/name[@revision]."
        )
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(reference.repo_id, revision=reference.revision, allow_patterns=_FETCHED))
    except Exception as error:  # the Hub client raises network, validation and HTTP errors of many kinds
        raise CheckpointFormatError(
            f"there is no model directory {model}, and the Hub gave none: {error}", advice="Check the path or the Hub id."
        ) from error
    return ModelLocation(folder, reference.repo_id, folder.name)


@contextmanager
def _model_directory(path: Path) -> Iterator[Path]:
    """A directory that transformers can load: the path itself, or for a weight file its config and tokenizer with that file."""
    if path.is_dir():
        yield path
        return
    if not (path.parent / "config.json").is_file():
        raise CheckpointFormatError(
            f"{path} has no config.json beside it", advice="Give the model directory, or put the file beside its config."
        )
    with tempfile.TemporaryDirectory() as folder:
        for file in path.parent.iterdir():
            if file == path or (file.is_file() and not file.name.endswith(_WEIGHTS)):
                target = Path(folder) / (SINGLE if file == path else file.name)
                try:
                    target.symlink_to(file.resolve())
                except OSError:  # Windows without the right to make links
                    shutil.copyfile(file, target)
        yield Path(folder)


def _require_bounded(folder: Path) -> None:
    """Raises CheckpointFormatError where a file that transformers reads whole is too long, or not a regular file."""
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_WHOLE and os.path.lexists(file.resolve()):
            with open_regular(file, error=CheckpointFormatError) as opened:
                size = os.fstat(opened.fileno()).st_size
            if size > MAX_JSON:
                raise CheckpointFormatError(f"{file} has {size} bytes; {MAX_JSON} are allowed")


def load_model(source: Path, device: str, dtype: str, load_in: str = "none") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model, frozen and in evaluation mode.

    Args:
        source: A model directory, a weight file beside its config, or a GGUF file, whose weights are dequantized.
        device: Where it computes.
        dtype: Name of a torch dtype.
        load_in: "8bit" or "4bit" keeps the matrices of the layers in so few bits; "none" in `dtype`.

    Returns:
        (model, tokenizer); the tokenizer pads at the left.

    Raises:
        CheckpointError: transformers cannot load it, or a GGUF file cannot be read as one of its models.
        MissingExtraError: bitsandbytes is needed for few bits, and is not installed.
    """
    wait_passively()
    import torch

    options = loading_options(load_in, device, getattr(torch, dtype))
    if source.suffix == ".gguf" and source.is_file():
        model, tokenizer = _load_gguf(FloatModel(GgufCheckpoint(source)), getattr(torch, dtype), options)
    else:
        model, tokenizer = _load_directory(source, getattr(torch, dtype), options)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.train(mode=False)
    if options:  # quantized matrices were made on the device, and stay there
        keep_gradients(model)
    else:
        model.to(device=torch.device(device))  # type: ignore[call-arg]
    model.requires_grad_(requires_grad=False)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_in_one_piece)
    return model, tokenizer


def load_classifier(source: Path, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a sequence classifier in float32, frozen and in evaluation mode.

    Args:
        source: A model directory.
        device: Where it computes.

    Returns:
        (model, tokenizer).

    Raises:
        CheckpointFormatError: transformers cannot load it, or it has no trained head of a classifier.
    """
    wait_passively()
    import torch
    import transformers

    if not source.is_dir():
        raise CheckpointFormatError(f"{source} is not the directory of a classifier")
    with _naming(source):
        _require_bounded(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source))
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(source), dtype=torch.float32, output_loading_info=True
        )
    if missing := report["missing_keys"]:  # transformers would start them at random
        raise CheckpointFormatError(f"{source} has no weights {min(missing)}", advice="Give a model trained as a classifier.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:  # decoders find the last token by it
        model.config.pad_token_id = tokenizer.pad_token_id
    model.train(mode=False)
    model.to(device=torch.device(device))
    return model.requires_grad_(requires_grad=False), tokenizer


def _in_one_piece(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copies the last positions that `generate` cuts out, a few numbers: on the cut itself PyTorch multiplies by batches, and
    copies the whole vocabulary for every prompt (5 of 10 seconds for 64 short answers of a model of 135 million parameters).
    """
    return args[0].contiguous(), *args[1:]


def _load_directory(
    source: Path, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import transformers

    with _model_directory(source) as folder, _naming(source):
        _require_bounded(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
        config = transformers.AutoConfig.from_pretrained(str(folder))
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, **options), tokenizer
        # Vision-language models are loaded whole: the text model alone would have other names of weights than the files.
        if tokenizer.chat_template is None and (file := folder / "chat_template.json").is_file():
            tokenizer.chat_template = json.loads(read_text(file, MAX_JSON))["chat_template"]
        return transformers.AutoModelForImageTextToText.from_pretrained(str(folder), dtype=dtype, **options), tokenizer


def _load_gguf(
    floats: FloatModel, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Builds the model from its configuration, and gives it the dequantized weights tensor by tensor."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as name:
        for file, content in floats.companions.items():
            (Path(name) / file).parent.mkdir(exist_ok=True)
            (Path(name) / file).write_bytes(content)
        with _naming(floats.path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            config = transformers.AutoConfig.from_pretrained(name)
            generation = transformers.GenerationConfig.from_pretrained(name)
    weights = {}
    for name in floats.tensors():
        info = floats.info(name)
        # Through a writable buffer, which the tensor keeps: no second copy is made where the dtype is the wanted one.
        values = np.frombuffer(bytearray(b"".join(floats.read_all(name))), DTYPES[info.dtype]).astype(np.float32, copy=False)
        weights[name] = torch.from_numpy(values).reshape(info.shape).to(dtype)
    with _naming(floats.path):
        model, report = getattr(transformers, config.architectures[0]).from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, **options
        )
    if wrong := [f"{what} {min(map(str, found))}" for what, found in report.items() if found]:
        raise CheckpointFormatError(f"transformers does not take all weights of {floats.path}: {'; '.join(wrong)}")
    model.generation_config = generation
    return model, tokenizer


@contextmanager
def _naming(source: Path) -> Iterator[None]:
    """Turns what transformers raises into a CheckpointFormatError."""
    try:
        yield
    except NestpatchError:
        raise
    except Exception as error:  # transformers raises whatever the file provokes: struct, json, OS, key and value errors
        raise CheckpointFormatError(
            f"transformers cannot load {source}: {' '.join(str(error).split())}",
            advice="A model directory needs config.json, the weights and the tokenizer.",
        ) from error


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
        batch: Prompts that run together.
        path: The model on disk, which a pack is merged with; None: no pack can be attached.
        active: Entered while the model computes: puts other weights in, and takes them out again.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int = 48
    max_prompt_tokens: int = MAX_TOKENS
    batch: int = 64
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
        for places in by_length(rows, self.batch):
            padded = pad_left([rows[i] for i in places], int(self.tokenizer.pad_token_id))
            ids, mask = (torch.from_numpy(part).to(self.model.device) for part in padded)
            with self.active(), torch.inference_mode():
                out = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # type: ignore[operator]
            texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text.strip()
            done += len(places)
            on_event(Event("generate", done, len(rows)))
        return answers

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
        rows, found = self.token_ids(prompts), {}
        for places in by_length(rows, self.batch):
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
