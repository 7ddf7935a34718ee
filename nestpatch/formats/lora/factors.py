"""A pack as low-rank factors: what its two adapter formats, lora_peft and lora_gguf, share.

The shared vectors of a matrix are a LoRA already: change = b @ a, where `a` [rank, in_features] holds the vectors and
`b` [rows, rank] has a one where a row uses a vector. Nothing is approximated. The strength goes into `a`, in float32 as the
merge rule has it, so that an adapter is always loaded at scale 1 whatever its ranks are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nestpatch.errors import OutputError, PackContentError, UnsupportedModelError
from nestpatch.pack import TensorDelta
from nestpatch.rows import FloatArray

MAX_BYTES = 4 << 30
"""Of one factor: a pack of kilobytes may claim matrices of any size."""
MAX_EXPERTS = 65_536
"""Of one layer: more than any model has."""
MERGE_INSTEAD = "Merge the pack into the model instead: nestpatch apply MODEL PATCH"
_EMBEDDINGS = {"embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "word_embeddings", "token_embd"}


@dataclass(frozen=True, eq=False)
class Part:
    """Rows `first` .. `first + rows` of a pack's tensor: a matrix of the adapter, or one expert's share of it."""

    delta: TensorDelta
    first: int
    rows: int
    expert: int = 0

    @property
    def _touched(self) -> slice:
        start, stop = np.searchsorted(self.delta.rows, [self.first, self.first + self.rows])
        return slice(int(start), int(stop))

    @property
    def rank(self) -> int:
        """How many shared vectors these rows use."""
        return len(np.unique(self.delta.cluster[self._touched]))

    def fill(self, a: FloatArray, b: FloatArray, strength: float) -> None:
        """Writes the factors into zeros `a` [>= rank, in_features] and `b` [rows, >= rank]."""
        used, column = np.unique(self.delta.cluster[self._touched], return_inverse=True)
        with np.errstate(over="ignore"):
            a[: len(used)] = np.float32(strength) * self.delta.delta[used].astype(np.float32)
        if not np.isfinite(a).all():
            raise PackContentError(f"{self.delta.name}: the deltas leave the range of F32 at strength {strength}")
        b[self.delta.rows[self._touched].astype(np.int64) - self.first, column] = 1


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
        """The least that all parts can have; 0 where nothing changes."""
        return max((part.rank for part in self.parts), default=0)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of `a` and `b`: [rank, width] and [rows, rank], with the experts before them where there are any."""
        stack = () if self.experts is None else (self.experts,)
        return (*stack, rank, self.width), (*stack, self.rows, rank)

    def factors(self, rank: int, strength: float) -> tuple[FloatArray, FloatArray]:
        """`a` and `b`, padded with zeros to a rank. Raises PackContentError when the strength is too much for float32."""
        a, b = (np.zeros(shape, np.float32) for shape in self.shapes(rank))
        for part in self.parts:
            if self.experts is None:
                part.fill(a, b, strength)
            else:
                part.fill(a[part.expert], b[part.expert], strength)
        return a, b

    def nbytes(self, rank: int) -> int:
        """Of both factors. Raises OutputError for factors that nobody could load."""
        sizes = [4 * _product(shape) for shape in self.shapes(rank)]
        if max(sizes) > MAX_BYTES:
            raise OutputError(
                f"an adapter of rank {rank} for {self.name} would take {max(sizes) / 1e9:.1f} GB", advice=MERGE_INSTEAD
            )
        return sum(sizes)


def _product(numbers: Sequence[int]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


@dataclass(frozen=True)
class Written:
    """What an adapter holds. After a dry run `nbytes` counts its factors alone."""

    matrices: int
    rank: int
    """The largest."""
    nbytes: int


def size_of(matrices: Iterable[tuple[Matrix, int]]) -> Written:
    """Of matrices and their ranks, before anything is written. Raises OutputError when one is too large."""
    sized = [(rank, matrix.nbytes(rank)) for matrix, rank in matrices]
    return Written(len(sized), max(rank for rank, _ in sized), sum(nbytes for _, nbytes in sized))


def check_shape(delta: TensorDelta, shape: Sequence[int]) -> None:
    """Raises UnsupportedModelError for tensors that adapters do not reach."""
    if len(shape) == 3:
        if shape[0] > MAX_EXPERTS or (shape[1] % 2 and delta.name.removesuffix(".weight").endswith("gate_up_proj")):
            raise UnsupportedModelError(f"{delta.name} has shape {list(shape)}, which no stack of experts has")
        return
    module = delta.name.removesuffix(".weight")
    if module == delta.name:
        raise UnsupportedModelError(f"adapters change weights of modules, and {delta.name} is none", advice=MERGE_INSTEAD)
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise UnsupportedModelError(f"an adapter for the embedding {delta.name} is not supported", advice=MERGE_INSTEAD)


def require_experts(experts: int | None, delta: TensorDelta, number: int) -> int:
    """The number of experts per layer. Raises UnsupportedModelError where it is unknown or cannot be."""
    if experts is None:
        raise UnsupportedModelError(
            f"{delta.name} is one expert of its layer, and the pack does not say how many there are",
            advice="Give the model too: nestpatch export MODEL PATCH --to ...",
        )
    if number >= experts:
        raise UnsupportedModelError(f"{delta.name}: the model has {experts} experts", advice="Is this the pack's base?")
    return experts


def sync_size(file: Path) -> int:
    """Makes a written file durable; returns its size."""
    with open(file, "r+b") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size
