"""What the exporters return: where the output is, what it contains, and which packs were merged into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of --max-lora-rank that vLLM accepts."""


@dataclass(frozen=True)
class ExportedFile:
    """One file with weights, or the graph of a model."""

    name: str
    nbytes: int
    sha256: str

    def as_json(self, path: Path) -> dict[str, Any]:
        """The file for `--json`.

        Args:
            path: Where it is.
        """
        return {"path": str(path), "bytes": self.nbytes, "sha256": self.sha256}


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

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "output": str(self.output),
            "bytes": self.nbytes,
            "sha256": self.sha256 or None,
            "tensors": self.tensors,
            "type": self.type,
            "architecture": self.architecture,
            "notes": list(self.notes),
            "packs": list(self.packs),
            "strength": self.strength,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


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

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        is_file = self.output.is_file()
        return {
            "output": str(self.output),
            "files": [file.as_json(self.output if is_file else self.output / file.name) for file in self.files],
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "type": self.type,
            "notes": list(self.notes),
            "packs": list(self.packs),
            "strength": self.strength,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


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

    def as_json(self) -> dict[str, Any]:
        """The comparison for `--json`."""
        return {
            "type": self.type,
            "plain": self.plain,
            "padded": self.padded,
            "continued": self.continued,
            "deviation": self.deviation,
            "same": self.same,
            "positions": self.positions,
            "bound": self.bound,
            "passed": self.passed,
        }


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

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "output": str(self.output),
            "files": [file.as_json(self.output / file.name) for file in self.files],
            "bytes": self.nbytes,
            "dtype": self.dtype,
            "bits": self.bits,
            "matrices": self.matrices,
            "architecture": self.architecture,
            "adapter_weights": self.adapter_weights,
            "parity": [one.as_json() for one in self.parity],
            "notes": list(self.notes),
            "packs": list(self.packs),
            "strength": self.strength,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }


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

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`, without the model that the command was given.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "pack": self.pack,
            "pack_id": self.pack_id,
            "strength": self.strength,
            "format": self.format,
            "output": str(self.output),
            "bytes": self.nbytes,
            "matrices": self.matrices,
            "rank": self.rank,
            "seconds": self.seconds,
            "dry_run": self.dry_run,
        }
