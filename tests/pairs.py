"""Pairs of small models, and what is needed to compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from nestpatch.compare.diff import CheckpointDiff, diff
from tests.helpers import tiny_tensors, write_checkpoint

GATE = "model.layers.1.mlp.gate_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
F32 = np.dtype(np.float32)


def tensors_of(dtype: str = "BF16", **sizes: int) -> dict[str, np.ndarray]:
    return tiny_tensors(dtype=dtype, seed=0, **({"hidden": 16, "inter": 24, "layers": 2} | sizes))


def models(tmp_path: Path, b: Mapping[str, np.ndarray], *, dtype: str = "BF16", sharded: bool = False) -> tuple[Path, Path]:
    """The tiny model, and one with other tensors."""
    return write_checkpoint(tmp_path / "a", tensors_of(dtype)), write_checkpoint(tmp_path / "b", b, sharded=sharded)


def compared(a: Path, b: Path) -> CheckpointDiff:
    found = diff(a, b)
    assert isinstance(found, CheckpointDiff)
    return found


def small_blocks(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    for module in ("formats.checkpoint", "formats._rowio", "compare.diff"):
        monkeypatch.setattr(f"nestpatch.{module}.CHUNK", nbytes)
