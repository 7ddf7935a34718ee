"""Greedy generation in onnxruntime: the twin of `with_transformers`, fed with the same token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nestpatch.errors import CheckpointFormatError, MissingExtraError
from nestpatch.events import OnEvent, ignore
from nestpatch.nest_train.generate import Generate
from nestpatch.nest_train.onnx_model import OnnxModel, read_json
from nestpatch.nest_train.text import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
