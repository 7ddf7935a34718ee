"""What differs between two models, by tensor and row, or between two packs.

Public: `diff` for paths, `compare` for open checkpoints, and their results. Checkpoints are read side by side in blocks, so
memory does not grow with them. Only weights are compared, not the configuration or the tokenizer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nestpatch.compare.packs import PackDiff, Sums, compare_packs, norm, squares
from nestpatch.errors import CheckpointFormatError, DataError, QuantizationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.checkpoint import CHUNK, Checkpoint, IntArray, TensorInfo, row_blocks
from nestpatch.formats.safetensors import read_header
from nestpatch.gate import is_channel, look
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import DTYPES, Rows

SHOWN_ROWS = 5
"""Row numbers that a result names, at most."""
_VALUES: dict[str, np.dtype[Any]] = {
    **DTYPES,
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""Dtypes that are compared by value, also with each other, and have norms. Other dtypes are compared as bytes."""
_BYTES = np.dtype(np.uint8)
# The number of a layer is between separators: model.layers.7.mlp, blk.7.ffn_up, h/7/fc.
_LAYER = re.compile(r"(?:^|[./])(\d{1,6})(?=[./]|$)", re.ASCII)

_Difference = tuple[IntArray, Sums, Sums]
"""Numbers of changed rows, and for each the sums of squares of B - A and of A; NaN where there are no values."""


@dataclass(frozen=True)
class Mismatch:
    """A tensor that only one model has, or whose shape or dtype differs."""

    name: str
    what: str
    """"only in A", "only in B", "shape", "dtype" (values compared) or "dtype, not compared"."""
    a: str
    """The shape or dtype in A; empty where A has no such tensor."""
    b: str
    """The same in B."""

    def as_json(self) -> dict[str, Any]:
        """The tensor for `--json`."""
        return {"tensor": self.name, "what": self.what, "a": self.a, "b": self.b}


@dataclass(frozen=True)
class TensorDiff:
    """A tensor whose values differ. Norms are Euclidean, over the changed rows; None where the norm is not finite."""

    name: str
    dtype: str
    """In A."""
    shape: tuple[int, ...]
    rows: int
    """All rows of the tensor. A tensor of one dimension is one row; experts are flattened into the rows."""
    changed: int
    """Rows that differ."""
    first_rows: tuple[int, ...]
    """The numbers of the first SHOWN_ROWS of them."""
    relative: float | None
    """||B - A|| / ||A||."""
    largest: float | None
    """||B - A|| of the row that changed most."""
    largest_row: int
    """The number of that row."""

    def as_json(self) -> dict[str, Any]:
        """The tensor for `--json`."""
        return {
            "tensor": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "rows": self.rows,
            "changed_rows": self.changed,
            "first_rows": list(self.first_rows),
            "relative": self.relative,
            "largest": self.largest,
            "largest_row": self.largest_row,
        }


@dataclass(frozen=True)
class LayerChange:
    """The tensors of one layer together."""

    stack: str
    """The part of the tensor names before the number: "model.layers"."""
    layer: int
    changed: int
    rows: int

    def as_json(self) -> dict[str, Any]:
        """The layer for `--json`."""
        return {"stack": self.stack, "layer": self.layer, "rows": self.rows, "changed_rows": self.changed}


@dataclass(frozen=True)
class CheckpointDiff:
    """What differs between the weights of two models."""

    a: Path
    b: Path
    compared: int
    """Tensors whose values were compared."""
    mismatches: tuple[Mismatch, ...]
    changed: tuple[TensorDiff, ...]
    layers: tuple[LayerChange, ...]
    """All layers of all stacks, changed or not, in order."""

    @property
    def identical(self) -> bool:
        """Whether all weights are the same."""
        return not self.mismatches and not self.changed

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "kind": "checkpoints",
            "identical": self.identical,
            "a": str(self.a),
            "b": str(self.b),
            "compared": self.compared,
            "mismatches": [one.as_json() for one in self.mismatches],
            "changed": [one.as_json() for one in self.changed],
            "layers": [one.as_json() for one in self.layers],
        }


def is_pack(path: str | Path) -> bool:
    """Whether a path names a pack: by its ending, as a channel, or by the header of the file. Reads the header at most.

    Args:
        path: A path, a channel or a Hub id.

    Returns:
        False for anything else, including a path that does not exist.
    """
    if is_channel(path) or Path(path).suffix == ".nest":
        return True
    # os.path.isfile returns False where Path.is_file raises.
    if not os.path.isfile(path):  # noqa: PTH113
        return False
    try:
        return set(read_header(Path(path))[1]) == {"nest"}
    except CheckpointFormatError:
        return False


def diff(a: str | Path, b: str | Path, *, on_event: OnEvent = ignore) -> CheckpointDiff | PackDiff:
    """Compares two models or two packs.

    Packs need not be signed, but the signatures that they have must be valid.

    Args:
        a: A model (directory, weight file or Hub id), or a pack (file or hub://owner/name[@VERSION]).
        b: One of the same kind.
        on_event: Called with the progress.

    Returns:
        What differs, of the kind that was compared.

    Raises:
        DataError: One is a pack, the other a model.
        PackError: A pack is broken.
        SignatureError: A signature of a pack is not valid.
        CheckpointError: A model cannot be read.
        BusyError: Another process is writing one of the models.
        JournalError: An interrupted change of one of the models cannot be undone.
    """
    if is_pack(a) and is_pack(b):
        return compare_packs(look(a, on_event=on_event).pack, look(b, on_event=on_event).pack)
    if is_pack(a) or is_pack(b):
        raise DataError(
            f"one of {a} and {b} is a pack, the other a model: they cannot be compared",
            advice="Give two models or two packs. To compare a model with a pack: nestpatch verify MODEL PACK",
        )
    return compare(open_model(a)[0], open_model(b)[0], on_event=on_event)


def compare(a: Checkpoint, b: Checkpoint, *, on_event: OnEvent = ignore) -> CheckpointDiff:
    """Compares the weights of two open models, however they are divided into files.

    Args:
        a: The first model.
        b: The second model.
        on_event: Called once per tensor that both have.

    Returns:
        What differs, by tensor and by layer.

    Raises:
        CheckpointFormatError: A file ends before its tensors do.
    """
    ours, theirs = set(a.tensors()), set(b.tensors())
    mismatches = [Mismatch(name, "only in A", str(list(a.info(name).shape)), "") for name in ours - theirs]
    mismatches += [Mismatch(name, "only in B", "", str(list(b.info(name).shape))) for name in theirs - ours]
    changed: list[TensorDiff] = []
    rows: dict[str, tuple[int, int]] = {}
    common = sorted(ours & theirs)
    for number, name in enumerate(common, start=1):
        one, other = a.info(name), b.info(name)
        comparable = one.shape == other.shape
        if not comparable:
            mismatches.append(Mismatch(name, "shape", str(list(one.shape)), str(list(other.shape))))
        elif one.dtype != other.dtype:
            comparable = one.dtype in _VALUES and other.dtype in _VALUES
            mismatches.append(Mismatch(name, "dtype" if comparable else "dtype, not compared", one.dtype, other.dtype))
        if comparable:
            found = _compare_tensor(a, b, name)
            changed += [found] if found is not None else []
            rows[name] = found.changed if found is not None else 0, _shape(one)[0]
        on_event(Event("compare", number, len(common), name))
    mismatches.sort(key=lambda mismatch: mismatch.name)
    return CheckpointDiff(a.path, b.path, len(rows), tuple(mismatches), tuple(changed), _layers(rows))


def changed_rows(a: Checkpoint, b: Checkpoint, name: str) -> IntArray:
    """The rows of one tensor that differ between two models.

    Args:
        a: The first model.
        b: The second model.
        name: A tensor with the same shape in both.

    Returns:
        Row numbers, int64, sorted.

    Raises:
        CheckpointFormatError: A file ends inside the tensor.
    """
    found = [rows for rows, _, _ in _differences(a, b, name)]
    return np.concatenate([np.empty(0, np.int64), *found])


def _layers(rows: Mapping[str, tuple[int, int]]) -> tuple[LayerChange, ...]:
    """Sums (changed, rows) of tensors by the first number in their names."""
    sums: dict[tuple[str, int], tuple[int, int]] = {}
    for name, (changed, total) in rows.items():
        if found := _LAYER.search(name):
            key = name[: found.start()], int(found[1])
            before = sums.get(key, (0, 0))
            sums[key] = before[0] + changed, before[1] + total
    return tuple(LayerChange(*key, *sums[key]) for key in sorted(sums))


def _compare_tensor(a: Checkpoint, b: Checkpoint, name: str) -> TensorDiff | None:
    info = a.info(name)
    count, first = 0, list[int]()
    change = base = 0.0
    largest, largest_row = -1.0, 0
    for rows, changes, bases in _differences(a, b, name):
        count += len(rows)
        first += rows[: SHOWN_ROWS - len(first)].tolist()
        change, base = change + float(changes.sum()), base + float(bases.sum())
        # A row that became NaN changed most of all.
        sizes = np.where(np.isnan(changes), np.inf, changes)
        if sizes.max() > largest:
            largest, largest_row = float(sizes.max()), int(rows[sizes.argmax()])
    if not count:
        return None
    norms = norm(change / base) if base > 0 else None, norm(largest), largest_row
    return TensorDiff(name, info.dtype, info.shape, _shape(info)[0], count, tuple(first), *norms)


def _shape(info: TensorInfo) -> tuple[int, int]:
    """(rows, elements per row); elements are bytes where the dtype is not in _VALUES; one row where rows end inside a byte."""
    if not info.nbytes:
        return 0, 0
    size = _VALUES.get(info.dtype, _BYTES).itemsize
    rows = info.rows if info.nbytes % (info.rows * size) == 0 else 1
    return rows, info.nbytes // (rows * size)


class _Side:
    """One tensor of one model, read in order."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        self.info = checkpoint.info(name)
        self.unit = _VALUES.get(self.info.dtype, _BYTES)
        self._blocks = checkpoint.read_all(name)
        self._rest = memoryview(b"")

    def take(self, count: int) -> bytes:
        """The bytes of the next `count` elements. The blocks of a format may have any size."""
        parts, lacking = [], count * self.unit.itemsize
        while lacking:
            if not self._rest:
                self._rest = memoryview(next(self._blocks, b""))
            if not self._rest:
                raise CheckpointFormatError(f"{self.info.file} ends inside tensor {self.info.name}")
            parts.append(self._rest[:lacking])
            self._rest = self._rest[len(parts[-1]) :]
            lacking -= len(parts[-1])
        return b"".join(parts)


def _differences(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[_Difference]:
    """The changed rows of one tensor, block by block."""
    ours, theirs = _Side(a, name), _Side(b, name)
    rows, width = _shape(ours.info)
    # Norms take several arrays of eight bytes per element; so much smaller blocks keep each of them below CHUNK.
    size = 8 * max(ours.unit.itemsize, theirs.unit.itemsize)
    if width * size > CHUNK:
        yield from _wide_differences(ours, theirs, rows, width)
        return
    for part in row_blocks(rows, width * size):
        data = [side.take((part.stop - part.start) * width) for side in (ours, theirs)]
        if ours.unit == theirs.unit and data[0] == data[1]:
            continue
        x, y = np.frombuffer(data[0], ours.unit).reshape(-1, width), np.frombuffer(data[1], theirs.unit).reshape(-1, width)
        where = np.flatnonzero(_unlike(x, y).any(axis=1))
        if len(where):
            yield part.start + where, *squares(_numbers(x[where], ours.info), _numbers(y[where], theirs.info))


def _wide_differences(ours: _Side, theirs: _Side, rows: int, width: int) -> Iterator[_Difference]:
    """For rows that are longer than a block, such as a tensor of one huge dimension."""
    for row in range(rows):
        differs, change, base = False, np.zeros(1), np.zeros(1)
        for part in row_blocks(width, 8 * max(ours.unit.itemsize, theirs.unit.itemsize)):
            x, y = (np.frombuffer(side.take(part.stop - part.start), side.unit)[None] for side in (ours, theirs))
            differs |= bool(_unlike(x, y).any())
            changes, bases = squares(x, y)
            change, base = change + changes, base + bases
        if differs:
            yield np.array([row]), change, base


def _numbers(rows: Rows, info: TensorInfo) -> Rows:
    """The values of rows that are stored quantized; others as they are."""
    if info.dtype in _VALUES or info.codec is None:
        return rows
    try:
        return info.codec.decode(rows)
    except QuantizationError:  # a type that cannot be decoded: its bytes were compared
        return rows


def _unlike(ours: Rows, theirs: Rows) -> npt.NDArray[np.bool_]:
    """Where elements differ: in their bits, or in their values where the dtypes differ."""
    if ours.dtype == theirs.dtype:
        bits = f"u{ours.dtype.itemsize}"
        return np.asarray(ours.view(bits) != theirs.view(bits))
    wide = ours.astype(np.float64), theirs.astype(np.float64)
    return np.asarray((wide[0] != wide[1]) & ~(np.isnan(wide[0]) & np.isnan(wide[1])))
