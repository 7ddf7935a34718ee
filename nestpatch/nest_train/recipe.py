"""`Recipe`: every setting of the method with its default, its unit, its range and its source; and the recipes that ship.

"NeST" is the paper arXiv 2602.16835, "NeuroStrike" its predecessor arXiv 2509.11864; "measured" refers to bench/LOG.md.
The defaults are the recipe `nest`. The others are files in recipes/, which state how they differ from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from nestpatch.errors import DataError, RecipeError
from nestpatch.evaluation.dose import parse_strengths
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
    max_answer_tokens: int = _knob(48, "tokens of an answer in an evaluation", "time", 1)
    trained_tokens: int = _knob(
        8, "tokens of a harmless answer that are trained: whether it refuses is decided at its start", "measured", 1
    )
    refusals: str = _knob(
        "builtin",
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
    probe_batch: int = _knob(64, "prompts per forward pass", "memory", 1)
    probe_holdout: float = _knob(0.25, "share of prompts that score the probe", "convention", 0.05, 0.5)
    probe_c: float = _knob(0.1, "inverse L2 strength of the probe", "convention", 1e-6)
    probe_margin: float = _knob(0.1, "held-out balanced accuracy over 0.5 that a layer needs", "convention", 0, 0.5)
    selector: str = _knob(
        "probe",
        "score of a neuron: probe (weight of a linear probe) or effect (difference of means in standard deviations)",
        "NeST, NeuroStrike; SafeNeuron (arXiv 2602.12158)",
        choices=("probe", "effect"),
    )
    threshold: float = _knob(2.0, "z-score above which a neuron is kept", "NeuroStrike: 3; value measured", 0)
    sign: str = _knob(
        "positive",
        "positive keeps neurons that respond to harmful prompts, both also those that respond to harmless ones",
        "NeuroStrike",
        choices=("positive", "both"),
    )
    first_layer: int = _knob(-1, "lowest patched layer, from 0; -1 chooses it by probe accuracy and cost", "measured", -1)
    # Clusters
    k_min: int = _knob(6, "fewest clusters per layer", "NeST (silhouette); value measured", 1)
    k_max: int = _knob(6, "most clusters per layer", "NeST (silhouette); value measured", 1, 256)
    profile_prompts: int = _knob(1024, "prompts in an activation profile, at most", "memory", 8)
    # Tuning
    steps: int = _knob(320, "optimizer steps, at most", "measured", 1)
    harmful_batch: int = _knob(6, "harmful prompts per step", "measured", 1)
    benign_batch: int = _knob(10, "benign prompts per step", "measured", 1)
    lookalike_batch: int = _knob(16, "look-alike prompts per step; without any, benign ones take their place", "measured", 0)
    learning_rate: float = _knob(0.1, "AdamW step in units of the patched matrix's RMS weight", "measured", 1e-9, 10)
    warmup: float = _knob(0.06, "share of the steps", "convention", 0, 1)
    weight_decay: float = _knob(0.0, "AdamW decay of the deltas", "convention", 0)
    clip: float = _knob(1.0, "gradient norm", "convention", 1e-6)
    first_token_weight: float = _knob(10.0, "weight of an answer's first token; the others weigh 1", "measured", 1e-3)
    benign_weight: float = _knob(0.0, "weight of the likelihood of harmless answers; refusals weigh 1", "measured", 0)
    kl_weight: float = _knob(6.0, "weight of the divergence from the base on harmless answers", "measured", 0)
    kl_direction: str = _knob(
        "reverse",
        "reverse is KL(patched || base), which counts refusals that the base would not give; forward is KL(base || patched)",
        "measured: greedy decoding refuses where a fifth of the probability does, which costs forward KL little",
        choices=("reverse", "forward"),
    )
    tune_holdout: float = _knob(0.1, "share of prompts that decide which step is kept", "convention", 0.02, 0.5)
    check_every: int = _knob(80, "steps between two looks at the held-out prompts", "convention", 1)
    check_prompts: int = _knob(
        48, "held-out prompts of each kind that are answered at each look; 0 looks at the loss alone", "time", 0
    )
    patience: int = _knob(4, "looks without improvement before stopping", "convention", 1)
    # Detector
    detector: bool = _knob(
        False,
        "whether the pack gets a detector of harmful prompts; such a pack is nest/2, which older readers refuse",
        "DSA (arXiv 2506.00166)",
    )
    detector_false_positives: float = _knob(
        0.05, "share of harmless prompts above the detector's threshold, for which it is calibrated", "convention", 1e-4, 0.5
    )
    # Output
    dose_strengths: str = _knob(
        "",
        "more strengths to measure the pack at, such as 0.5,0.75,1.25, each as long as its evaluation; empty: none",
        "time",
    )
    delta_dtype: str = _knob("BF16", "storage dtype of the deltas", "size", choices=("F32", "BF16", "F16"))
    device: str = _knob("auto", "cpu, cuda, mps or auto", "hardware")
    dtype: str = _knob(
        "auto",
        "arithmetic of the frozen model: auto is bfloat16 on an accelerator, and on a CPU that is faster with it",
        "hardware",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    load_in: str = _knob(
        "none",
        "bits of the frozen matrices in memory: 8bit and 4bit need bitsandbytes, and none keeps `dtype`",
        "memory: LLM.int8 (arXiv 2208.07339), QLoRA (arXiv 2305.14314)",
        choices=("none", "8bit", "4bit"),
    )
    shard: str = _knob(
        "auto",
        "on divides the frozen base between the processes of a launcher; auto does where it does not fit on one device",
        "memory: FSDP (arXiv 2304.11277)",
        choices=("auto", "on", "off"),
    )
    micro_batch: int = _knob(
        0, "prompts of a step that are computed at once; the step stays the same; 0 takes as many as fit", "memory", 0
    )
    checkpointing: str = _knob(
        "auto",
        "on computes activations again in the backward pass; auto does where not one prompt fits into memory otherwise",
        "memory: arXiv 1604.06174",
        choices=("auto", "on", "off"),
    )

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            _check(knob, getattr(self, knob.name))
        if self.dose_strengths:
            self.doses()
        if self.k_min > self.k_max:
            raise RecipeError(f"k_min is {self.k_min}, more than k_max, which is {self.k_max}")
        if self.shard == "on" and self.load_in != "none":
            raise RecipeError(f"shard=on does not divide a base in few bits (load_in={self.load_in})")

    def doses(self) -> tuple[float, ...]:
        """The strengths of `dose_strengths` that an evaluation does not measure anyway, in rising order.

        Raises:
            RecipeError: The setting names no strengths.
        """
        try:
            found = parse_strengths(self.dose_strengths) if self.dose_strengths else ()
        except DataError as error:
            raise RecipeError(f"dose_strengths: {error}", advice=error.advice) from error
        return tuple(strength for strength in found if strength not in (0, 1))

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


SHIPPED = ("nest", "fast", "lab")
"""The recipes that ship: for a release, for a few minutes on two cores, and for the lab model."""


def make_recipe(
    source: str | Path | None = None, assignments: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Recipe:
    """Builds a recipe; later sources win.

    Args:
        source: The name of a recipe that ships, or a TOML file of settings; a Path is always a file.
        assignments: "key=value" texts.
        defaults: Settings by name that the other two override.

    Returns:
        The recipe.

    Raises:
        RecipeError: A setting is unknown, of the wrong type or out of range, or the file cannot be read.
    """
    values: dict[str, Any] = dict(defaults or {})
    known = get_type_hints(Recipe)
    for name, value in _read(source).items():
        values[name] = value
        if known.get(name) is float and type(value) is int:  # TOML distinguishes 1 from 1.0; `clip = 1` means the number
            try:
                values[name] = float(value)
            except OverflowError as error:
                raise RecipeError(f"cannot read the recipe {source}: {name}: {error}") from error
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"--set takes key=value, got {assignment!r}")
        try:
            values[name] = _parsed(known.get(name, str), text)
        except ValueError:
            raise RecipeError(f"{name} must be {known[name].__name__}, got {text!r}") from None
    unknown = sorted(set(values) - set(known))
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise RecipeError(f"unknown setting: {', '.join(unknown)}", advice=meant + RecipeError.advice)
    return Recipe(**values)


def _parsed(kind: type, text: str) -> Any:
    """A value of a text; ValueError for a text that is none."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    return kind(text)


def _read(source: str | Path | None) -> Mapping[str, Any]:
    """The settings that a recipe changes: one that ships, or a file."""
    if source is None or source == "nest":
        return {}
    if source in SHIPPED:
        return tomllib.loads(files("nestpatch.nest_train").joinpath("recipes", f"{source}.toml").read_text("utf-8"))
    try:
        return tomllib.loads(read_text(Path(source), MAX_FILE))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        advice = f"The recipes that ship are {', '.join(SHIPPED)}; anything else names a TOML file."
        raise RecipeError(f"cannot read the recipe {source}: {reason}", advice=advice) from error
