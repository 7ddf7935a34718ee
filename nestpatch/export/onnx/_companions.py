"""The files beside a graph: configuration, tokenizer, chat template, and what onnxruntime-genai wants to know."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch.errors import CheckpointFormatError
from nestpatch.export._model_config import read_json
from nestpatch.export.onnx._graph import CacheShape
from nestpatch.files.reading import MAX_JSON, read_text
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
    """Writes everything but the graph. Returns what a user should know of it."""
    out = _copy(source, folder)
    _write_json(folder / "config.json", _config(source, half=str(model.dtype) == "torch.float16"))
    _repeat_template(folder)
    pad, notes = _padding(model, tokenizer)
    _write_json(folder / "genai_config.json", _genai_config(model, shapes, pad))
    return [*notes, *([f"left out, as links out of the model: {', '.join(out)}"] if out else [])]


def _copy(source: Path, folder: Path) -> list[str]:
    """Copies the files of a model that a runtime reads. Returns the names of those that are links out of the model."""
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


def _config(source: Path, *, half: bool) -> dict[str, Any]:
    """The model's own config.json, and what transformers.js has to know of the files."""
    config = _read_json(source / "config.json")
    config.pop("_name_or_path", None)  # older versions of transformers leave the path of another machine here
    # Whatever the type of its matrices, there is one graph, called model.onnx: what transformers.js calls fp32.
    ours: dict[str, Any] = {"dtype": "fp32", "use_external_data_format": {GRAPH: 1}}
    if half:
        ours["kv_cache_dtype"] = "float16"
    return {**config, "transformers.js_config": ours}


def _repeat_template(folder: Path) -> None:
    """transformers.js looks for the chat template in the tokenizer's configuration alone, where older models have it."""
    template, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not template.is_file() or not path.is_file():
        return
    config = _read_json(path)
    if not config.get("chat_template"):
        _write_json(path, {**config, "chat_template": read_text(template, MAX_JSON, error=CheckpointFormatError)})


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer."""
    found = model.generation_config.eos_token_id if model.generation_config else None
    found = found if found is not None else model.config.get_text_config().eos_token_id
    found = found if found is not None else tokenizer.eos_token_id
    return list(found) if isinstance(found, (list, tuple)) else [] if found is None else [int(found)]


def _padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """(the padding token for onnxruntime-genai, notes). It takes that token for padding wherever it stands in a prompt."""
    ends = ends_of(model, tokenizer)
    known = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    for pad in known:
        if pad is not None and pad not in ends:
            return int(pad), []
    note = "the model has no padding token of its own: onnxruntime-genai does not read the end token inside a prompt"
    return (ends[0] if ends else 0), [note]


def _genai_config(model: PreTrainedModel, shapes: Sequence[CacheShape], pad: int) -> dict[str, Any]:
    config = model.config.get_text_config()
    ends = ends_of(model, model)  # type: ignore[arg-type]
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
    # The graph hands its cache on instead of writing into the one that it got.
    search = {"do_sample": False, "max_length": length, "min_length": 0, "num_beams": 1, "past_present_share_buffer": False}
    return {"model": facts, "search": search}


def _read_json(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path} is missing, or holds no object")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
