"""A pack of a base brought to a fine-tune of that base: the same changes on the rows that were its rows.

A fine-tune of moderate length moves every row a little, and each stays the most similar row to what it was. Where that no
longer holds, the neuron may have moved, and the change of a row would land on something else.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nestpatch.compare.extract import described
from nestpatch.delta import TensorDelta
from nestpatch.errors import RestorationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import check_output
from nestpatch.formats.checkpoint import Checkpoint, IntArray, float_rows, row_blocks
from nestpatch.gate import PackLike, look
from nestpatch.pack import Label, Pack
from nestpatch.packing import pack_tensor
from nestpatch.patcher.plan import make_plan
from nestpatch.restore._models import open_models, require_alike
from nestpatch.restore._rows import Doubles, Made, norms, write_pack
from nestpatch.restore.result import Restored
from nestpatch.rows import FloatArray, Rows

_HELD = 0.5
"""Share of a pack's change from which a fine-tune holds it: then it was made from the patched model."""
_TIE = 1e-5
"""What another row's cosine must be higher by: products of float32 are not exact."""
_SHOWN = 3
"""Rows that an error names."""


def carry(
    pack: PackLike,
    tuned: str | Path,
    base: str | Path,
    output: str | Path,
    label: Label,
    *,
    refit: bool = False,
    rematch: bool = False,
    on_event: OnEvent = ignore,
) -> Restored:
    """Writes the pack that makes the changes of a pack in a fine-tune of its base.

    Args:
        pack: A pack for `base`: a file, a channel or a Pack. It need not be signed, but signatures that it has must be valid.
        tuned: A fine-tune of the unpatched base: the base of the new pack.
        base: The base of `pack`.
        output: The `.nest` file to write; must not exist.
        label: Name, version and other facts of the new pack.
        refit: Scales each delta by how much the norms of its rows changed.
        rematch: Where another row of the fine-tune is more similar to a row of the base, moves the change there. Otherwise
            such rows are refused.
        on_event: Called with the progress.

    Returns:
        What the new pack changes, and how many rows moved.

    Raises:
        DataError: The label is not valid.
        OutputError: The output exists or cannot be written.
        PackError: The pack cannot be read.
        SignatureError: A signature of the pack is not valid.
        BaseMismatchError: `base` is not the base of the pack.
        RestorationError: The models do not match, rows moved, or the fine-tune holds the pack already.
        CheckpointError: A model cannot be read.
        BusyError: Another process is writing one of the models.
    """
    label.check()
    output = Path(output)
    check_output(output)
    found = look(pack, on_event=on_event)
    models = open_models({"TUNED": tuned, "BASE": base})
    ours, theirs = models["TUNED"], models["BASE"]
    make_plan(found.pack, theirs)
    for delta in found.pack:
        require_alike(models, delta.name)
    _require_absent(found.pack, ours, theirs)
    homes = {}
    for number, delta in enumerate(found.pack, start=1):
        homes[delta.name] = _most_similar(ours, delta, float_rows(theirs, delta.name, delta.rows))
        on_event(Event("match", number, len(found.pack.deltas), delta.name))
    moved = _check_homes(found.pack, homes, rematch=rematch)
    made = []
    for number, delta in enumerate(found.pack, start=1):
        made.append(_carried(ours, theirs, delta, homes[delta.name], refit=refit))
        on_event(Event("pack", number, len(found.pack.deltas), delta.name))
    facts = {
        "carried": found.pack.label,
        "carried_id": found.pack_id,
        "carried_base": described(theirs.path)[0],
        "refit": refit,
        "moved": moved,
        "decisions": {
            "source": f"the changes of {found.pack.label}; what was measured for it does not hold here: measure anew"
        },
    }
    return write_pack("carry", ours, made, label, output, facts)


def _require_absent(pack: Pack, tuned: Checkpoint, base: Checkpoint) -> None:
    """Raises RestorationError when the fine-tune contains the change of the pack: twice would be too much."""
    along = whole = 0.0
    for delta in pack:
        for part in row_blocks(delta.neurons, 32 * delta.delta.shape[1]):
            rows = delta.rows[part]
            tuning = float_rows(tuned, delta.name, rows) - float_rows(base, delta.name, rows)
            change = delta.dense(part.start, part.stop).astype(np.float64)
            along += float(np.einsum("ij,ij->", tuning.astype(np.float64), change))
            whole += float(np.einsum("ij,ij->", change, change))
    if whole > 0 and along > _HELD * whole:
        raise RestorationError(
            f"{tuned.path} holds {100 * along / whole:.0f} % of the change of {pack.label}: it was tuned from the patched one",
            advice="Train a pack for it: nestpatch train. `restore transplant --extrapolate 0.5` gives back a little.",
        )


def _most_similar(tuned: Checkpoint, delta: TensorDelta, wanted: FloatArray) -> IntArray:
    """The rows of the fine-tune that are most similar to rows of the base, by cosine.

    Args:
        tuned: The fine-tune.
        delta: Says which matrix, and which rows of the base.
        wanted: These rows, float32 [neurons, in_features].

    Returns:
        int64 [neurons]: the same number wherever no other row is more similar.
    """
    info = tuned.info(delta.name)
    unit = _units(wanted)
    best, home = np.full(len(wanted), -np.inf), np.zeros(len(wanted), np.int64)
    own = np.einsum("ij,ij->i", unit, _units(float_rows(tuned, delta.name, delta.rows)))
    for part in row_blocks(info.rows, 16 * (info.shape[-1] + len(wanted))):
        cosines = unit @ _units(float_rows(tuned, delta.name, np.arange(part.start, part.stop))).T
        place = cosines.argmax(axis=1)
        value = cosines[np.arange(len(wanted)), place]
        better = value > best
        best, home = np.where(better, value, best), np.where(better, part.start + place, home)
    return np.where(best > own + _TIE, home, delta.rows.astype(np.int64))


def _units(rows: FloatArray) -> FloatArray:
    """Rows of length 1; rows of zeros stay zero."""
    lengths = norms(rows)[:, None]
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)


def _check_homes(pack: Pack, homes: dict[str, IntArray], *, rematch: bool) -> int:
    """How many rows moved. Raises RestorationError where they may not move, or where two meet."""
    moves = [(d.name, a, b) for d in pack for a, b in zip(d.rows.tolist(), homes[d.name].tolist(), strict=True) if a != b]
    if moves and not rematch:
        total = sum(delta.neurons for delta in pack)
        some = "; ".join(f"{name} row {a} is nearest to row {b}" for name, a, b in moves[:_SHOWN])
        raise RestorationError(
            f"{len(moves)} of {total} touched rows are no longer the most similar ones in the fine-tune: {some}",
            advice="--rematch moves their changes to the most similar rows. Or train a pack for this model: nestpatch train.",
        )
    for name, found in homes.items():
        numbers, counts = np.unique(found, return_counts=True)
        if (counts > 1).any():
            raise RestorationError(
                f"several touched rows of {name} are most similar to row {numbers[counts > 1][0]} of the fine-tune",
                advice="The fine-tune is too far from the base. Train a pack for it: nestpatch train.",
            )
    return len(moves)


def _carried(tuned: Checkpoint, base: Checkpoint, delta: TensorDelta, home: IntArray, *, refit: bool) -> Made:
    """The change of one matrix on the rows of the fine-tune."""
    order = np.argsort(home)
    values, factors = delta.delta, delta.factors
    if refit:
        sides = norms(float_rows(base, delta.name, delta.rows)), _norms_at(tuned, delta.name, home)
        values, factors = _refitted(delta, *sides)
    cluster, factors = (None if found is None else found[order] for found in (delta.cluster, factors))
    packed = pack_tensor(tuned, delta.name, home[order], values, cluster=cluster, factors=factors)
    return Made(packed, delta.neurons, moved=int((home != delta.rows).sum()))


def _norms_at(model: Checkpoint, name: str, rows: IntArray) -> Doubles:
    """Norms of rows that may be in any order."""
    order = np.argsort(rows)
    found = np.empty(len(rows))
    found[order] = norms(float_rows(model, name, rows[order]))
    return found


def _refitted(delta: TensorDelta, before: Doubles, after: Doubles) -> tuple[Rows, Rows | None]:
    """(vectors, factors): each row's factors times the quotient of its norms, or a cluster's vector times that of its rows."""
    if delta.factors is not None:
        return delta.delta, _scaled(delta.factors, _quotient(before, after))
    whole = [np.sqrt(np.bincount(np.asarray(delta.cluster), lengths**2).astype(np.float64)) for lengths in (before, after)]
    return _scaled(delta.delta, _quotient(whole[0], whole[1])), None


def _quotient(before: Doubles, after: Doubles) -> Doubles:
    """What was multiplied with; 1 where there was nothing."""
    return np.divide(after, before, out=np.ones_like(before), where=before > 0)


def _scaled(values: Rows, factor: Doubles) -> Rows:
    """Rows, each times a factor, in their dtype."""
    scaled: Rows = (values.astype(np.float64) * factor[:, None]).astype(values.dtype)
    return scaled
