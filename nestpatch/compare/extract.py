"""A Pack from two checkpoints: the deltas that take a base to a tuned copy of it, bit for bit.

For every element of a changed row, the float32 deltas that give exactly the tuned value under the merge rule are an interval:
both the addition and the rounding to the stored dtype are monotone. Rows whose intervals meet in every element share a delta.
Floats are handled by their places in the total order -inf < .. < -0 < +0 < .. < inf, so that intervals are pairs of integers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch import __version__
from nestpatch.compare.diff import CheckpointDiff, TensorDiff, changed_rows, compare, is_pack
from nestpatch.errors import DataError, ExtractionError, OutputError, PackContentError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.reading import MAX_JSON, read_text
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, IntArray, row_blocks
from nestpatch.pack import BaseIdentity, Label, Manifest, Pack, TensorDelta, TensorIdentity, creation_time
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import DTYPES, FloatArray, Rows, digest, merge, sketch

MAX_CLUSTERS = 65_535
MAX_BYTES = 1 << 31
"""Of all deltas together: they are held in memory, and a patch of gigabytes is a model."""
SHOWN = 3
"""Tensors that a refusal names."""
_PROBES = 16
"""Elements of a row that are compared with all groups before the others are compared with the few that are left."""
_TOP = int(np.finfo(np.float32).max.view(np.int32))
"""Place of the largest finite float32; that of the lowest is -1 - _TOP."""


@dataclass(frozen=True)
class Extracted:
    """What `extract_to` found and wrote."""

    difference: CheckpointDiff
    pack: Path
    pack_id: str
    nbytes: int
    """Of the file."""
    rows: int
    clusters: int

    def as_json(self) -> dict[str, Any]:
        """Plain values: those of the difference, and the pack's."""
        facts = {"pack": str(self.pack), "pack_id": self.pack_id, "bytes": self.nbytes, "clusters": self.clusters}
        return self.difference.as_json() | facts


def extract_to(
    base: str | Path, tuned: str | Path, output: str | Path, label: Label, *, on_event: OnEvent = ignore
) -> Extracted:
    """Compares two models and writes the pack that makes `tuned` of `base`.

    Raises DataError, CheckpointError (ExtractionError when no pack can do that), OutputError, BusyError or JournalError.
    """
    label.check()
    for source in (base, tuned):
        if is_pack(source):
            raise DataError(f"{source} is a pack: a pack is extracted from two models", advice="Leave -o out to compare packs.")
    # Before minutes of work: will there be a place for the result?
    if os.path.lexists(output) or not Path(output).absolute().parent.is_dir():
        raise OutputError(f"{output} exists already, or its directory does not")
    models = open_model(base)[0], open_model(tuned)[0]
    found = compare(*models, on_event=on_event)
    pack = extract(*models, found, label, on_event=on_event)
    pack_id = nest.write(pack, output)
    rows, clusters = sum(delta.neurons for delta in pack), sum(delta.clusters for delta in pack)
    return Extracted(found, Path(output), pack_id, Path(output).stat().st_size, rows, clusters)


def extract(base: Checkpoint, tuned: Checkpoint, found: CheckpointDiff, label: Label, *, on_event: OnEvent = ignore) -> Pack:
    """The pack that makes `tuned` of `base`; `found` is what `compare` found between them.

    Raises ExtractionError when no pack can do that, DataError for an impossible label.
    """
    label.check()
    for model in (base, tuned):
        if model.converted:
            raise ExtractionError(
                f"{model.path} was converted: a pack names tensors, and knows rows, as the safetensors model has them",
                advice="Extract the pack from the safetensors models; it can be applied to converted files then.",
            )
    _require_rows(found)
    deltas: list[TensorDelta] = []
    identities: dict[str, TensorIdentity] = {}
    results: dict[str, str] = {}
    nbytes = 0
    try:
        for number, tensor in enumerate(found.changed, start=1):
            delta, identities[tensor.name], results[tensor.name] = _extract_tensor(base, tuned, tensor.name, nbytes)
            deltas.append(delta)
            nbytes += delta.delta.nbytes
            on_event(Event("extract", number, len(found.changed), tensor.name))
        return Pack(_manifest(base, tuned, label, deltas, identities, results), tuple(deltas))
    except PackContentError as error:
        raise ExtractionError(f"no pack can hold this difference: {error}") from error


def _require_rows(found: CheckpointDiff) -> None:
    """Raises ExtractionError when the difference is more than changed rows of weight matrices."""
    if found.identical:
        raise ExtractionError(f"{found.a} and {found.b} hold the same weights", advice="There is nothing to extract.")
    if found.mismatches:
        texts = [f"{m.name}: {m.what} {m.a}{' and ' if m.a and m.b else ''}{m.b}" for m in found.mismatches]
        raise ExtractionError(f"{len(texts)} tensors are not alike: {_listed(texts)}")
    odd = [tensor for tensor in found.changed if not _has_rows(tensor)]
    if odd:
        texts = [f"{tensor.name} ({tensor.dtype} {list(tensor.shape)})" for tensor in odd]
        raise ExtractionError(f"{len(texts)} changed tensors have no rows that a pack can change: {_listed(texts)}")


def _has_rows(tensor: TensorDiff) -> bool:
    return tensor.dtype in DTYPES and len(tensor.shape) in (2, 3)


def _listed(texts: list[str]) -> str:
    return "; ".join(texts[:SHOWN]) + (f"; and {len(texts) - SHOWN} more" if len(texts) > SHOWN else "")


def _extract_tensor(base: Checkpoint, tuned: Checkpoint, name: str, nbytes: int) -> tuple[TensorDelta, TensorIdentity, str]:
    """(delta, identity of the base, digest of the result). `nbytes`: of deltas that there are already."""
    info = base.info(name)
    rows = changed_rows(base, tuned, name)
    groups = Groups(info.shape[-1])
    cluster = np.empty(len(rows), np.int64)
    # The arithmetic takes some arrays of eight bytes per element.
    for part in row_blocks(len(rows), 16 * info.row_bytes):
        before, after = base.read_rows(name, rows[part]), tuned.read_rows(name, rows[part])
        low, high = delta_bounds(before, after)
        _require_reachable(name, rows[part], before, after, low > high)
        for number in range(len(low)):
            cluster[part.start + number] = groups.place(low[number].astype(np.int32), high[number].astype(np.int32))
            _require_small(name, groups, nbytes)
    index = np.int32 if info.rows < 2**31 else np.int64
    small = np.uint8 if groups.count <= 256 else np.uint16
    deltas, sketches = groups.deltas(), []
    old, new, whole = sha256(), sha256(), sha256()
    for part in row_blocks(len(rows), 16 * info.row_bytes):
        before, after = base.read_rows(name, rows[part]), tuned.read_rows(name, rows[part])
        if digest([merge(before, deltas[cluster[part]])]) != digest([after]):
            raise ExtractionError(f"{name}: the deltas found do not give the tuned rows; did the models change meanwhile?")
        sketches.append(sketch(before))
        old.update(before.view(np.uint8).data)
        new.update(after.view(np.uint8).data)
    for block in base.read_all(name):
        whole.update(block)
    delta = TensorDelta(name, deltas, rows.astype(index), cluster.astype(small), np.concatenate(sketches))
    return delta, TensorIdentity(info.shape, info.dtype, whole.hexdigest(), old.hexdigest()), new.hexdigest()


def _require_reachable(name: str, rows: IntArray, before: Rows, after: Rows, empty: npt.NDArray[np.bool_]) -> None:
    """Raises ExtractionError, naming the element, where no delta gives the tuned value."""
    if not empty.any():
        return
    row, column = (int(place[0]) for place in np.nonzero(empty))
    old, new = float(before[row, column]), float(after[row, column])
    raise ExtractionError(
        f"{name}, row {rows[row]}, element {column}: no float32 delta takes {old!r} to {new!r} exactly under the merge rule",
        advice="The change of this element is too coarse beside its new value, or not finite. Publish the whole model.",
    )


def _require_small(name: str, groups: Groups, nbytes: int) -> None:
    if groups.count > MAX_CLUSTERS:
        raise ExtractionError(f"{name} needs more than {MAX_CLUSTERS} clusters: its rows changed each in their own way")
    if nbytes + 4 * groups.count * groups.width > MAX_BYTES:
        raise ExtractionError(f"the deltas up to {name} take more than {MAX_BYTES} bytes")


class Groups:
    """Rows gathered into groups that can share a delta, first fit, in the order in which they come."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        # [width, groups]: one element of all groups lies together, because that is what is searched.
        self._low = np.empty((width, 16), np.int32)
        self._high = np.empty((width, 16), np.int32)

    def place(self, low: npt.NDArray[np.int32], high: npt.NDArray[np.int32]) -> int:
        """Adds a row with these bounds, [width] each, to the first group that it fits, or to a new one. Returns its number."""
        group = self._fitting(low, high)
        if group is not None:
            self._low[:, group] = np.maximum(self._low[:, group], low)
            self._high[:, group] = np.minimum(self._high[:, group], high)
            return group
        if self.count == self._low.shape[1]:
            self._low, self._high = (np.concatenate([old, np.empty_like(old)], axis=1) for old in (self._low, self._high))
        self._low[:, self.count], self._high[:, self.count] = low, high
        self.count += 1
        return self.count - 1

    def _fitting(self, low: npt.NDArray[np.int32], high: npt.NDArray[np.int32]) -> int | None:
        # The narrowest intervals tell groups apart best; one around zero holds a quarter of all floats.
        spans = high.astype(np.int64) - low
        probes = np.argpartition(spans, _PROBES)[:_PROBES] if len(spans) > _PROBES else np.arange(len(spans))
        live = np.arange(self.count)
        for probe in probes:
            live = live[(self._low[probe, live] <= high[probe]) & (self._high[probe, live] >= low[probe])]
        for start in range(0, len(live), 64):
            part = live[start : start + 64]
            fits = ((self._low[:, part] <= high[:, None]) & (self._high[:, part] >= low[:, None])).all(axis=0)
            if fits.any():
                return int(part[fits.argmax()])
        return None

    def deltas(self) -> FloatArray:
        """One delta per group, float32 [groups, width]: zero where that will do, else the middle of what will do."""
        out = np.empty((self.count, self.width), np.float32)
        for part in row_blocks(self.count, 32 * self.width):
            low, high = self._low[:, part].T.astype(np.int64), self._high[:, part].T.astype(np.int64)
            ends = [floats(place, out.dtype).astype(np.float64) for place in (low, high)]
            middle = places(((ends[0] + ends[1]) / 2).astype(np.float32))
            # Places 0 and -1 are +0 and -0: they differ for a row that holds -0.
            zero = np.where((low <= 0) & (high >= 0), 0, -1)
            out[part] = floats(np.where((low <= zero) & (high >= zero), zero, middle), out.dtype)
        return out


def places(values: Rows) -> IntArray:
    """The places of floats of any size in their total order: 0 is +0, -1 is -0."""
    bits = values.view(f"i{values.dtype.itemsize}").astype(np.int64)
    ordered: IntArray = np.where(bits >= 0, bits, -1 - (bits & np.iinfo(f"i{values.dtype.itemsize}").max))
    return ordered


def floats(ordered: IntArray, dtype: np.dtype[Any]) -> Rows:
    """The floats at these places; what `places` undoes."""
    sign = 1 << (8 * dtype.itemsize - 1)
    return np.where(ordered >= 0, ordered, (-1 - ordered) | sign).astype(f"u{dtype.itemsize}").view(dtype)


def delta_bounds(before: Rows, after: Rows) -> tuple[IntArray, IntArray]:
    """The places of the lowest and highest float32 delta that takes each element to exactly its new bits.

    before, after: [rows, in_features] in one dtype of DTYPES. Where no delta does, or a value is not finite, the lowest is
    above the highest.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        wide = before.astype(np.float32)
        sums = _sums(after)
        low, high = _least(wide, sums[0]), _least(wide, sums[1] + 1) - 1
        usable = np.isfinite(wide) & np.isfinite(after.astype(np.float32))
    return np.where(usable, low, 1), np.where(usable, high, 0)


def _sums(after: Rows) -> tuple[IntArray, IntArray]:
    """The places of the lowest and highest float32 that round to these values."""
    if after.dtype == np.float32:
        return places(after), places(after)
    place = places(after)
    value, below, above = (floats(place + step, after.dtype).astype(np.float64) for step in (0, -1, 1))
    # Beyond the largest number, where the neighbour is infinite, rounding goes on as if there were one more.
    below, above = np.where(np.isinf(below), 2 * value - above, below), np.where(np.isinf(above), 2 * value - below, above)
    low, high = (places(((value + other) / 2).astype(np.float32)) for other in (below, above))
    # Ties go to the even neighbour.
    odd = after.view(np.int16) & 1
    # Half-way between -0 and +0 is +0, which rounds to itself.
    return low + odd, np.where(place == -1, -1, high - odd)


def _least(wide: FloatArray, target: IntArray) -> IntArray:
    """The place of the lowest finite float32 that, added to `wide`, gives one at `target` or above; _TOP + 1 for none."""
    ends = [floats(target - step, wide.dtype).astype(np.float64) for step in (0, 1)]
    guess = places(((ends[0] + ends[1]) / 2 - wide).astype(np.float32))
    # Nearly always right to a place or two; where it is not, as beside infinity, all floats are searched.
    low, high = np.clip(guess - 2, -1 - _TOP, _TOP), np.clip(guess + 2, -1 - _TOP, _TOP)
    low = np.where(_reaches(wide, low, target), -2 - _TOP, low)
    high = np.where(_reaches(wide, high, target), high, _TOP + 1)
    while (unsure := high - low > 1).any():
        middle = low[unsure] + (high[unsure] - low[unsure]) // 2
        enough = _reaches(wide[unsure], middle, target[unsure])
        low[unsure], high[unsure] = np.where(enough, low[unsure], middle), np.where(enough, middle, high[unsure])
    return high


def _reaches(wide: FloatArray, delta: IntArray, target: IntArray) -> npt.NDArray[np.bool_]:
    return np.asarray(places(wide + floats(delta, wide.dtype)) >= target)


def _manifest(
    base: Checkpoint,
    tuned: Checkpoint,
    label: Label,
    deltas: list[TensorDelta],
    identities: Mapping[str, TensorIdentity],
    results: Mapping[str, str],
) -> Manifest:
    names = [_model_name(checkpoint.path) for checkpoint in (base, tuned)]
    method = {
        "name": "extracted",
        "nestpatch": __version__,
        "tuned": names[1],
        "tensors": len(deltas),
        "rows": sum(delta.neurons for delta in deltas),
        "clusters": sum(delta.clusters for delta in deltas),
        "decisions": {"source": f"what makes {names[1]} of {names[0]}, exact at strength 1"},
    }
    dtype = "/".join(sorted({identity.dtype for identity in identities.values()}))
    return Manifest(
        name=label.name,
        version=label.version,
        description=label.description,
        license=label.license,
        created=creation_time(),
        base=BaseIdentity(names[0], "", _architecture(base.path), dtype, identities),
        result=results,
        method=method,
    )


def _model_name(path: Path) -> str:
    """A hint for people: the name of the model's folder, or of a file that has a name of its own."""
    place = Path(os.path.abspath(path))
    if place.is_dir():
        return place.name
    return place.parent.name if place.stem == "model" else place.stem


def _architecture(path: Path) -> str:
    try:
        file = (path if path.is_dir() else path.parent) / "config.json"
        config = json.loads(read_text(file, MAX_JSON))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""
