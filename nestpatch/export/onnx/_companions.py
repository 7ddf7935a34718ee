"""The files beside a graph: configuration, tokenizer, chat template, and the settings of onnxruntime-genai."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch.errors import CheckpointFormatError
from nestpatch.export.onnx._graph import CacheShape
from nestpatch.files.reading import MAX_JSON, read_json, read_text
from nestpatch.patcher.copies import leads_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRAPH, DATA = "model.onnx", "model.onnx_data"
_COPIED = re.compile(
    r"tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|spiece\.model|chat_template\.(jinja|json)|generation_config\.json"
)
_FOLDERS = ("additional_chat_templates",)


def write_companions(
    source: Path, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shapes: Sequence[CacheShape]
) -> list[str]:
    """Writes everything but the graph.

    Args:
        source: The model's directory.
        folder: The export's directory.
        model: The loaded model.
        tokenizer: Its tokenizer.
        shapes: What each layer caches.

    Returns:
        Notes for the user.
    """
    out = _copy(source, folder)
    config = _read_object(source / "config.json")
    config.pop("_name_or_path", None)  # older versions of transformers store a path of another machine here
    # transformers.js finds a graph by its dtype: fp32 is the one named model.onnx, whatever its matrices are.
    browser: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": {GRAPH: 1}}
    if str(model.dtype) == "torch.float16":
        browser["kv_cache_dtype"] = "float16"
    _write_json(folder / "config.json", {**config, "transformers.js_config": browser})
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file() and settings.is_file() and not (own := _read_object(settings)).get("chat_template"):
        # transformers.js reads the template from the tokenizer's configuration only, where older models have it.
        _write_json(settings, {**own, "chat_template": read_text(template, MAX_JSON, error=CheckpointFormatError)})
    ends = _end_tokens(model, tokenizer.eos_token_id)
    pad, notes = _padding(model, tokenizer, ends)
    _write_json(folder / "genai_config.json", _genai_config(model, shapes, pad))
    return [*notes, *([f"not copied (links out of the model): {', '.join(out)}"] if out else [])]


def _copy(source: Path, folder: Path) -> list[str]:
    """Copies the files of a model that a runtime reads, except links out of the model, whose names it returns."""
    left_out = []
    for file in sorted(source.iterdir()):
        if file.is_file() and _COPIED.fullmatch(file.name):
            found = [file]
        elif file.is_dir() and file.name in _FOLDERS:
            found = [file, *sorted(file.rglob("*"))]
        else:
            continue
        if odd := [below.relative_to(source).as_posix() for below in found if leads_out(below, source)]:
            left_out += odd
        elif file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            shutil.copyfile(file, folder / file.name)
    return left_out


def _end_tokens(model: PreTrainedModel, default: Any) -> list[int]:
    """The tokens that end an answer; `default` where the model's configuration has none."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    found = found if found is not None else model.config.get_text_config().eos_token_id
    found = found if found is not None else default
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [int(found)]


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> tuple[int, list[str]]:
    """(padding token, notes). onnxruntime-genai skips that token wherever it occurs in a prompt."""
    known = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    for pad in known:
        if pad is not None and pad not in ends:
            return int(pad), []
    note = "the model has no padding token of its own: onnxruntime-genai skips the end token inside a prompt"
    return (ends[0] if ends else 0), [note]


def _genai_config(model: PreTrainedModel, shapes: Sequence[CacheShape], pad: int) -> dict[str, Any]:
    config = model.config.get_text_config()
    ends = _end_tokens(model, None)
    length = int(getattr(config, "max_position_embeddings", None) or 2048)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH,
        "head_size": shapes[0].key,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": len(shapes),
        "num_key_value_heads": shapes[0].heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
    }
    facts = {
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else (ends or [0])[0],
        "eos_token_id": ends or [0],
        "pad_token_id": pad,
        "context_length": length,
        "type": "decoder",
        "vocab_size": config.vocab_size,
        "decoder": decoder,
    }
    # The graph returns a new cache instead of writing into the given one.
    search = {"do_sample": False, "max_length": length, "min_length": 0, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": facts, "search": search}


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} is missing, or is not a JSON object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
