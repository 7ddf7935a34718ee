"""What a pack changes, as a map: layers x clusters, with the number of neurons and the norm of the shared vector in each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nestpatch.pack import Pack, TensorDelta

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
    """One line of the map: matrices that change the same rows in the same clusters.

    Attributes:
        name: Number of the layer, with that of the expert where there is one.
        matrices: What they are called in the layer.
        of: Rows of each matrix.
        neurons: Rows that change in each matrix.
        norm: Frobenius norm of the change, over all matrices.
        cells: By cluster.
    """

    name: str
    matrices: tuple[str, ...]
    of: int
    neurons: int
    norm: float
    cells: tuple[Cell, ...]


def layers(pack: Pack) -> list[Layer]:
    """Maps a pack.

    Args:
        pack: The pack.

    Returns:
        A line for each layer and expert in numeric order; two where its matrices change different rows.
    """
    groups: dict[tuple[tuple[int, ...], bytes, bytes], list[TensorDelta]] = {}
    for delta in pack:
        numbers = tuple(int(one) for one in _NUMBER.findall(delta.name))
        groups.setdefault((numbers, delta.rows.tobytes(), delta.cluster.tobytes()), []).append(delta)
    counted = {key: np.bincount(group[0].cluster, minlength=group[0].clusters) for key, group in groups.items()}
    most = max(int(counts.max()) for counts in counted.values())
    found = []
    for key in sorted(groups):
        group, counts = groups[key], counted[key]
        squares = np.sum([np.square(delta.delta.astype(np.float64)).sum(axis=1) for delta in group], axis=0)
        cells = tuple(
            Cell(int(many), float(np.sqrt(square)), max(1, -(-SHADES * int(many) // most)))
            for many, square in zip(counts, squares, strict=True)
        )
        matrices = tuple(_matrix(delta.name) for delta in group)
        of, norm = pack.manifest.base.tensors[group[0].name].matrix[0], float(np.sqrt(counts @ squares))
        found.append(Layer(".".join(map(str, key[0])) or "-", matrices, of, group[0].neurons, norm, cells))
    return found


def _matrix(name: str) -> str:
    """The part of a tensor's name that says which matrix of the layer it is."""
    parts = [part for part in name.split(".") if part != "weight"]
    return parts[-1] if parts else name
