"""The difference of two checkpoints as a pack: the deltas that turn a base into a tuned copy of it, bit for bit.

Public: `extract`. The search for the deltas is in `_intervals`; `nestpatch.packing` builds the pack from them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from nestpatch import __version__
from nestpatch.compare._intervals import Groups, delta_bounds
from nestpatch.compare.diff import CheckpointDiff, changed_rows, compare, is_pack
from nestpatch.errors import DataError, ExtractionError, PackContentError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.files.reading import MAX_JSON, read_text
from nestpatch.formats import nest
from nestpatch.formats.checkpoint import Checkpoint, row_blocks
from nestpatch.pack import Label, Pack
from nestpatch.packing import PackedTensor, build_pack, pack_tensor
from nestpatch.patcher.recovery import open_model
from nestpatch.rows import DTYPES

MAX_CLUSTERS = 65_535
"""Deltas of one tensor."""
MAX_BYTES = 1 << 31
"""Bytes of all deltas together: they are held in memory, and a pack of gigabytes is a model."""
_SHOWN = 3
"""Tensors that an error names."""


@dataclass(frozen=True)
class Extracted:
    """The result of an extraction."""

    difference: CheckpointDiff
    pack: Path
    """The file that was written."""
    label: str
    """Name and version of the pack."""
    pack_id: str
    nbytes: int
    """Size of the file."""
    rows: int
    clusters: int

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`: the difference, and the pack that was written.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            **self.difference.as_json(),
            "output": str(self.pack),
            "pack": self.label,
            "pack_id": self.pack_id,
            "bytes": self.nbytes,
            "rows": self.rows,
            "clusters": self.clusters,
        }


def extract(base: str | Path, tuned: str | Path, output: str | Path, label: Label, *, on_event: OnEvent = ignore) -> Extracted:
    """Compares two models and writes the pack that turns `base` into `tuned`.

    Args:
        base: The unpatched model: a directory, a weight file or a Hub id.
        tuned: A copy of it in which rows of weight matrices differ.
        output: The `.nest` file to write; must not exist.
        label: Name, version and other facts of the pack.
        on_event: Called with the progress.

    Returns:
        The difference, and where the pack is.

    Raises:
        DataError: The label is not valid, or one of the models is a pack.
        OutputError: The output exists or cannot be written.
        ExtractionError: No pack can express the difference.
        CheckpointError: A model cannot be read.
        BusyError: Another process is writing one of the models.
        JournalError: An interrupted change of one of the models cannot be undone.
    """
    label.check()
    for source in (base, tuned):
        if is_pack(source):
            raise DataError(
                f"{source} is a pack; a pack is extracted from two models", advice="To compare packs, leave out -o."
            )
    output = Path(output)
    check_output(output)
    models = open_model(base)[0], open_model(tuned)[0]
    found = compare(*models, on_event=on_event)
    pack = _extract_pack(*models, found, label, on_event)
    pack_id = nest.write(pack, output)
    rows, clusters = sum(delta.neurons for delta in pack), sum(delta.clusters for delta in pack)
    return Extracted(found, output, pack.label, pack_id, output.stat().st_size, rows, clusters)


def _extract_pack(base: Checkpoint, tuned: Checkpoint, found: CheckpointDiff, label: Label, on_event: OnEvent) -> Pack:
    """The pack for the difference that `compare` found between two models."""
    for model in (base, tuned):
        if model.converted:
            raise ExtractionError(
                f"{model.path} is a converted model; a pack is extracted from models in safetensors",
                advice="Extract the pack from the safetensors models; it can be applied to converted files then.",
            )
    _require_rows(found)
    tensors: list[PackedTensor] = []
    nbytes = 0
    try:
        for number, tensor in enumerate(found.changed, start=1):
            tensors.append(_extract_tensor(base, tuned, tensor.name, nbytes))
            nbytes += tensors[-1].delta.delta.nbytes
            on_event(Event("extract", number, len(found.changed), tensor.name))
        (model_id, architecture), (tuned_id, _) = described(base.path), described(tuned.path)
        method = {
            "name": "extracted",
            "nestpatch": __version__,
            "tuned": tuned_id,
            "tensors": len(tensors),
            "rows": sum(one.delta.neurons for one in tensors),
            "clusters": sum(one.delta.clusters for one in tensors),
            "decisions": {"source": f"turns {model_id} into {tuned_id}, exact at strength 1"},
        }
        return build_pack(tensors, label, model_id=model_id, architecture=architecture, method=method)
    except PackContentError as error:
        raise ExtractionError(f"no pack can express this difference: {error}") from error


def _require_rows(found: CheckpointDiff) -> None:
    """Raises ExtractionError when the difference is more than changed rows of weight matrices."""
    if found.identical:
        raise ExtractionError(f"{found.a} and {found.b} hold the same weights", advice="There is nothing to extract.")

    odd = [tensor for tensor in found.changed if tensor.dtype not in DTYPES or len(tensor.shape) not in (2, 3)]
    what, texts = "changed tensors have no rows that a pack can change", [f"{t.name} ({t.dtype} {list(t.shape)})" for t in odd]
    if found.mismatches:
        what = "tensors do not match"
        texts = [f"{m.name}: {m.what} {m.a}{' and ' if m.a and m.b else ''}{m.b}" for m in found.mismatches]
    if texts:
        more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
        raise ExtractionError(f"{len(texts)} {what}: {'; '.join(texts[:_SHOWN])}{more}")


def _extract_tensor(base: Checkpoint, tuned: Checkpoint, name: str, nbytes: int) -> PackedTensor:
    """Finds the deltas of one tensor. `nbytes`: size of the deltas found before."""
    info = base.info(name)
    rows = changed_rows(base, tuned, name)
    groups = Groups(info.shape[-1])
    cluster = np.empty(len(rows), np.int64)
    wanted = sha256()
    # The arithmetic takes some arrays of eight bytes per element.
    for part in row_blocks(len(rows), 16 * info.row_bytes):
        before, after = base.read_rows(name, rows[part]), tuned.read_rows(name, rows[part])
        wanted.update(after.view(np.uint8).data)
        low, high = delta_bounds(before, after)
        if (empty := low > high).any():
            row, column = (int(place[0]) for place in np.nonzero(empty))
            old, new = float(before[row, column]), float(after[row, column])
            raise ExtractionError(
                f"{name}, row {rows[part][row]}, element {column}: no float32 delta takes {old!r} to {new!r} exactly under the "
                "merge rule",
                advice="The change of this element is too coarse for its new value, or not finite. Publish the whole model.",
            )
        for number in range(len(low)):
            cluster[part.start + number] = groups.place(low[number].astype(np.int32), high[number].astype(np.int32))
            if groups.count > MAX_CLUSTERS:
                raise ExtractionError(f"{name} needs more than {MAX_CLUSTERS} clusters: each row changed in its own way")
            if nbytes + 4 * groups.count * groups.width > MAX_BYTES:
                raise ExtractionError(f"the deltas up to {name} take more than {MAX_BYTES} bytes")
    packed = pack_tensor(base, name, rows, groups.deltas(), cluster=cluster)
    if packed.result != wanted.hexdigest():
        raise ExtractionError(f"{name}: the deltas do not give the tuned rows; did the models change during the extraction?")
    return packed


def described(path: Path) -> tuple[str, str]:
    """What a model is called, for people.

    Args:
        path: The model.

    Returns:
        (name of the model's folder, or of a file that has its own name; the class in config.json, or "").
    """
    place = Path(os.path.abspath(path))
    folder = place if place.is_dir() else place.parent
    name = folder.name if folder == place or place.stem == "model" else place.stem
    try:
        config = json.loads(read_text(folder / "config.json", MAX_JSON))
        return name, str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        return name, ""
