"""What llama.cpp's architectures do with a model's tensors and numbers, for the export to GGUF and for the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nestpatch.rows import FloatArray

_WAVES = 2 * math.pi
_USUAL = (1.0, 4.0)
"""low_freq_factor and high_freq_factor of every Llama 3.1 and 3.2."""


@dataclass(frozen=True)
class Traits:
    """How an architecture differs from most."""

    epsilon: tuple[str, str, float] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6)
    """Of the norms: key in GGUF, field in config.json, default."""
    norm_shift: float = 0.0
    """Added to norm weights: Gemma stores their difference from 1."""
    always_tied: bool = False
    fused_by_head: bool = False
    """Query, key and value are one tensor, head by head; llama.cpp expects all queries first."""
    period: int = 0
    """One layer of so many has full attention, the others a sliding window; 0: no windows."""
    large: int = 0
    """The depth at which llama.cpp scales attention by the width of the model, as Gemma's 27B models do."""


TRAITS: dict[str, Traits] = {
    "llama": Traits(),
    "qwen2": Traits(),
    "qwen3": Traits(),
    "qwen3moe": Traits(),
    "gemma2": Traits(norm_shift=1.0, always_tied=True, period=2, large=46),
    "gemma3": Traits(norm_shift=1.0, always_tied=True, period=6, large=62),
    "phi3": Traits(),
    "gptneox": Traits(epsilon=("attention.layer_norm_epsilon", "layer_norm_eps", 1e-5), fused_by_head=True),
}
"""By general.architecture: all that nestpatch exports to, and reads back."""


def llama3_divisors(rope: Mapping[str, Any], head_dim: int) -> FloatArray:
    """Llama 3.1: the divisors of the rotary frequencies. 1 for short waves, `factor` for long ones, interpolated between.

    Args:
        rope: rope_theta, factor, low_freq_factor, high_freq_factor and original_max_position_embeddings.
        head_dim: Width of a head.

    Returns:
        float32 [head_dim / 2].
    """
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    smooth = np.clip((context / _wave_lengths(float(rope["rope_theta"]), head_dim) - low) / (high - low), 0, 1)
    divisors: FloatArray = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return divisors


def _wave_lengths(theta: float, head_dim: int) -> Any:
    return _WAVES * theta ** (np.arange(0, head_dim, 2) / head_dim)


def llama3_settings(divisors: FloatArray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """The settings that give these divisors, which are all that a GGUF file has of them.

    Args:
        divisors: float32 [head_dim / 2].
        theta: The rotary base.
        head_dim: Width of a head.

    Returns:
        What `llama3_divisors` takes, less the base; None where no settings give these numbers.
    """
    factor = float(np.round(divisors.max(), 4))
    for low, high, context in _candidates(divisors, factor, theta, head_dim):
        found = {
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        if np.allclose(llama3_divisors({**found, "rope_theta": theta}, head_dim), divisors, rtol=1e-6, atol=0):
            return found
    return None


def _candidates(divisors: FloatArray, factor: float, theta: float, head_dim: int) -> list[tuple[float, float, int]]:
    """(low, high, context) to try: the usual factors first, then the line through the interpolated divisors."""
    low, high = _USUAL
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if factor <= 1:
        return []
    smooth = (1 / divisors[between].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    waves = _wave_lengths(theta, head_dim)[between]
    contexts = {round(float(context)) for context in (smooth * (high - low) + low) * waves}
    found = [(low, high, context) for context in sorted(contexts) if context > 0]
    found += [(low, high, 1 << power) for power in (13, *range(5, 21))]
    if len(waves) > 1:
        slope, start = np.polyfit(1 / waves, smooth, 1)
        if start < 0:  # low / (high - low), where only the ratios of all three numbers matter
            found.append((low, round(low - low / start, 4), round(float(-slope / start))))
    return found


def longrope_attention(stretch: float, original: int) -> float:
    """By how much Phi-3 scales attention, where its configuration does not say.

    Args:
        stretch: Longest text by longest text of the first training.
        original: Tokens of the latter.

    Returns:
        The factor.
    """
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
