"""`Guard`: what a fine-tune of a patched model must leave alone. Needs numpy alone.

For each linear layer a guard holds an orthonormal basis Q [k, in_features] of the directions that harmful prompts use in its
inputs. A training keeps to the guard as long as it does not change W Q^T: then harmful prompts get the outputs that they got.

For each tensor that the pack changes a guard also holds the changed rows, a basis of the space that the deltas span there, and
the coordinates that the patched rows have in it. They tell the patched model from its base, whose rows differ from them by the
whole change of the pack, and from any other model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.errors import GuardFormatError, PackContentError
from nestpatch.formats.checkpoint import Checkpoint, float_rows
from nestpatch.pack import Pack
from nestpatch.rows import FloatArray, row_space

_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ORTHONORMAL = 1e-4
"""Largest error of a basis: rounding to float32 gives 1e-6."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise GuardFormatError(reason)


def _is_orthonormal(basis: FloatArray) -> bool:
    error = np.abs(basis.astype(np.float64) @ basis.T - np.eye(len(basis))).max()
    return bool(error <= _ORTHONORMAL)


@dataclass(frozen=True, eq=False)
class PatchedRows:
    """What a tensor of the patched model holds of the pack, by which the model is recognised.

    Raises:
        GuardFormatError: The parts contradict each other.
    """

    name: str
    """On disk."""
    shape: tuple[int, ...]
    """Of the whole tensor; the experts of a stacked one are counted as rows."""
    rows: npt.NDArray[np.int64]
    """The rows that the pack changes, [n], sorted, unique."""
    basis: FloatArray
    """Orthonormal [k, in_features]."""
    coordinates: FloatArray
    """Of the patched rows in the basis, [n, k]."""
    change: float
    """Euclidean norm of the pack's change of these rows."""

    def __post_init__(self) -> None:
        name, count, rank = self.name[:100], len(self.rows), len(self.basis)
        _require(len(self.shape) in (2, 3) and min(self.shape) > 0, f"{name}: impossible shape {list(self.shape)}")
        _require(self.rows.dtype == np.int64 and self.rows.ndim == 1 and count > 0, f"{name}: the rows are no list of numbers")
        _require(bool((np.diff(self.rows) > 0).all()), f"{name}: rows are unsorted or repeated")
        last = int(np.prod(self.shape[:-1], dtype=np.int64))
        _require(self.rows[0] >= 0 and self.rows[-1] < last, f"{name}: a row is out of range; the matrix has {last}")
        for array, shape in ((self.basis, (rank, self.shape[-1])), (self.coordinates, (count, rank))):
            _require(array.dtype == np.float32 and array.shape == shape, f"{name}: {list(array.shape)} should be {list(shape)}")
            _require(bool(np.isfinite(array).all()), f"{name} holds NaN or infinity")
        _require(0 < rank <= self.shape[-1], f"{name}: a basis of {rank} directions in {self.shape[-1]}")
        _require(_is_orthonormal(self.basis), f"{name}: the basis is not orthonormal")
        _require(bool(np.isfinite(self.change) and self.change > 0), f"{name}: the pack's change is {self.change}")

    @classmethod
    def of(cls, delta: TensorDelta, checkpoint: Checkpoint, strength: float) -> PatchedRows:
        """Reads what one tensor holds of the pack.

        Args:
            delta: The pack's change of it.
            checkpoint: The patched model.
            strength: At which the pack is in it.

        Raises:
            CheckpointError: The rows cannot be read.
        """
        rows, basis = delta.rows.astype(np.int64), row_space(delta.delta)
        coordinates = float_rows(checkpoint, delta.name, rows) @ basis.T
        change = strength * math.sqrt(delta.squared_norm())
        return cls(delta.name, checkpoint.info(delta.name).shape, rows, basis, coordinates, change)


@dataclass(frozen=True, eq=False)
class GuardedMatrix:
    """A weight matrix, and the directions of its inputs that it must go on mapping as it does.

    Raises:
        GuardFormatError: The parts contradict each other.
    """

    name: str
    """Of the parameter in transformers."""
    basis: FloatArray
    """Orthonormal [k, in_features]."""

    def __post_init__(self) -> None:
        name = self.name[:100]
        _require(self.basis.ndim == 2 and self.basis.dtype == np.float32, f"{name}: the inputs are no float32 matrix")
        rank, width = self.basis.shape
        _require(0 < rank <= width, f"{name}: {rank} directions of inputs in {width}")
        _require(bool(np.isfinite(self.basis).all()), f"{name} holds NaN or infinity")
        _require(_is_orthonormal(self.basis), f"{name}: the directions are not orthonormal")


@dataclass(frozen=True, eq=False)
class Guard:
    """What a fine-tune of a patched model must leave alone. `nestpatch.export_guard` makes it, `nestpatch.load_guard` reads it.

    Raises:
        GuardFormatError: The parts contradict each other.
    """

    pack: str
    """Label of the pack."""
    pack_id: str
    strength: float
    """At which the pack is in the model."""
    energy: float
    """Share of the energy of harmful prompts' inputs that the guarded directions hold."""
    prompts: int
    """How many harmful prompts these were."""
    tensors: tuple[PatchedRows, ...]
    """In the order of their names."""
    matrices: tuple[GuardedMatrix, ...]
    """In the order of their names."""

    def __post_init__(self) -> None:
        _require(bool(_SHA256.fullmatch(self.pack_id)), f"the id of the pack is not a SHA-256: {self.pack_id[:80]!r}")
        _require(0 < self.strength <= 2, f"strength {self.strength} is out of range")
        _require(0 < self.energy < 1, f"energy {self.energy} is out of range")
        _require(self.prompts > 0, f"{self.prompts} prompts are none")
        for what, parts in (("tensors", self.tensors), ("matrices", self.matrices)):
            names = [one.name for one in parts]
            _require(
                bool(names) and names == sorted(set(names)), f"a guard needs {what}, unique and in the order of their names"
            )

    @property
    def directions(self) -> float:
        """Mean share of the directions of a matrix's inputs that is guarded."""
        return float(np.mean([len(one.basis) / one.basis.shape[1] for one in self.matrices]))

    def as_json(self) -> dict[str, Any]:
        """The guard for `--json`, without its arrays.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "pack": self.pack,
            "pack_id": self.pack_id,
            "strength": self.strength,
            "matrices": len(self.matrices),
            "directions": self.directions,
            "energy": self.energy,
            "prompts": self.prompts,
        }


def patched_rows(pack: Pack, checkpoint: Checkpoint, strength: float) -> tuple[PatchedRows, ...]:
    """Reads what a model holds of a pack. Whether it does is not checked here.

    Args:
        pack: The pack.
        checkpoint: The patched model.
        strength: At which the pack is in it.

    Returns:
        One for each tensor, without those whose deltas are all zero.

    Raises:
        CheckpointError: The rows cannot be read.
        PackContentError: All deltas of the pack are zero.
    """
    deltas = [delta for delta in pack if delta.delta.astype(np.float32).any()]
    if not deltas:
        raise PackContentError(f"{pack.label} changes nothing: all its deltas are zero")
    return tuple(PatchedRows.of(delta, checkpoint, strength) for delta in deltas)
