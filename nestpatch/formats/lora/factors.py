"""A pack as low-rank factors, which the formats `peft` and `gguf` share.

The vectors of a matrix are a LoRA already: change = b @ a, where `a` [rank, in_features] holds the vectors and `b` [rows, rank]
the factors of a change of low rank, or a one where a row is in a vector's cluster. Nothing is approximated. `a` is multiplied
by the strength, in float32 as in the merge rule, so that an adapter is always loaded at scale 1 whatever its ranks are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import OutputError, PackContentError, UnsupportedModelError
from nestpatch.rows import FloatArray

MAX_BYTES = 4 << 30
"""Bytes of one factor: a pack of kilobytes may claim matrices of any size."""
_MAX_EXPERTS = 65_536
"""Experts of one layer: more than any model has."""
MERGE_INSTEAD = "Merge the pack into the model instead: nestpatch apply MODEL PACK"
_EMBEDDINGS = {"embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "word_embeddings", "token_embd"}


@dataclass(frozen=True, eq=False)
class Part:
    """Rows `first` .. `first + rows` of a pack's tensor: a matrix of the adapter, or one expert's part of it."""

    delta: TensorDelta
    first: int
    rows: int
    expert: int = 0

    def touched(self) -> slice:
        """Which rows of the delta are in this part.

        Returns:
            A slice of `delta.rows`.
        """
        start, stop = np.searchsorted(self.delta.rows, [self.first, self.first + self.rows])
        return slice(int(start), int(stop))


@dataclass(frozen=True, eq=False)
class Matrix:
    """One matrix of an adapter, or the stacked matrices of `experts`."""

    name: str
    rows: int
    width: int
    parts: tuple[Part, ...]
    experts: int | None = None

    @property
    def rank(self) -> int:
        """The least rank that all parts fit into; 0 where nothing changes."""
        return max((len(part.delta.used(part.touched())) for part in self.parts), default=0)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the factors.

        Args:
            rank: The rank to pad to.

        Returns:
            [rank, width] of `a` and [rows, rank] of `b`, each with the number of experts in front where there are any.
        """
        stack = () if self.experts is None else (self.experts,)
        return (*stack, rank, self.width), (*stack, self.rows, rank)

    def factors(self, rank: int, strength: float) -> tuple[FloatArray, FloatArray]:
        """Computes the factors.

        Args:
            rank: The rank to pad to, with zeros.
            strength: Multiplies `a`.

        Returns:
            `a` and `b`, float32, in the shapes of `shapes`.

        Raises:
            PackContentError: A delta times the strength is beyond float32.
        """
        a, b = (np.zeros(shape, np.float32) for shape in self.shapes(rank))
        for part in self.parts:
            delta, touched = part.delta, part.touched()
            part_a, part_b = (a, b) if self.experts is None else (a[part.expert], b[part.expert])
            used = delta.used(touched)
            with np.errstate(over="ignore"):
                part_a[: len(used)] = np.float32(strength) * delta.delta[used].astype(np.float32)
            if not np.isfinite(part_a).all():
                raise PackContentError(f"{delta.name}: the deltas leave the range of F32 at strength {strength}")
            part_b[delta.rows[touched].astype(np.int64) - part.first, : len(used)] = delta.shares(touched, used)
        return a, b


@dataclass(frozen=True)
class Written:
    """The size of an adapter. After a dry run `nbytes` counts its factors only."""

    matrices: int
    rank: int
    """The largest of its matrices."""
    nbytes: int


def size_of(matrices: Iterable[tuple[Matrix, int]]) -> Written:
    """The size of an adapter, before anything is written.

    Args:
        matrices: Each with its rank.

    Returns:
        The size of its factors.

    Raises:
        OutputError: A factor is larger than MAX_BYTES.
    """
    ranks, nbytes = [], 0
    for matrix, rank in matrices:
        sizes = [4 * math.prod(shape) for shape in matrix.shapes(rank)]
        if max(sizes) > MAX_BYTES:
            raise OutputError(
                f"an adapter of rank {rank} for {matrix.name} would take {max(sizes) / 1e9:.1f} GB", advice=MERGE_INSTEAD
            )
        ranks.append(rank)
        nbytes += sum(sizes)
    return Written(len(ranks), max(ranks), nbytes)


def check_shape(delta: TensorDelta, shape: Sequence[int]) -> None:
    """Checks that adapters can change a tensor.

    Args:
        delta: The tensor's part of a pack.
        shape: Its shape in the base.

    Raises:
        UnsupportedModelError: It is an embedding, not the weight of a module, or not a stack of experts.
    """
    if len(shape) == 3:
        if shape[0] > _MAX_EXPERTS or (shape[1] % 2 and delta.name.removesuffix(".weight").endswith("gate_up_proj")):
            raise UnsupportedModelError(f"{delta.name} has shape {list(shape)}, which is not the shape of a stack of experts")
        return
    module = delta.name.removesuffix(".weight")
    if module == delta.name:
        raise UnsupportedModelError(f"adapters change weights of modules, and {delta.name} is not one", advice=MERGE_INSTEAD)
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise UnsupportedModelError(f"an adapter for the embedding {delta.name} is not supported", advice=MERGE_INSTEAD)


def require_experts(experts: int | None, delta: TensorDelta, number: int) -> int:
    """Checks the number of experts per layer.

    Args:
        experts: The number; None where the model is not given.
        delta: A tensor of one expert.
        number: Which expert it is.

    Returns:
        The number.

    Raises:
        UnsupportedModelError: The number is unknown, or too small for the expert.
    """
    if experts is None:
        raise UnsupportedModelError(
            f"{delta.name} is one expert of its layer, and the pack does not say how many there are",
            advice="Give the model too: nestpatch export MODEL PACK --to ...",
        )
    if number >= experts:
        raise UnsupportedModelError(f"{delta.name}: the model has {experts} experts", advice="Is this the pack's base?")
    return experts


def sync_size(file: Path) -> int:
    """Makes a written file durable.

    Args:
        file: The file.

    Returns:
        Its size in bytes.

    Raises:
        OSError: It cannot be opened or synced.
    """
    with open(file, "r+b") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size
