"""The tensors of a model of transformers and where a GGUF file stores their rows: the way back of export/_gguf_tensors.py.

The names come from the table of `names.py`, asked forwards: a tensor is looked for where the exporter puts it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nestpatch.errors import CheckpointFormatError, UnsupportedModelError
from nestpatch.formats.checkpoint import IntArray, TensorInfo
from nestpatch.formats.gguf.hf._config import ROPE_TENSORS
from nestpatch.formats.gguf.names import gguf_home, gguf_name, is_reordered
from nestpatch.formats.gguf.traits import TRAITS

_ATTENTION = {"self_attn.q_proj": "QH", "self_attn.k_proj": "KH", "self_attn.v_proj": "KH", "self_attn.o_proj": "HQ"}
_DENSE = {"mlp.gate_proj": "FH", "mlp.up_proj": "FH", "mlp.down_proj": "HF"}
_NORMS = {"input_layernorm": "H", "post_attention_layernorm": "H"}
_HEAD_NORMS = {"self_attn.q_norm": "D", "self_attn.k_norm": "D"}
_MORE_NORMS = {"pre_feedforward_layernorm": "H", "post_feedforward_layernorm": "H"}
_ROOT = {"model.embed_tokens": "VH", "model.norm": "H", "lm_head": "VH"}
_QKVO = ("attention_bias", tuple(_ATTENTION))


@dataclass(frozen=True)
class _Layout:
    """The tensors of a class.

    Shapes are letters: H is the width of the model, F of the feed-forward block, X of an expert, Q of all queries, K of all
    keys, D of one head, T and P of fused queries, keys and values of GPT-NeoX and Phi-3, G of gate and up; V is the size of the
    vocabulary, E the number of experts.
    """

    layer: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    """Of one expert; its number follows `stack`."""
    stack: str = ""
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(field of config.json that turns them on, or "" where they always exist; parts with a bias)."""
    layers: str = "model.layers"
    root: Mapping[str, str] = field(default_factory=lambda: _ROOT)
    head: str = "lm_head"
    """Missing where the output matrix is tied to the embeddings."""


_LAYOUTS = {
    "LlamaForCausalLM": _Layout({**_ATTENTION, **_DENSE, **_NORMS}, biases=(_QKVO, ("mlp_bias", tuple(_DENSE)))),
    "MixtralForCausalLM": _Layout(
        {**_ATTENTION, **_NORMS, "block_sparse_moe.gate": "EH"},
        {"w1": "FH", "w3": "FH", "w2": "HF"},
        "block_sparse_moe.experts",
    ),
    "Qwen2ForCausalLM": _Layout({**_ATTENTION, **_DENSE, **_NORMS}, biases=(("", tuple(_ATTENTION)[:3]),)),
    "Qwen3ForCausalLM": _Layout({**_ATTENTION, **_HEAD_NORMS, **_DENSE, **_NORMS}, biases=(_QKVO,)),
    "Qwen3MoeForCausalLM": _Layout(
        {**_ATTENTION, **_HEAD_NORMS, **_NORMS, "mlp.gate": "EH"},
        {"gate_proj": "XH", "up_proj": "XH", "down_proj": "HX"},
        "mlp.experts",
        (_QKVO,),
    ),
    "Gemma2ForCausalLM": _Layout({**_ATTENTION, **_DENSE, **_NORMS, **_MORE_NORMS}, biases=(_QKVO,)),
    "Gemma3ForCausalLM": _Layout({**_ATTENTION, **_HEAD_NORMS, **_DENSE, **_NORMS, **_MORE_NORMS}, biases=(_QKVO,)),
    "Phi3ForCausalLM": _Layout(
        {"self_attn.qkv_proj": "PH", "self_attn.o_proj": "HQ", "mlp.gate_up_proj": "GH", "mlp.down_proj": "HF", **_NORMS}
    ),
    "GPTNeoXForCausalLM": _Layout(
        {
            "attention.query_key_value": "TH", "attention.dense": "HH", "mlp.dense_h_to_4h": "FH", "mlp.dense_4h_to_h": "HF",
            **_NORMS,
        },
        biases=(
            ("", ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", *_NORMS, "gpt_neox.final_layer_norm")),
            ("attention_bias", ("attention.query_key_value", "attention.dense")),
        ),
        layers="gpt_neox.layers",
        root={"gpt_neox.embed_in": "VH", "gpt_neox.final_layer_norm": "H", "embed_out": "VH"},
        head="embed_out",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class FloatSource:
    """Where a GGUF file stores a tensor of the model."""

    name: str
    """In the model of transformers."""
    shape: tuple[int, ...]
    stored: TensorInfo
    """The tensor of the file."""
    first: int = 0
    """Its first row there."""
    head: int = 0
    """Rows of a head, where the file stores the rows in another order; else 0."""
    fused: bool = False
    """Whether that order is all queries, all keys, all values; else neighbours are the two halves of a head."""
    shift: float = 0.0
    """Subtracted from every value."""

    def places(self, rows: IntArray) -> IntArray:
        """Where rows of the model are in the file's tensor; of a vector, elements.

        Args:
            rows: Numbers of rows of the model.

        Returns:
            Numbers of rows of the file's tensor.
        """
        if not self.head:
            return rows + self.first
        if self.fused:
            group, inside = np.divmod(rows, 3 * self.head)
            part, row = np.divmod(inside, self.head)
            found: IntArray = part * (self.shape[0] // 3) + group * self.head + row
            return found
        head, inside = np.divmod(rows, self.head)
        half, pair = np.divmod(inside, self.head // 2)
        paired: IntArray = head * self.head + 2 * pair + half
        return paired


def plan_floats(config: Mapping[str, Any], infos: Mapping[str, TensorInfo], architecture: str, where: str) -> list[FloatSource]:
    """Plans all tensors of the model.

    Args:
        config: Its config.json.
        infos: The tensors of the file.
        architecture: The file's.
        where: The file, for messages.

    Returns:
        The tensors, sorted by name.

    Raises:
        CheckpointFormatError: A tensor is missing, or has another shape than the metadata says.
        UnsupportedModelError: The file has tensors that the model has no place for.
    """
    sizes, used = _letters(config), set(ROPE_TENSORS)
    found = []
    for name, letters in _tensors(config):
        source = _source(name, tuple(sizes[letter] for letter in letters), infos, architecture, config, where)
        used.add(source.stored.name)
        found.append(source)
    if left := sorted(set(infos) - used):
        raise UnsupportedModelError(
            f"{config['architectures'][0]} models have no place for {len(left)} tensors of {where}, among them {left[0][:80]}",
            advice="Give the safetensors model that the file was made from.",
        )
    return sorted(found, key=lambda source: source.name)


def _letters(config: Mapping[str, Any]) -> dict[str, int]:
    head, width = config["head_dim"], config["hidden_size"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        "H": width,
        "F": config["intermediate_size"],
        "X": config.get("moe_intermediate_size", 0),
        "Q": queries,
        "K": keys,
        "D": head,
        "T": 3 * queries,
        "P": queries + 2 * keys,
        "G": 2 * config["intermediate_size"],
        "V": config["vocab_size"],
        "E": config.get("num_local_experts", config.get("num_experts", 0)),
    }


def _tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, letters of its shape) of every tensor that the model has."""
    layout = _LAYOUTS[config["architectures"][0]]
    biased = {part for flag, parts in layout.biases if not flag or config.get(flag) for part in parts}
    parts = {
        name: (name, letters)
        for name, letters in layout.root.items()
        if name != layout.head or not config["tie_word_embeddings"]
    }
    for number in range(config["num_hidden_layers"]):
        parts |= {f"{layout.layers}.{number}.{part}": (part, letters) for part, letters in layout.layer.items()}
        for expert in range(_letters(config)["E"] if layout.experts else 0):
            stack = f"{layout.layers}.{number}.{layout.stack}.{expert}"
            parts |= {f"{stack}.{part}": (part, letters) for part, letters in layout.experts.items()}
    for name, (part, letters) in parts.items():
        yield f"{name}.weight", letters
        if part in biased:
            yield f"{name}.bias", letters[0]


def _source(
    name: str, shape: tuple[int, ...], infos: Mapping[str, TensorInfo], architecture: str, config: Mapping[str, Any], where: str
) -> FloatSource:
    layers = config["num_hidden_layers"]
    expert = None
    if is_reordered(name, architecture):
        place = gguf_name(name, architecture, layers)
    else:
        home = gguf_home(name, architecture, layers)
        place, expert = (home.tensors[0], home.expert) if home is not None else (None, None)
    if place is None or place not in infos:
        raise CheckpointFormatError(f"{where} has no tensor {place or name}")
    info, wanted = infos[place], shape
    if expert is not None:
        wanted = (config.get("num_local_experts", config.get("num_experts")), *shape)
    if info.shape != wanted:
        raise CheckpointFormatError(
            f"tensor {place} of {where} has shape {list(info.shape)}; by the metadata it should have {list(wanted)}"
        )
    traits = TRAITS[architecture]
    reordered = is_reordered(name, architecture)
    return FloatSource(
        name,
        shape,
        info,
        first=(expert or 0) * shape[0],
        head=config["head_dim"] if reordered else 0,
        fused=traits.fused_by_head,
        shift=traits.norm_shift if len(shape) == 1 and name.endswith("norm.weight") else 0.0,
    )


def matrix_types(sources: Collection[FloatSource]) -> set[str]:
    """The types of a file's matrices, without those that llama.cpp stores as F32 in any file.

    Args:
        sources: The tensors.
    """
    return {source.stored.dtype for source in sources if not forced(source)}


def forced(source: FloatSource) -> bool:
    """Whether llama.cpp stores a tensor as F32 in files of any type: vectors and routers."""
    return len(source.shape) < 2 or "ffn_gate_inp" in source.stored.name


def elements(source: FloatSource) -> int:
    """How many numbers a tensor has."""
    return math.prod(source.shape)
