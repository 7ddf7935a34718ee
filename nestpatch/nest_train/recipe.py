"""`Recipe`: every setting of the method with its default, its unit, its range and its source.

"NeST" is the paper arXiv 2602.16835; "measured" refers to bench/LOG.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from nestpatch.errors import RecipeError
from nestpatch.files.reading import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


MAX_FILE = 1 << 20
"""Bytes of a recipe file, at most."""


def _knob(
    default: Any,
    unit: str,
    source: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    metadata = {"unit": unit, "source": source, "low": low, "high": high, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """All settings of one training run. Immutable, and stored in the pack's manifest.

    Raises:
        RecipeError: A value has the wrong type or is outside its range.
    """

    seed: int = _knob(0, "seed of the data order, the probe split and the k-means starts", "run", 0)
    # Text
    max_prompts: int = _knob(2000, "prompts of each kind, at most; larger sets are sampled", "time", 20)
    max_prompt_tokens: int = _knob(256, "tokens; longer prompts keep their end", "memory", 8)
    max_answer_tokens: int = _knob(48, "tokens of a training answer", "memory", 1)
    refusals: str = _knob(
        "auto",
        "source of the refusal texts: own (the base's), builtin, or auto (own where the base refuses often enough)",
        "measured: unfamiliar wording costs small models more steps",
        choices=("auto", "own", "builtin"),
    )
    benign_targets: str = _knob(
        "self",
        "benign answers to keep: self (the base's own) or given (those in the prompt files)",
        "measured: own answers drift least",
        choices=("self", "given"),
    )
    # Probe and selection
    probe_batch: int = _knob(32, "prompts per forward pass", "memory", 1)
    probe_holdout: float = _knob(0.25, "share of prompts that score the probe", "convention", 0.05, 0.5)
    probe_c: float = _knob(0.1, "inverse L2 strength of the probe", "convention", 1e-6)
    probe_margin: float = _knob(0.1, "held-out accuracy over chance that a layer needs to be used", "convention", 0, 0.5)
    threshold: float = _knob(0.7, "|z| of a neuron's probe weight above which it is kept", "NeST; value measured", 0)
    # Clusters
    k_min: int = _knob(6, "fewest clusters per layer", "NeST (silhouette); value measured", 1)
    k_max: int = _knob(10, "most clusters per layer", "NeST (silhouette)", 1, 256)
    profile_prompts: int = _knob(1024, "prompts in an activation profile, at most", "memory", 8)
    # Tuning
    steps: int = _knob(300, "optimizer steps, at most", "measured", 1)
    batch: int = _knob(16, "prompts of each half (harmful, benign) per step", "measured", 1)
    learning_rate: float = _knob(0.1, "AdamW step in units of the patched matrix's RMS weight", "measured", 1e-9, 10)
    warmup: float = _knob(0.06, "share of the steps", "convention", 0, 1)
    weight_decay: float = _knob(0.0, "AdamW decay of the deltas", "convention", 0)
    clip: float = _knob(1.0, "gradient norm", "convention", 1e-6)
    benign_weight: float = _knob(1.0, "weight of the benign loss; the harmful loss weighs 1", "measured", 0)
    kl_weight: float = _knob(0.5, "weight of KL(base || patched) on benign answers; 0 disables it", "measured", 0)
    tune_holdout: float = _knob(0.1, "share of prompts whose loss decides when to stop", "convention", 0.02, 0.5)
    eval_every: int = _knob(25, "steps between held-out losses", "convention", 1)
    patience: int = _knob(4, "held-out losses without improvement before stopping", "convention", 1)
    # Output
    delta_dtype: str = _knob("BF16", "storage dtype of the deltas", "size", choices=("F32", "BF16", "F16"))
    device: str = _knob("auto", "cpu, cuda, mps or auto", "hardware")
    dtype: str = _knob(
        "auto",
        "arithmetic of the frozen model: auto is bfloat16 on an accelerator and float32 on a CPU",
        "hardware",
        choices=("auto", "float32", "bfloat16", "float16"),
    )

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            _check(knob, getattr(self, knob.name))
        if self.k_min > self.k_max:
            raise RecipeError(f"k_min is {self.k_min}, more than k_max, which is {self.k_max}")

    def as_json(self) -> dict[str, Any]:
        """All settings by name, as plain values."""
        return dataclasses.asdict(self)


# One source for the documentation of the settings: their metadata.
Recipe.__doc__ = (
    (Recipe.__doc__ or "")
    .rstrip()
    .replace(
        "    Raises:",
        "    Attributes:\n"
        + "".join(f"        {knob.name}: {knob.metadata['unit']}.\n" for knob in dataclasses.fields(Recipe))
        + "\n    Raises:",
    )
)


def _check(knob: dataclasses.Field[Any], value: Any) -> None:
    """Raises RecipeError for a value of the wrong type or outside the range of its setting."""
    expected = get_type_hints(Recipe)[knob.name]
    if type(value) is not expected:
        raise RecipeError(f"{knob.name} must be {expected.__name__}, got {value!r}")
    choices, low, high = (knob.metadata[key] for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise RecipeError(f"{knob.name} must be one of {', '.join(choices)}, got {value!r}")
    # Written so that NaN fails too.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise RecipeError(f"{knob.name} must be between {low} and {high if high is not None else 'any'}, got {value!r}")


def make_recipe(file: Path | None = None, assignments: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> Recipe:
    """Builds a recipe; later sources win.

    Args:
        file: A TOML file of settings.
        assignments: "key=value" texts.
        defaults: Settings by name that both override.

    Returns:
        The recipe.

    Raises:
        RecipeError: A setting is unknown, of the wrong type or out of range, or the file cannot be read.
    """
    values: dict[str, Any] = dict(defaults or {})
    known = get_type_hints(Recipe)
    if file is not None:
        try:
            # TOML distinguishes 1 from 1.0; `clip = 1` means the number.
            for name, value in tomllib.loads(read_text(file, MAX_FILE)).items():
                values[name] = float(value) if known.get(name) is float and type(value) is int else value
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RecipeError(f"cannot read the recipe {file}: {reason}") from error
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set takes key=value, got {assignment!r}")
        try:
            values[name] = known.get(name, str)(text)
        except ValueError:
            raise RecipeError(f"{name} must be {known[name].__name__}, got {text!r}") from None
    unknown = sorted(set(values) - set(known))
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise RecipeError(f"unknown setting: {', '.join(unknown)}", advice=meant + RecipeError.advice)
    return Recipe(**values)
