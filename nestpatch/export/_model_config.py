"""A model's config.json, read once and the same for every version of transformers that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.files.reading import MAX_JSON, read_text

_WIDEST_HEAD = 1 << 16
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a config.json, with the defaults of its family underneath."""

    architecture: str
    """Its transformers class: "LlamaForCausalLM"."""
    fields: Mapping[str, Any]

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), default)

    def number(self, *names: str) -> int:
        """A whole number that must be there. Raises CheckpointFormatError."""
        value = self.get(*names)
        if type(value) is not int:
            raise CheckpointFormatError(f"config.json: {names[0]} is {value!r}, a whole number is needed")
        return value

    def with_defaults(self, defaults: Mapping[str, Any]) -> ModelConfig:
        """The same with values for what config.json leaves out. Raises CheckpointFormatError when that is something vital."""
        given = {name: value for name, value in self.fields.items() if value is not None}
        config = replace(self, fields={**defaults, **given})
        for name in _REQUIRED:
            if config.number(name) < 1:
                raise CheckpointFormatError(f"config.json: {name} is {config.number(name)}")
        if not 1 <= config.head_dim <= _WIDEST_HEAD:
            raise CheckpointFormatError(f"config.json: heads of {config.head_dim}")
        return config

    @property
    def layers(self) -> int:
        return self.number("num_hidden_layers")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        value = self.get("num_key_value_heads", default=self.heads)
        return int(value)

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim", default=self.number("hidden_size") // self.heads))

    @property
    def rope(self) -> Mapping[str, Any]:
        """How positions are encoded in full attention layers: rope_type, rope_theta, and what the type needs."""
        nested = self._rope_parameters()
        return {"rope_type": "default", "rope_theta": 10000.0} | (nested.get("full_attention") or nested)

    @property
    def local_theta(self) -> float | None:
        """The base of sliding window layers, where these have one of their own."""
        local = self._rope_parameters().get("sliding_attention") or {}
        value = local.get("rope_theta", self.get("rope_local_base_freq"))
        return None if value is None else float(value)

    def _rope_parameters(self) -> dict[str, Any]:
        # transformers 5 has rope_parameters; before, rope_theta stood beside rope_scaling, whose type was "type" once.
        found = dict(self.get("rope_parameters", "rope_scaling", default={}))
        if "full_attention" in found:
            return found
        found.setdefault("rope_type", found.pop("type", "default"))
        found.setdefault("rope_theta", self.get("rope_theta", "rotary_emb_base", default=10000.0))
        found.setdefault("partial_rotary_factor", self.get("partial_rotary_factor", "rotary_pct", default=1.0))
        if (original := self.get("original_max_position_embeddings")) is not None:
            found.setdefault("original_max_position_embeddings", original)
        return found


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None when there is none. Raises CheckpointFormatError when it is broken."""
    try:
        return json.loads(read_text(path, MAX_JSON, error=CheckpointFormatError))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"cannot read {path}: {error}") from error


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json. Raises CheckpointFormatError without one, UnsupportedModelError for quantized weights."""
    fields = read_json(folder / "config.json")
    if not isinstance(fields, dict):
        raise CheckpointFormatError(
            f"{folder} has no config.json", advice="Give the model's directory, with config.json and its tokenizer."
        )
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointFormatError(f"config.json of {folder} names no architecture")
    if fields.get("quantization_config"):
        how = fields["quantization_config"]
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else "unknown"
        raise UnsupportedModelError(
            f"the weights of {folder} are quantized already (method {method})",
            advice="Export the float model it was made from.",
        )
    return ModelConfig(architectures[0], fields)
