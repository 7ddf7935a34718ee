"""A model's config.json, read into one form whichever version of transformers wrote it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.files.reading import read_json

OTHER_CONVERTER = "Try llama.cpp's own converter: --llama-cpp DIR, where DIR is a checkout of llama.cpp."
"""Advice for models and tokenizers that cannot be exported to GGUF here."""
_WIDEST_HEAD = 1 << 16
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The fields of a config.json; those that are missing have the defaults of the family."""

    architecture: str
    """The class in transformers: "LlamaForCausalLM"."""
    fields: Mapping[str, Any]

    def get(self, *names: str, default: Any = None) -> Any:
        """Looks up a field that has had several names.

        Args:
            names: Its names.
            default: What to return where none is present.

        Returns:
            The first of these fields that is present and not null.
        """
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), default)

    def number(self, name: str) -> int:
        """Looks up a required integer.

        Args:
            name: The field.

        Returns:
            Its value.

        Raises:
            CheckpointFormatError: It is missing, or is not an integer.
        """
        value = self.get(name)
        if type(value) is not int:
            raise CheckpointFormatError(f"config.json: {name} is {value!r}; expected an integer")
        return value

    def with_defaults(self, defaults: Mapping[str, Any]) -> ModelConfig:
        """Fills in the fields that a family may leave out.

        Args:
            defaults: Values of missing fields.

        Returns:
            The configuration with these values.

        Raises:
            CheckpointFormatError: A required field is still missing, or has an impossible value.
        """
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
        return int(self.get("num_key_value_heads", default=self.heads))

    @property
    def head_dim(self) -> int:
        return int(self.get("head_dim", default=self.number("hidden_size") // self.heads))

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary settings of full attention layers: rope_type, rope_theta, and what the type needs."""
        nested = self.rope_parameters()
        return {"rope_type": "default", "rope_theta": 10000.0} | (nested.get("full_attention") or nested)

    def rope_parameters(self) -> dict[str, Any]:
        """The rotary settings as transformers 5 writes them; by kind of layer where kinds differ."""
        # transformers 5 writes rope_parameters; earlier versions rope_theta and rope_scaling, whose type was once "type".
        found = dict(self.get("rope_parameters", "rope_scaling", default={}))
        if "full_attention" in found:
            return found
        found.setdefault("rope_type", found.pop("type", "default"))
        found.setdefault("rope_theta", self.get("rope_theta", "rotary_emb_base", default=10000.0))
        found.setdefault("partial_rotary_factor", self.get("partial_rotary_factor", "rotary_pct", default=1.0))
        if (original := self.get("original_max_position_embeddings")) is not None:
            found.setdefault("original_max_position_embeddings", original)
        return found


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json.

    Args:
        folder: The model's directory.

    Returns:
        The configuration, without the defaults of its family.

    Raises:
        CheckpointFormatError: The file is missing or broken, or names no architecture.
        UnsupportedModelError: The weights are quantized already.
    """
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
            advice="Export the float model that it was made from.",
        )
    return ModelConfig(architectures[0], fields)


def model_name(path: Path) -> str:
    """The name of a model: its directory, or its repository in a Hub cache.

    Args:
        path: The model.

    Returns:
        The name as it is: llama.cpp reads rules from it.
    """
    place = Path(os.path.abspath(path))
    if place.is_file():
        place = place.parent
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.parent.parent.name.rpartition("--")[2]
    return place.name or "model"
