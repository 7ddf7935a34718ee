"""What differs between two packs: the audit of an update. `nestpatch.compare.diff.diff` calls it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.delta import TensorDelta
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import row_blocks
from nestpatch.formats.manifest import canonical_json, manifest_json
from nestpatch.pack import Pack
from nestpatch.rows import Rows

SHOWN_ROWS = 5
"""Row numbers that a result names, at most."""
MAX_DEPTH = 8
"""Levels of a manifest that are compared field by field; deeper values are compared as a whole."""
_REPORTED_ELSEWHERE = ("name", "version", "base.tensors.", "result.tensors.")


@dataclass(frozen=True)
class PackTensorDiff:
    """How one tensor's change differs between two packs."""

    name: str
    kept: int
    """Rows that both change."""
    added: int
    removed: int
    changed: int
    """Kept rows with another delta."""
    relative: float | None
    """||B - A|| / ||A|| of the deltas of the kept rows; None where they cannot be compared."""
    clusters: tuple[int, int]
    """In A and in B."""
    ranks: tuple[int, int]
    """Of the changes of low rank in A and in B; 0 where there are clusters."""
    first_added: tuple[int, ...]
    first_removed: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """The tensor for `--json`."""
        return {
            "tensor": self.name,
            "kept_rows": self.kept,
            "added_rows": self.added,
            "removed_rows": self.removed,
            "changed_rows": self.changed,
            "relative": self.relative,
            "clusters_a": self.clusters[0],
            "clusters_b": self.clusters[1],
            "rank_a": self.ranks[0],
            "rank_b": self.ranks[1],
            "first_added": list(self.first_added),
            "first_removed": list(self.first_removed),
        }


@dataclass(frozen=True)
class FieldDiff:
    """A field of the manifest that differs. Lists are given as JSON text; None where a pack does not have the field."""

    field: str
    """Dotted: "method.recipe.threshold"."""
    a: str | float | bool | None
    b: str | float | bool | None


@dataclass(frozen=True)
class PackDiff:
    """What an update changes."""

    a: str
    """Name and version."""
    b: str
    ids: tuple[str, str]
    same_base: bool | None
    """Whether the tensors that both packs change are the same in both bases; None where no tensor is changed by both."""
    foreign: tuple[str, ...]
    """The tensors whose digests, shapes or dtypes differ between the bases."""
    tensors: tuple[PackTensorDiff, ...]
    fields: tuple[FieldDiff, ...]

    @property
    def identical(self) -> bool:
        """Whether both are the same pack."""
        return self.ids[0] == self.ids[1]

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "kind": "packs",
            "identical": self.identical,
            "packs": [self.a, self.b],
            "pack_ids": list(self.ids),
            "same_base": self.same_base,
            "other_base": list(self.foreign),
            "changed": [one.as_json() for one in self.tensors],
            "fields": [{"field": one.field, "a": one.a, "b": one.b} for one in self.fields],
        }


def compare_packs(a: Pack, b: Pack) -> PackDiff:
    """Compares two packs: which rows, deltas and manifest fields an update from A to B changes.

    Args:
        a: The old pack.
        b: The new pack.

    Returns:
        What differs. Equal packs are identical.
    """
    ours, theirs = ({delta.name: delta for delta in pack} for pack in (a, b))
    names, common = sorted({*ours, *theirs}), sorted(ours.keys() & theirs.keys())
    # The digest of the touched rows depends on which rows those are; the other three describe the base alone.
    facts = [{name: (i.shape, i.dtype, i.sha256) for name, i in pack.manifest.base.tensors.items()} for pack in (a, b)]
    foreign = tuple(name for name in common if facts[0][name] != facts[1][name])
    tensors = tuple(_compare_deltas(name, ours.get(name), theirs.get(name)) for name in names)
    same_base = not foreign if common else None
    ids = nest.pack_id(a), nest.pack_id(b)
    old, new = (dict(_flat(manifest_json(pack))) for pack in (a, b))
    pairs = ((name, old.get(name), new.get(name)) for name in sorted({*old, *new}))
    fields = tuple(FieldDiff(*pair) for pair in pairs if pair[1] != pair[2] and not pair[0].startswith(_REPORTED_ELSEWHERE))
    return PackDiff(a.label, b.label, ids, same_base, foreign, tensors, fields)


def _compare_deltas(name: str, ours: TensorDelta | None, theirs: TensorDelta | None) -> PackTensorDiff:
    before, after = (np.empty(0, np.int64) if d is None else d.rows.astype(np.int64) for d in (ours, theirs))
    kept, *where = np.intersect1d(before, after, assume_unique=True, return_indices=True)
    added, removed = np.setdiff1d(after, before), np.setdiff1d(before, after)
    changed, relative = 0, None
    if ours is not None and theirs is not None and ours.delta.shape[1] != theirs.delta.shape[1]:
        changed = len(kept)
    elif ours is not None and theirs is not None:
        change = base = 0.0
        for part in row_blocks(len(kept), 8 * ours.delta.shape[1]):
            pair = [d.dense_at(w[part]) for d, w in zip((ours, theirs), where, strict=True)]
            changed += int((pair[0] != pair[1]).any(axis=1).sum())
            changes, bases = squares(*pair)
            change, base = change + float(changes.sum()), base + float(bases.sum())
        relative = norm(change / base) if base > 0 else None
    clusters = 0 if ours is None else ours.clusters, 0 if theirs is None else theirs.clusters
    ranks = _low_rank(ours), _low_rank(theirs)
    first = [tuple(found[:SHOWN_ROWS].tolist()) for found in (added, removed)]
    return PackTensorDiff(name, len(kept), len(added), len(removed), changed, relative, clusters, ranks, *first)


def _low_rank(delta: TensorDelta | None) -> int:
    return 0 if delta is None or delta.factors is None else delta.rank


def _flat(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a JSON object."""
    if isinstance(value, dict) and value and depth < MAX_DEPTH:
        for key, entry in value.items():
            yield from _flat(entry, f"{path}.{key}" if path else key, depth + 1)
    else:
        yield path, canonical_json(value) if isinstance(value, (dict, list)) else value


Sums = npt.NDArray[np.float64]


def norm(total: float) -> float | None:
    """A Euclidean norm that JSON can hold.

    Args:
        total: The sum of squares, or a quotient of two such sums.

    Returns:
        The square root; None for infinity and NaN.
    """
    return math.sqrt(total) if math.isfinite(total) else None


def squares(ours: Rows, theirs: Rows) -> tuple[Sums, Sums]:
    """Sums of squares of B - A and of A, per row.

    Args:
        ours: Rows of A, [rows, elements], of any dtype.
        theirs: The same rows of B.

    Returns:
        float64 [rows] each; NaN for uint8, the bytes of a type without values.
    """
    if ours.dtype == np.uint8:
        return np.full(len(ours), np.nan), np.full(len(ours), np.nan)
    with np.errstate(over="ignore", invalid="ignore"):
        base = ours.astype(np.float64)
        change = theirs.astype(np.float64) - base
        return np.einsum("ij,ij->i", change, change), np.einsum("ij,ij->i", base, base)
