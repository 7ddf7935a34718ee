"""What a pack changes, as a map: layers x clusters, with the number of neurons and the norm of the shared vector in each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from nestpatch.delta import TensorDelta
    from nestpatch.pack import Pack

MOST_LAYERS, MOST_CLUSTERS = 128, 24
"""Lines and columns of the map, at most."""
SHADES = 5
"""Shades of a cell beside that of none."""
_NUMBER = re.compile(r"\d+", re.ASCII)


@dataclass(frozen=True)
class Cell:
    """One cluster of a layer.

    Attributes:
        neurons: Neurons that share its vector.
        norm: Euclidean norm of the shared vector, over all matrices of the layer.
        shade: From 1 to SHADES, by the number of neurons.
    """

    neurons: int
    norm: float
    shade: int


@dataclass(frozen=True)
class Layer:
    """One line of the map: matrices that change the same rows in the same clusters, or with the same rank.

    Attributes:
        name: Number of the layer, with that of the expert where there is one.
        matrices: What they are called in the layer.
        of: Rows of each matrix.
        neurons: Rows that change in each matrix.
        norm: Frobenius norm of the change, over all matrices.
        cells: By cluster; none where the change is of low rank.
        rank: Vectors of a change of low rank, which all rows share; 0 where there are clusters.
    """

    name: str
    matrices: tuple[str, ...]
    of: int
    neurons: int
    norm: float
    cells: tuple[Cell, ...]
    rank: int = 0


def layers(pack: Pack) -> list[Layer]:
    """Maps a pack.

    Args:
        pack: The pack.

    Returns:
        A line for each layer and expert in numeric order; two where its matrices change different rows.
    """
    groups: dict[tuple[tuple[int, ...], bytes, bytes, int], list[TensorDelta]] = {}
    for delta in pack:
        numbers = tuple(int(one) for one in _NUMBER.findall(delta.name))
        kind = (delta.cluster.tobytes(), 0) if delta.cluster is not None else (b"", delta.rank)
        groups.setdefault((numbers, delta.rows.tobytes(), *kind), []).append(delta)
    most = max((int(_counts(group[0]).max()) for group in groups.values() if group[0].clusters), default=0)
    found = []
    for key in sorted(groups):
        group = groups[key]
        matrices = tuple(_matrix(delta.name) for delta in group)
        of, norm = pack.manifest.base.tensors[group[0].name].matrix[0], sum(delta.squared_norm() for delta in group) ** 0.5
        cells = _cells(group, most) if group[0].clusters else ()
        found.append(Layer(".".join(map(str, key[0])) or "-", matrices, of, group[0].neurons, norm, cells, key[3]))
    return found


def _counts(delta: TensorDelta) -> npt.NDArray[np.int64]:
    """The neurons of each cluster."""
    return np.bincount(np.asarray(delta.cluster), minlength=delta.clusters)


def _cells(group: list[TensorDelta], most: int) -> tuple[Cell, ...]:
    """The clusters of matrices that have the same ones."""
    squares = np.sum([np.square(delta.delta.astype(np.float64)).sum(axis=1) for delta in group], axis=0)
    pairs = zip(_counts(group[0]).tolist(), squares.tolist(), strict=True)
    return tuple(Cell(many, square**0.5, max(1, -(-SHADES * many // most))) for many, square in pairs)


def _matrix(name: str) -> str:
    """The part of a tensor's name that says which matrix of the layer it is."""
    parts = [part for part in name.split(".") if part != "weight"]
    return parts[-1] if parts else name
