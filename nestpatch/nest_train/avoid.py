"""Neurons that other packs change, which a training leaves to them: packs that share no row stack, in any order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nestpatch.errors import CheckpointError, DataError
from nestpatch.evaluation.preconditions import already_held
from nestpatch.events import OnEvent, ignore
from nestpatch.gate import PackLike, look
from nestpatch.nest_train._neurons import Selection
from nestpatch.pack import Pack
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.weights import MlpBlock

BoolArray = npt.NDArray[np.bool_]


def read_avoided(packs: Iterable[PackLike], name: str, on_event: OnEvent = ignore) -> tuple[Pack, ...]:
    """Reads the packs whose rows a training avoids. They are only read, so they need not be signed.

    Args:
        packs: Files or channels.
        name: Of the pack that is trained.
        on_event: Receives the progress of a download.

    Returns:
        The packs.

    Raises:
        DataError: One has the name of the new pack, which would replace it.
        PackError: One is not a pack.
        SignatureError: A signature that one has is wrong.
    """
    found = tuple(look(pack, on_event=on_event).pack for pack in packs)
    for pack in found:
        if pack.manifest.name == name:
            raise DataError(
                f"the new pack is named {name}, as {pack.label} is: it would replace that pack, not join it",
                advice="Give the new pack another name: --name NAME.",
            )
    return found


def require_same_base(packs: Sequence[Pack], base: Path) -> None:
    """Checks that avoided packs are for the base of a training, which may hold them already.

    Args:
        packs: From `read_avoided`.
        base: The base on disk.

    Raises:
        DataError: One is for another model.
    """
    for pack in packs:
        try:
            already_held(base, pack)
        except CheckpointError as error:
            raise DataError(
                f"{pack.label}, whose rows are to be avoided, is not for {base}: {error}",
                advice="Leave --avoid out: rows of packs for other models mean nothing here.",
            ) from error


def taken_neurons(stored: StoredWeights, blocks: Sequence[MlpBlock], packs: Sequence[Pack]) -> list[BoolArray]:
    """Finds the neurons of a model of which packs change a row.

    Args:
        stored: The weights of the model.
        blocks: Some of its feed-forward blocks.
        packs: For this model.

    Returns:
        bool [neurons] of each block.

    Raises:
        CheckpointError: The model has no parameter for a tensor of a pack.
    """
    changed: dict[str, list[npt.NDArray[np.int64]]] = {}
    for delta in (delta for pack in packs for delta in pack):
        home = stored.home(delta.name)
        changed.setdefault(home.parameter, []).append(home.start + delta.rows.astype(np.int64))
    found = []
    for block in blocks:
        numbers, taken = np.arange(block.neurons), np.zeros(block.neurons, np.bool_)
        for projection in block.projections:
            rows = np.concatenate(changed.get(projection.weight_name, [np.empty(0, np.int64)]))
            for part in range(projection.parts):
                taken |= np.isin(projection.rows(numbers, part), rows)
        found.append(taken)
    return found


def without(selection: Selection, taken: BoolArray) -> Selection:
    """A selection without the neurons of other packs.

    Args:
        selection: Of one block.
        taken: bool [neurons of the block].

    Returns:
        The selection; the same where no neuron is taken.
    """
    free = ~taken[selection.neurons]
    if free.all():
        return selection
    reason = f"{selection.reason}, {int((~free).sum())} of them left to other packs"
    return replace(selection, neurons=selection.neurons[free], z=selection.z[free], reason=reason)
