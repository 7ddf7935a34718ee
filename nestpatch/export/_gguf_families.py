"""The model families that are exported to GGUF, a class each: what llama.cpp must be told, and what it stores otherwise.

Where llama.cpp would compute something else than the model does, the export is refused: the file would load and be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from nestpatch.errors import UnsupportedModelError
from nestpatch.export._model_config import ModelConfig
from nestpatch.formats.gguf.header import Facts
from nestpatch.formats.gguf.names import GGUF_ARCHITECTURES
from nestpatch.rows import FloatArray


class Family:
    """What most families have in common; the subclasses say how they differ."""

    gguf: ClassVar[str]
    """llama.cpp's name of the architecture; formats/names.py tells which transformers classes it has."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """What transformers assumes where config.json is silent."""
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    ropes: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn")
    norm_shift: ClassVar[float] = 0.0
    """Added to norm weights: Gemma stores their distance from 1."""
    always_tied: ClassVar[bool] = False
    fused_by_head: ClassVar[bool] = False
    """Query, key and value are one tensor, head by head; llama.cpp wants all queries first (formats/names.py knows which)."""

    def facts(self, config: ModelConfig) -> Facts:
        """Keys without the architecture's prefix. Raises UnsupportedModelError for what llama.cpp cannot do."""
        self.check(config)
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
            **self.norm_facts(config),
            **_scaling_facts(config),
            **_expert_facts(config),
        }
        return facts

    def norm_facts(self, config: ModelConfig) -> Facts:
        """The epsilon of the norms."""
        return {"attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", default=1e-6))}

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:  # noqa: ARG002
        """Tensors that follow from config.json, by GGUF name."""
        return {}

    def check(self, config: ModelConfig) -> None:
        """Raises UnsupportedModelError for settings that llama.cpp does not know in this family."""
        activation = config.get("hidden_activation", "hidden_act", default=self.activations[0])
        if activation not in self.activations:
            raise _refused(config, f"the activation {activation!r}")
        kind = config.rope["rope_type"]
        if kind not in self.ropes:
            raise _refused(config, f"rope_type {kind!r}")

    def notes(self, config: ModelConfig) -> tuple[str, ...]:
        """What a user should know of this model in llama.cpp."""
        window = config.get("sliding_window")
        if window and config.get("use_sliding_window", default=True):
            return (f"llama.cpp ignores this family's sliding window: texts over {window} tokens are read otherwise",)
        return ()


class Llama(Family):
    """Llama 2 and 3, Mistral, Mixtral: rotary pairs are neighbours, so rows of q and k are reordered (formats/names.py)."""

    gguf = "llama"
    ropes = ("default", "linear", "yarn", "llama3")

    def facts(self, config: ModelConfig) -> Facts:
        """Also the width of rotated heads."""
        return {**super().facts(config), "rope.dimension_count": config.head_dim}

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:
        """Llama 3.1 stretches each rotary frequency by a factor of its own."""
        if config.rope["rope_type"] != "llama3":
            return {}
        return {"rope_freqs.weight": _llama3_factors(config.rope, config.head_dim)}


def _llama3_factors(rope: Mapping[str, Any], head_dim: int) -> FloatArray:
    """What the frequencies are divided by, float32 [head_dim / 2]: 1 for short waves, `factor` for long ones, else between."""
    theta, factor = float(rope["rope_theta"]), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    factors: FloatArray = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


class Qwen2(Family):
    """Qwen 2 and 2.5."""

    gguf = "qwen2"

    def notes(self, config: ModelConfig) -> tuple[str, ...]:
        """A window is used only when it is switched on."""
        return super().notes(config.with_defaults({"use_sliding_window": False}))


class Qwen3(Qwen2):
    """Qwen 3: norms on queries and keys."""

    gguf = "qwen3"


class Qwen3Moe(Qwen2):
    """Qwen 3 with experts in every layer."""

    gguf = "qwen3moe"

    def check(self, config: ModelConfig) -> None:
        """llama.cpp wants experts in every layer, and normalised weights of the chosen ones."""
        super().check(config)
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", default=1) != 1:
            raise _refused(config, "layers without experts")
        if not config.get("norm_topk_prob", default=False):
            raise _refused(config, "norm_topk_prob = false")


class Gemma2(Family):
    """Gemma 2: norms count from 1, logits are capped, every second layer sees a window."""

    gguf = "gemma2"
    activations = ("gelu_pytorch_tanh",)
    ropes = ("default", "linear")
    norm_shift = 1.0
    always_tied = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    period: ClassVar[int] = 2
    """Every so many layers, one sees everything."""
    large: ClassVar[int] = 46
    """The depth at which llama.cpp scales attention by the width of the model, as the 27B models do."""

    def facts(self, config: ModelConfig) -> Facts:
        """Window and caps."""
        facts = super().facts(config)
        facts["attention.sliding_window"] = config.number("sliding_window")
        facts.update(self._pattern(config))
        for key, name in (("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping",) * 2):
            if config.get(name):
                facts[key] = float(config.get(name))
        return facts

    def _pattern(self, config: ModelConfig) -> Facts:
        """The period of the window, where it is not the family's own."""
        kinds = config.get("layer_types")
        period = int(config.get("sliding_window_pattern", "_sliding_window_pattern", default=self.period))
        if kinds is not None:
            full = [number + 1 for number, kind in enumerate(kinds) if kind == "full_attention"]
            period = full[0] if full else max(period, len(kinds) + 1)
            if full != list(range(period, len(kinds) + 1, period)):
                raise _refused(config, "an irregular pattern of sliding window layers")
        same = all((n % period == 0) == (n % self.period == 0) for n in range(1, config.layers + 1))
        return {} if same else {"attention.sliding_window_pattern": period}

    def check(self, config: ModelConfig) -> None:
        """llama.cpp derives the scale of attention from other fields."""
        super().check(config)
        scale = config.number("hidden_size") // config.heads if config.layers == self.large else config.head_dim
        if config.get("query_pre_attn_scalar", default=scale) != scale:
            raise _refused(config, f"query_pre_attn_scalar = {config.get('query_pre_attn_scalar')} (it assumes {scale})")

    def notes(self, config: ModelConfig) -> tuple[str, ...]:  # noqa: ARG002
        """llama.cpp does have this family's window."""
        return ()


class Gemma3(Gemma2):
    """Gemma 3, the text models: one layer in six sees everything, and rotates with a base of its own."""

    gguf = "gemma3"
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    }
    period = 6
    large = 62

    def facts(self, config: ModelConfig) -> Facts:
        """The second rotary base."""
        return {**super().facts(config), "rope.freq_base_swa": config.local_theta or 10_000.0}

    def check(self, config: ModelConfig) -> None:
        """Caps of attention went away after Gemma 2."""
        super().check(config)
        if config.get("attn_logit_softcapping") or config.get("use_bidirectional_attention"):
            raise _refused(config, "capped or bidirectional attention")


class Phi3(Family):
    """Phi 3 and 4: fused q/k/v and gate/up, rotary factors for long and short texts."""

    gguf = "phi3"
    defaults: ClassVar[Mapping[str, Any]] = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    ropes = ("default", "longrope", "su")

    def facts(self, config: ModelConfig) -> Facts:
        """Rotary width and the length of texts from which the long factors count."""
        facts = super().facts(config)
        facts["rope.dimension_count"] = self._rotated(config)
        facts["rope.scaling.original_context_length"] = self._original(config)
        # llama.cpp tells Phi-4 from its elders by a window of zero.
        facts["attention.sliding_window"] = int(config.get("sliding_window", default=0))
        if config.rope["rope_type"] != "default":
            facts["rope.scaling.attn_factor"] = self._attention_factor(config)
        return facts

    def _rotated(self, config: ModelConfig) -> int:
        return int(config.head_dim * float(config.rope.get("partial_rotary_factor", 1.0)))

    def _original(self, config: ModelConfig) -> int:
        return int(config.rope.get("original_max_position_embeddings", 4096))

    def _attention_factor(self, config: ModelConfig) -> float:
        if (given := config.rope.get("attention_factor")) is not None:
            return float(given)
        stretch = config.rope.get("factor") or config.number("max_position_embeddings") / self._original(config)
        return math.sqrt(1 + math.log(stretch) / math.log(self._original(config))) if stretch > 1 else 1.0

    def tensors(self, config: ModelConfig) -> dict[str, FloatArray]:
        """The rotary factors, float32 [rotated / 2] each."""
        if config.rope["rope_type"] == "default":
            return {}
        found = {}
        for name in ("long", "short"):
            factors = np.asarray(config.rope.get(f"{name}_factor", ()), np.float32)
            if factors.shape != (self._rotated(config) // 2,):
                raise _refused(config, f"{len(factors)} {name} rope factors for {self._rotated(config)} rotated dimensions")
            found[f"rope_factors_{name}.weight"] = factors
        return found

    def check(self, config: ModelConfig) -> None:
        """llama.cpp assumes that the heads together are as wide as the model."""
        super().check(config)
        if config.head_dim * config.heads != config.number("hidden_size"):
            raise _refused(config, f"heads of {config.head_dim}")


class GptNeoX(Family):
    """GPT-NeoX and Pythia: query, key and value interleaved by head, norms with bias."""

    gguf = "gptneox"
    activations = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # one and the same to llama.cpp
    ropes = ("default",)
    defaults: ClassVar[Mapping[str, Any]] = {"rotary_pct": 0.25}
    fused_by_head = True

    def facts(self, config: ModelConfig) -> Facts:
        """Part of each head is rotated."""
        rotated = int(config.head_dim * float(config.rope["partial_rotary_factor"]))
        facts = {**super().facts(config), "rope.dimension_count": rotated, "attention.head_count_kv": config.heads}
        return {**facts, "use_parallel_residual": bool(config.get("use_parallel_residual", default=True))}

    def check(self, config: ModelConfig) -> None:
        """llama.cpp wants an output matrix."""
        super().check(config)
        if config.get("tie_word_embeddings"):
            raise _refused(config, "tied embeddings")

    def norm_facts(self, config: ModelConfig) -> Facts:
        """Norms with a mean."""
        return {"attention.layer_norm_epsilon": float(config.get("layer_norm_eps", default=1e-5))}


FAMILIES: tuple[Family, ...] = (Llama(), Qwen2(), Qwen3(), Qwen3Moe(), Gemma2(), Gemma3(), Phi3(), GptNeoX())


def family_of(config: ModelConfig) -> Family:
    """The family of a model. Raises UnsupportedModelError, with the list and the other route."""
    families = {family.gguf: family for family in FAMILIES}
    family = families.get(GGUF_ARCHITECTURES.get(config.architecture, ""))
    if family is not None:
        return family
    known = ", ".join(sorted(name for name, gguf in GGUF_ARCHITECTURES.items() if gguf in families))
    raise UnsupportedModelError(
        f"{config.architecture} models cannot be exported to GGUF here; known are {known}",
        advice="Let llama.cpp's own converter do it: --llama-cpp DIR, where DIR is a checkout of llama.cpp.",
    )


def _refused(config: ModelConfig, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp cannot run {config.architecture} with {what}", advice="Serve this model with something else than llama.cpp."
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


def _expert_facts(config: ModelConfig) -> Facts:
    count = config.get("num_local_experts", "num_experts")
    if not count:
        return {}
    facts: Facts = {"expert_count": int(count), "expert_used_count": config.number("num_experts_per_tok")}
    if (width := config.get("moe_intermediate_size")) is not None:
        facts["expert_feed_forward_length"] = int(width)
    return facts
