"""The model families that can be exported to GGUF, one class each: their metadata, and how llama.cpp stores their tensors.

An export is refused where llama.cpp would compute something else than the model does: the file would load and give wrong
answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from nestpatch.errors import UnsupportedModelError
from nestpatch.export._model_config import OTHER_CONVERTER, ModelConfig
from nestpatch.formats.gguf.header import Facts
from nestpatch.formats.gguf.names import GGUF_ARCHITECTURES
from nestpatch.formats.gguf.traits import TRAITS, Traits, llama3_divisors, longrope_attention
from nestpatch.rows import FloatArray


class Family:
    """What most families have in common; subclasses define how they differ."""

    gguf: ClassVar[str]
    """llama.cpp's name of the architecture; formats/gguf/names.py maps classes of transformers to it."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """The defaults of transformers for fields that config.json may omit."""
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    has_window: ClassVar[bool] = False
    """Whether llama.cpp implements the sliding window of this family."""

    @property
    def traits(self) -> Traits:
        """What llama.cpp does with tensors of this architecture."""
        return TRAITS[self.gguf]

    def facts(self, config: ModelConfig) -> Facts:
        """The model's metadata.

        Args:
            config: The configuration, with the family's defaults.

        Returns:
            Values by keys without the architecture's prefix.

        Raises:
            UnsupportedModelError: llama.cpp does not implement a setting for this family.
        """
        activation = config.get("hidden_activation", "hidden_act", default=self.activations[0])
        if activation not in self.activations:
            raise _refused(config, f"the activation {activation!r}")
        if (kind := config.rope["rope_type"]) not in self.ropes:
            raise _refused(config, f"rope_type {kind!r}")
        key, field, default = self.traits.epsilon
        facts: Facts = {
            "block_count": config.layers,
            "context_length": config.number("max_position_embeddings"),
            "embedding_length": config.number("hidden_size"),
            "feed_forward_length": config.number("intermediate_size"),
            "attention.head_count": config.heads,
            "attention.head_count_kv": config.kv_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "rope.freq_base": float(config.rope["rope_theta"]),
            key: float(config.get(field, default=default)),
            **_scaling_facts(config),
        }
        if experts := config.get("num_local_experts", "num_experts"):
            facts |= {"expert_count": int(experts), "expert_used_count": config.number("num_experts_per_tok")}
            if (width := config.get("moe_intermediate_size")) is not None:
                facts["expert_feed_forward_length"] = int(width)
        return facts

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:  # noqa: ARG002
        """The tensors that are computed from config.json.

        Args:
            config: The configuration, with the family's defaults.

        Returns:
            float32 arrays by their GGUF names.
        """
        return {}

    def notes(self, config: ModelConfig) -> tuple[str, ...]:
        """How this model behaves differently in llama.cpp.

        Args:
            config: The configuration, with the family's defaults.

        Returns:
            Sentences for the user; usually none.
        """
        window = config.get("sliding_window")
        if window and not self.has_window and config.get("use_sliding_window", default=True):
            return (f"llama.cpp ignores this family's sliding window: texts over {window} tokens give other results",)
        return ()


class Llama(Family):
    """Llama 2 and 3, Mistral, Mixtral: rotary pairs are neighbours, so the rows of q and k are reordered in GGUF."""

    gguf = "llama"
    ropes = ("default", "linear", "yarn", "llama3")

    def facts(self, config: ModelConfig) -> Facts:
        """Adds the number of rotated dimensions."""
        return {**super().facts(config), "rope.dimension_count": config.head_dim}

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:
        """Llama 3.1: the divisors of the rotary frequencies, float32 [head_dim / 2]."""
        if config.rope["rope_type"] != "llama3":
            return {}
        return {"rope_freqs.weight": llama3_divisors(config.rope, config.head_dim)}


class Qwen2(Family):
    """Qwen 2 and 2.5. The sliding window is off unless config.json turns it on."""

    gguf = "qwen2"
    defaults: ClassVar[Mapping[str, Any]] = {"use_sliding_window": False}


class Qwen3(Qwen2):
    """Qwen 3: norms on queries and keys."""

    gguf = "qwen3"


class Qwen3Moe(Qwen2):
    """Qwen 3 with experts in every layer."""

    gguf = "qwen3moe"

    def facts(self, config: ModelConfig) -> Facts:
        """llama.cpp requires experts in every layer, and normalizes the weights of the chosen ones."""
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", default=1) != 1:
            raise _refused(config, "layers without experts")
        if not config.get("norm_topk_prob", default=False):
            raise _refused(config, "norm_topk_prob = false")
        return super().facts(config)


class Gemma2(Family):
    """Gemma 2: norms are stored as differences from 1, logits are capped, every second layer has a sliding window."""

    gguf = "gemma2"
    activations = ("gelu_pytorch_tanh",)
    ropes = ("default", "linear")
    has_window = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def facts(self, config: ModelConfig) -> Facts:
        """Adds the window and the caps. llama.cpp derives the scale of attention from other fields."""
        facts = super().facts(config)
        scale = config.number("hidden_size") // config.heads if config.layers == self.traits.large else config.head_dim
        if config.get("query_pre_attn_scalar", default=scale) != scale:
            raise _refused(config, f"query_pre_attn_scalar = {config.get('query_pre_attn_scalar')} (it assumes {scale})")
        facts["attention.sliding_window"] = config.number("sliding_window")
        facts.update(self._pattern(config))
        for key, name in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping",) * 2):
            if config.get(name):
                facts[key] = float(config.get(name))
        return facts

    def _pattern(self, config: ModelConfig) -> Facts:
        """The period of the window, where it differs from the family's default."""
        kinds = config.get("layer_types")
        period = int(config.get("sliding_window_pattern", "_sliding_window_pattern", default=self.traits.period))
        if kinds is not None:
            full = [number + 1 for number, kind in enumerate(kinds) if kind == "full_attention"]
            period = full[0] if full else max(period, len(kinds) + 1)
            if full != list(range(period, len(kinds) + 1, period)):
                raise _refused(config, "an irregular pattern of sliding window layers")
        same = all((n % period == 0) == (n % self.traits.period == 0) for n in range(1, config.layers + 1))
        return {} if same else {"attention.sliding_window_pattern": period}


class Gemma3(Gemma2):
    """Gemma 3, the text models: one layer of six has full attention, with a rotary base of its own."""

    gguf = "gemma3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }

    def facts(self, config: ModelConfig) -> Facts:
        """Adds the rotary base of layers with a window. llama.cpp has capped attention for Gemma 2 only."""
        if config.get("attn_logit_softcapping") or config.get("use_bidirectional_attention"):
            raise _refused(config, "capped or bidirectional attention")
        # The rotary base of sliding window layers, where they have their own.
        local = (config.rope_parameters().get("sliding_attention") or {}).get("rope_theta", config.get("rope_local_base_freq"))
        return {**super().facts(config), "rope.freq_base_swa": float(local or 10_000.0)}


class Phi3(Family):
    """Phi 3 and 4: fused q/k/v and gate/up, rotary factors for long and short texts."""

    gguf = "phi3"
    defaults: ClassVar[Mapping[str, Any]] = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    ropes = ("default", "longrope", "su")

    def facts(self, config: ModelConfig) -> Facts:
        """Adds the rotated dimensions, and the text length from which the long factors are used.

        llama.cpp assumes that all heads together are as wide as the model.
        """
        if config.head_dim * config.heads != config.number("hidden_size"):
            raise _refused(config, f"heads of {config.head_dim}")
        facts, rope = super().facts(config), config.rope
        original = int(rope.get("original_max_position_embeddings", 4096))
        facts["rope.dimension_count"] = self._rotated(config)
        facts["rope.scaling.original_context_length"] = original
        # llama.cpp recognizes Phi-4 by a window of zero.
        facts["attention.sliding_window"] = int(config.get("sliding_window", default=0))
        if rope["rope_type"] != "default":
            factor = rope.get("attention_factor")
            if factor is None:
                stretch = rope.get("factor") or config.number("max_position_embeddings") / original
                factor = longrope_attention(stretch, original)
            facts["rope.scaling.attn_factor"] = float(factor)
        return facts

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:
        """The rotary factors, float32 [rotated / 2] each."""
        if config.rope["rope_type"] == "default":
            return {}
        found, rotated = {}, self._rotated(config)
        for name in ("long", "short"):
            factors = np.asarray(config.rope.get(f"{name}_factor", ()), np.float32)
            if factors.shape != (rotated // 2,):
                raise _refused(config, f"{len(factors)} {name} rope factors for {rotated} rotated dimensions")
            found[f"rope_factors_{name}.weight"] = factors
        return found

    def _rotated(self, config: ModelConfig) -> int:
        return int(config.head_dim * float(config.rope.get("partial_rotary_factor", 1.0)))


class GptNeoX(Family):
    """GPT-NeoX and Pythia: query, key and value interleaved by head, norms with bias, part of each head rotated."""

    gguf = "gptneox"
    activations = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # llama.cpp computes all of them the same way
    ropes = ("default",)
    defaults: ClassVar[Mapping[str, Any]] = {"rotary_pct": 0.25}

    def facts(self, config: ModelConfig) -> Facts:
        """Adds the rotated dimensions and the kind of residual. llama.cpp requires an output matrix."""
        if config.get("tie_word_embeddings"):
            raise _refused(config, "tied embeddings")
        rotated = int(config.head_dim * float(config.rope["partial_rotary_factor"]))
        facts = {**super().facts(config), "rope.dimension_count": rotated, "attention.head_count_kv": config.heads}
        return {**facts, "use_parallel_residual": bool(config.get("use_parallel_residual", default=True))}


FAMILIES: tuple[Family, ...] = (Llama(), Qwen2(), Qwen3(), Qwen3Moe(), Gemma2(), Gemma3(), Phi3(), GptNeoX())


def family_of(config: ModelConfig) -> Family:
    """Finds the family of a model.

    Args:
        config: The model's configuration.

    Returns:
        The family.

    Raises:
        UnsupportedModelError: The class is not known; the advice lists those that are.
    """
    families = {family.gguf: family for family in FAMILIES}
    family = families.get(GGUF_ARCHITECTURES.get(config.architecture, ""))
    if family is not None:
        return family
    known = ", ".join(sorted(name for name, gguf in GGUF_ARCHITECTURES.items() if gguf in families))
    raise UnsupportedModelError(
        f"{config.architecture} models cannot be exported to GGUF; supported are {known}",
        advice=OTHER_CONVERTER,
    )


def _refused(config: ModelConfig, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp cannot run {config.architecture} with {what}", advice="Serve this model with another program."
    )


def _scaling_facts(config: ModelConfig) -> Facts:
    rope = config.rope
    kind = rope["rope_type"]
    if kind not in {"linear", "yarn"}:
        return {}
    facts: Facts = {"rope.scaling.type": str(kind), "rope.scaling.factor": float(rope["factor"])}
    if kind == "linear":
        return facts
    if any(rope.get(name) is not None for name in ("attention_factor", "mscale", "mscale_all_dim")):
        raise _refused(config, "a yarn attention factor of its own")
    original = rope.get("original_max_position_embeddings", config.number("max_position_embeddings"))
    facts["rope.scaling.original_context_length"] = int(original)
    for name in ("beta_fast", "beta_slow"):
        if rope.get(name) is not None:
            facts[f"rope.scaling.yarn_{name}"] = float(rope[name])
    return facts
