"""Loading what is to be exported: the model as it is, or with a pack merged in memory by the merge rule."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from nestpatch.errors import CheckpointFormatError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._gguf import model_name
from nestpatch.export._merged import MergedCheckpoint
from nestpatch.export._source import ExportSource, Wanted
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.lora.onnx import AdapterInput
from nestpatch.patcher.state_dir import LEDGER
from nestpatch.runtimes.mlps import find_mlps
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import disk_name, fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Endings of the files that transformers reads beside weights."""


def load(wanted: Wanted, source: ExportSource, on_event: OnEvent = ignore) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 on the CPU; a pack is merged in the dtype on disk.

    Raises CheckpointFormatError.
    """
    path = source.checkpoint.path
    if path.is_file() and path != wanted.checkpoint.path:
        _accompany(path, wanted.checkpoint.path.parent)  # a patched copy has the weights alone
    on_event(Event("load", note=model_name(wanted.checkpoint.path)))
    model, tokenizer = load_model(path, "cpu", "float32")
    # The graph is that of plain operators, and so is what it is compared with.
    model.set_attn_implementation("eager")
    if isinstance(source.checkpoint, MergedCheckpoint) and wanted.pack is not None:
        fold(model, wanted.checkpoint, wanted.pack, wanted.strength)
    return model, tokenizer


def _accompany(weights: Path, folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix in _COMPANIONS and not file.name.endswith((".index.json", LEDGER)):
            shutil.copyfile(file, weights.parent / file.name)


def sites_of(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[str, AdapterInput]]:
    """The feed-forward weights that can take a patch at run time: name on disk -> (name in the model, what it is on disk).

    Raises UnsupportedModelError for a model without feed-forward blocks that nestpatch knows.
    """
    sites = {}
    for block in find_mlps(model):
        for projection in block.projections:
            name = disk_name(projection.weight_name, checkpoint)
            shape = checkpoint.info(name).shape
            if len(shape) != 2:
                raise CheckpointFormatError(f"{name} has shape {list(shape)} instead of two dimensions")
            sites[name] = (projection.weight_name, AdapterInput((shape[0], shape[1]), _digest(checkpoint.read_all(name))))
    return sites


def _digest(blocks: Iterable[bytes]) -> str:
    state = sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()
