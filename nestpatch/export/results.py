"""What the exporters return: where the output is, what it contains, and which packs were merged into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportedFile:
    """One file with weights, or the graph of a model."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ExportedGguf:
    """A GGUF file that was written, or with `dry_run` would be."""

    output: Path
    nbytes: int
    """0 after a dry run where llama.cpp chooses the type of each tensor."""
    sha256: str
    """Empty after a dry run."""
    tensors: int
    type: str
    """The file type of the weights: "BF16", "Q4_K_M"."""
    architecture: str
    """llama.cpp's name of it; empty after a dry run of llama.cpp's converter."""
    notes: tuple[str, ...]
    """How the model behaves differently in llama.cpp."""
    packs: tuple[str, ...] = ()
    """Labels of the packs in it, bottom first."""
    strength: float = 1.0
    """Of the pack that was merged by this export."""
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True)
class ExportedSafetensors:
    """A release that was written, or with `dry_run` would be."""

    output: Path
    """A directory, or a file where the model is one."""
    files: tuple[ExportedFile, ...]
    """The weight files; empty after a dry run."""
    nbytes: int
    """Of all weight files; 0 after a dry run."""
    tensors: int
    type: str
    """The dtypes of the weights: "BF16", "BF16/F32"."""
    notes: tuple[str, ...]
    """What was not copied."""
    packs: tuple[str, ...] = ()
    """Labels of the packs in it, bottom first."""
    strength: float = 1.0
    """Of the pack that was merged by this export."""
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True)
class Parity:
    """The largest differences of logits between a graph in onnxruntime and its model in transformers, both on a CPU."""

    type: str
    """What the graph's matrices are: fp32, fp16, int8 or int4."""
    plain: float
    """For one text."""
    padded: float
    """For a batch, padded at the left."""
    continued: float
    """For the same batch in three steps, the last of one token."""
    deviation: float
    """Standard deviation of the logits, the scale of all differences."""
    same: int
    """Positions, of `positions`, where both models predict the same token."""
    positions: int
    bound: float | None
    """The largest difference allowed; None for quantized graphs, whose differences are reported only."""

    @property
    def largest(self) -> float:
        """The largest of the three differences."""
        return max(self.plain, self.padded, self.continued)

    @property
    def passed(self) -> bool:
        """Whether all logits are finite and within the bound."""
        return math.isfinite(self.largest) and (self.bound is None or self.largest <= self.bound)


@dataclass(frozen=True)
class ExportedOnnx:
    """An ONNX directory that was written, or with `dry_run` would be."""

    output: Path
    files: tuple[ExportedFile, ...]
    """The graph and its data; empty after a dry run."""
    nbytes: int
    """Of these files; 0 after a dry run."""
    dtype: str
    """Of everything that is not quantized: fp32 or fp16."""
    bits: int | None
    """Of the quantized matrices: 4 or 8."""
    matrices: int
    """Number of quantized matrices."""
    architecture: str
    """The class in transformers; empty after a dry run."""
    adapter_weights: int
    """Number of weights that accept a pack at run time."""
    parity: tuple[Parity, ...]
    """The comparisons with transformers: of the graph in floats, then of the quantized one."""
    notes: tuple[str, ...]
    """How the files differ from the model."""
    packs: tuple[str, ...] = ()
    """Labels of the packs in it, bottom first."""
    strength: float = 1.0
    """Of the pack that was merged by this export."""
    seconds: float = 0.0
    dry_run: bool = False


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter that was written, or with `dry_run` would be."""

    pack: str
    """The pack's label."""
    pack_id: str
    strength: float
    """Contained in the adapter's numbers: load the adapter at scale 1."""
    format: str
    """"lora" (a directory for PEFT and vLLM), "gguf-lora" (a file for llama.cpp) or "onnx-adapter" (one for onnxruntime)."""
    output: Path
    matrices: int
    rank: int
    """The largest of any matrix: vLLM needs at least this --max-lora-rank."""
    nbytes: int
    seconds: float
    dry_run: bool = False
