"""`TensorDelta`: the change of one weight matrix, in clusters or of low rank. docs/nest-format.md is the normative text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import PackContentError
from nestpatch.rows import DTYPES, SKETCHES, FloatArray, Rows, low_rank
from nestpatch.values import dataclass

MAX_RANK = 256
"""Vectors of a change of low rank, at most."""
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*", re.ASCII)


def require(condition: bool, reason: str) -> None:
    """Checks a condition that a valid pack meets.

    Args:
        condition: What must be true.
        reason: What is wrong otherwise.

    Raises:
        PackContentError: It is not true.
    """
    if not condition:
        raise PackContentError(reason)


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The change of one weight matrix: of each row a shared vector (`cluster`), or a sum of vectors (`factors`)."""

    name: str
    delta: Rows
    """The vectors, F32, BF16 or F16 [clusters or rank, in_features]."""
    rows: npt.NDArray[Any]
    """The touched rows, int32 or int64 [neurons], sorted, unique."""
    sketch: npt.NDArray[np.float16]
    """Sketches of the base's rows, float16 [neurons, 4]."""
    cluster: npt.NDArray[Any] | None = None
    """Which vector each touched row gets, uint8 or uint16 [neurons]; None where there are factors."""
    factors: Rows | None = None
    """How much of each vector each touched row gets, F32, BF16 or F16 [neurons, rank]; None where there are clusters."""

    def __post_init__(self) -> None:
        name, neurons = self.name, self.rows.shape
        require(bool(_TENSOR_NAME.fullmatch(name)) and len(name) <= 256, f"{name[:100]!r} is not a tensor name")
        require(self.delta.dtype in DTYPES.values(), f"{name}:delta has dtype {self.delta.dtype}")
        require(self.rows.dtype in (np.int32, np.int64), f"{name}:rows has dtype {self.rows.dtype}")
        require(self.sketch.dtype == np.float16, f"{name}:sketch has dtype {self.sketch.dtype}")
        require(self.delta.ndim == 2 and min(self.delta.shape) > 0, f"{name}:delta has shape {list(self.delta.shape)}")
        require(len(neurons) == 1 and neurons[0] > 0, f"{name}:rows has shape {list(neurons)}")
        require(self.sketch.shape == (*neurons, SKETCHES), f"{name}:sketch has shape {list(self.sketch.shape)}")
        require(bool(np.isfinite(self.delta.astype(np.float32)).all()), f"{name}:delta holds NaN or infinity")
        require(bool(np.isfinite(self.sketch.astype(np.float32)).all()), f"{name}:sketch holds NaN or infinity")
        require(int(self.rows[0]) >= 0, f"{name}: row {int(self.rows[0])} is out of range")
        require(bool((self.rows[1:] > self.rows[:-1]).all()), f"{name}: rows are unsorted or repeated")
        if self.cluster is not None:
            require(self.factors is None, f"{name} has both clusters and factors")
            self._check_cluster(self.cluster)
        else:
            require(self.factors is not None, f"{name} has neither clusters nor factors")
            self._check_factors(np.asarray(self.factors))

    def _check_cluster(self, cluster: npt.NDArray[Any]) -> None:
        name = self.name
        require(cluster.dtype in (np.uint8, np.uint16), f"{name}:cluster has dtype {cluster.dtype}")
        require(cluster.shape == self.rows.shape, f"{name}: rows and cluster differ in length")
        # Not np.unique, which imports all of numpy.ma: every command that opens a pack would wait for that.
        counts = np.bincount(cluster, minlength=self.rank)
        require(len(counts) == self.rank, f"{name}: cluster {len(counts) - 1} has no delta; there are {self.rank}")
        idle = self.rank - np.count_nonzero(counts)
        require(not idle, f"{name}: {idle} of {self.rank} deltas have no row")

    def _check_factors(self, factors: Rows) -> None:
        name, shape = self.name, (self.neurons, self.rank)
        require(factors.dtype in DTYPES.values(), f"{name}:factors has dtype {factors.dtype}")
        require(self.rank <= MAX_RANK, f"{name} has rank {self.rank}; {MAX_RANK} is allowed")
        require(factors.shape == shape, f"{name}:factors has shape {list(factors.shape)}; rows and delta need {list(shape)}")
        sizes = np.abs(factors.astype(np.float32))
        require(bool(np.isfinite(sizes).all()), f"{name}:factors holds NaN or infinity")
        idle = int((sizes.max(axis=0) == 0).sum())
        require(not idle, f"{name}: {idle} of {self.rank} deltas have no row: their factors are zero")
        still = self.rows[sizes.max(axis=1) == 0].tolist()
        require(not still, f"{name}: row {next(iter(still), '')} does not change: its factors are zero")
        largest = np.abs(self.delta.astype(np.float32)).max(axis=1).astype(np.float64)
        bound = np.cumsum(sizes.max(axis=0).astype(np.float64) * largest)[-1]
        require(bool(bound <= np.finfo(np.float32).max), f"{name}: factors times delta may leave the range of float32")

    @property
    def rank(self) -> int:
        """Number of vectors: one a cluster, or the rank of the change."""
        return int(self.delta.shape[0])

    @property
    def clusters(self) -> int:
        """Number of clusters; 0 where there are factors."""
        return 0 if self.cluster is None else self.rank

    @property
    def neurons(self) -> int:
        """Number of changed rows."""
        return len(self.rows)

    def dense(self, start: int = 0, stop: int | None = None) -> FloatArray:
        """The change of each touched row, with the shared vectors written out.

        Args:
            start: First touched row, counted from 0 within `rows`.
            stop: End of the slice; None for all that follow.

        Returns:
            float32 [stop - start, in_features].
        """
        return self.dense_at(slice(start, stop))

    def dense_at(self, places: slice | npt.NDArray[np.integer[Any]]) -> FloatArray:
        """The change of some touched rows.

        Args:
            places: Which of them, counted from 0 within `rows`.

        Returns:
            float32 [places, in_features].
        """
        if self.factors is not None:
            return low_rank(self.factors[places], self.delta)
        dense: FloatArray = self.delta.astype(np.float32)[np.asarray(self.cluster)[places]]
        return dense

    def squared_norm(self) -> float:
        """The sum of the squares of all changes, without writing them out."""
        vectors = self.delta.astype(np.float64)
        if self.factors is None:
            counts = np.bincount(np.asarray(self.cluster), minlength=self.rank)
            return float(counts @ np.square(vectors).sum(axis=1))
        factors = self.factors.astype(np.float64)
        return float(np.vdot(factors.T @ factors, vectors @ vectors.T))

    def used(self, places: slice) -> npt.NDArray[np.int64]:
        """The vectors that change some touched rows.

        Args:
            places: Which of the touched rows.

        Returns:
            Their numbers, int64, sorted.
        """
        if self.factors is not None:
            return np.flatnonzero((self.factors[places] != 0).any(axis=0))
        return np.unique(np.asarray(self.cluster)[places]).astype(np.int64)

    def shares(self, places: slice, vectors: npt.NDArray[np.int64]) -> FloatArray:
        """How much of some vectors some touched rows get: the second factor of a LoRA.

        Args:
            places: Which of the touched rows.
            vectors: Numbers of vectors.

        Returns:
            float32 [places, vectors]: the factors, or a one where the vector is that of the row's cluster.
        """
        if self.factors is not None:
            return self.factors[places][:, vectors].astype(np.float32)
        one_hot: FloatArray = (np.asarray(self.cluster)[places, None] == vectors).astype(np.float32)
        return one_hot
