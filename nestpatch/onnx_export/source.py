"""Which weights an export starts from: the model as it is, or with a pack merged in memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch.errors import BusyError, PackContentError, UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats import nest
from nestpatch.formats.interface import Checkpoint
from nestpatch.formats.lora_onnx import Site
from nestpatch.formats.safetensors import SafetensorsCheckpoint
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from nestpatch.patcher.chain import Do, Step
from nestpatch.patcher.identity import State
from nestpatch.patcher.ledger import Entry, read_ledger
from nestpatch.patcher.merging import Means
from nestpatch.patcher.place import LEDGER, Place
from nestpatch.patcher.plan import make_plan, merged_blocks
from nestpatch.patcher.recovery import open_model
from nestpatch.patcher.work import plan_work
from nestpatch.rows import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that transformers reads beside weights."""


@dataclass(frozen=True, eq=False)
class Source:
    """A model on disk, the pack that is to be in the export, and what both make together. Nothing is loaded yet."""

    path: Path
    name: str
    checkpoint: Checkpoint
    place: Place
    pack: Pack | None
    strength: float
    steps: tuple[Step, ...]
    """Empty where there is no pack, or the model has it already."""
    patches: tuple[dict[str, Any], ...]
    """The packs that the export holds, bottom first."""

    @property
    def folder(self) -> Path:
        """Where the configuration and the tokenizer are."""
        return self.path if self.path.is_dir() else self.path.parent

    def fingerprint(self) -> list[Any]:
        """Changes when something is written to the model."""
        states = [file.stat() for file in self.checkpoint.files]
        ledger = read_ledger(self.place.ledger).transaction
        return [*((state.st_ino, state.st_size, state.st_mtime_ns) for state in states), ledger]


def find_source(model: str | Path, pack: Pack | None, strength: float) -> Source:
    """Finds a model and checks that the pack is for it; the whole of a pack's rows is read, no torch is needed.

    Raises CheckpointError, ChainError, PackContentError; UnsupportedModelError for a model that is no safetensors model.
    """
    from nestpatch.nest_train.model import locate

    found = locate(model)
    checkpoint, place = open_model(found.path)
    if not isinstance(checkpoint, SafetensorsCheckpoint):
        raise UnsupportedModelError(f"{found.path} is no safetensors model", advice="Export the model that it was made from.")
    ledger = read_ledger(place.ledger)
    steps = plan_work(place, ledger, pack, strength).steps if pack is not None else ()
    if pack is None or not steps:
        return Source(found.path, found.model_id, checkpoint, place, pack, strength, (), tuple(_listed(ledger.applied)))
    if {step.do for step in steps} <= {Do.CHECK, Do.APPLY}:
        check_result(pack, checkpoint, strength)
    gone = {step.link for step in steps if step.do is Do.UNDO} - {step.link for step in steps if step.do is Do.REDO}
    own = {"name": pack.manifest.name, "version": pack.manifest.version, "pack_id": nest.pack_id(pack), "strength": strength}
    patches = (*_listed(entry for entry in ledger.applied if entry.link not in gone), own)
    return Source(found.path, found.model_id, checkpoint, place, pack, strength, tuple(steps), patches)


def check_result(pack: Pack, checkpoint: Checkpoint, strength: float) -> None:
    """Raises BaseMismatchError for another base, PackContentError when the merge gives other rows than the pack promises."""
    for tensor in make_plan(pack, checkpoint, strength).tensors:
        name = tensor.delta.name
        if tensor.state is not State.BASE or strength != 1:
            continue
        rows = (block.new for block in merged_blocks(pack, tensor.delta, strength, checkpoint, Means()))
        if digest(rows) != pack.manifest.result[name]:
            raise PackContentError(f"{name}: the merged rows are not those that {pack.label} promises")


def load(source: Source, scratch: Path, on_event: OnEvent = ignore) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 on the CPU, the pack merged by the merge rule in the dtype on disk.

    Where an applied pack has to be undone first, that happens in a copy at `scratch`, which is left there.

    Raises CheckpointError, UndoError.
    """
    from nestpatch.nest_train.fold import fold
    from nestpatch.nest_train.model import load_model

    path, pack = source.path, source.pack
    merged = pack is None or not source.steps
    if pack is not None and not {step.do for step in source.steps} <= {Do.CHECK, Do.APPLY}:
        on_event(Event("note", note="applied packs are undone in a temporary copy"))
        path, merged = _applied(source, pack, scratch, on_event), True
    on_event(Event("load", note=source.name))
    model, tokenizer = load_model(path, "cpu", "float32")
    # The graph is that of plain operators, and so is what it is compared with.
    model.set_attn_implementation("eager")
    if pack is not None and not merged:
        fold(model, source.checkpoint, pack, source.strength)
    return model, tokenizer


def _applied(source: Source, pack: Pack, scratch: Path, on_event: OnEvent) -> Path:
    """A patched copy that can be loaded: a directory, or a weight file with its config beside it."""
    target = scratch
    if source.path.is_file():
        scratch.mkdir()
        target = scratch / source.path.name
        for file in source.folder.iterdir():
            if file.suffix in _COMPANIONS and not file.name.endswith((".index.json", LEDGER)):
                shutil.copyfile(file, scratch / file.name)
    return apply(source.path, pack, target, strength=source.strength, on_event=on_event).output


@contextmanager
def unchanged(source: Source) -> Iterator[None]:
    """Raises BusyError at the end of the block when the model was written meanwhile."""
    before = source.fingerprint()
    yield
    if source.fingerprint() != before:
        raise BusyError(f"{source.path} was changed while it was exported")


def sites_of(source: Source, model: PreTrainedModel) -> dict[str, tuple[str, Site]]:
    """The feed-forward weights that can take a patch at run time: name on disk -> (name in the model, what it is on disk).

    Raises UnsupportedModelError for a model without feed-forward blocks that nestpatch knows.
    """
    from nestpatch.nest_train.model import find_mlps
    from nestpatch.nest_train.packing import disk_name

    sites = {}
    for block in find_mlps(model):
        for projection in block.projections:
            name = disk_name(projection.weight_name, source.checkpoint)
            rows, width = source.checkpoint.info(name).shape
            state = sha256()
            for part in source.checkpoint.read_all(name):
                state.update(part)
            sites[name] = (projection.weight_name, Site((rows, width), state.hexdigest()))
    return sites


def _listed(entries: Iterable[Entry]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield {"name": entry.name, "version": entry.version, "pack_id": entry.pack_id, "strength": entry.strength}
