"""Which packs a model should hold, whether its rows hold them, and which rows were changed since.

A ledger and the metadata of files only name packs. What is in the rows is decided by digests (`status`, `verify`), and where
these do not match, as after a fine-tune that was saved anew, by the pack's sketches or the base (`presence`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestpatch.errors import SignatureError
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.gate import Proven
from nestpatch.health.checks import Check, Health
from nestpatch.health.presence import Presence, presence
from nestpatch.pack import Pack
from nestpatch.patcher.status import AppliedPack, ReleasedPack
from nestpatch.patcher.verify import Verdict, Verification, verify
from nestpatch.signing.trust import Policy

LEAST_SHARE = 0.8
"""Share of a pack's change that must be in the rows."""
MOST_OVERWRITTEN = 0.1
"""Share of a pack's rows that may be overwritten."""
_SURE = 0.15
"""Standard error of the share up to which it decides."""
_AGAIN = "Apply the pack to the base again; a fine-tuned model needs a pack of its own: nestpatch train"


@dataclass(frozen=True, eq=False)
class KnownPack:
    """A pack that the user, the ledger or the files of a model name."""

    pack_id: str
    label: str
    version: str
    strength: float
    pack: Pack | None = None
    """None where there is no copy of it here."""
    given: Proven | None = None
    """The pack as the user named it."""
    refusal: SignatureError | None = None
    """Why the policy refuses the pack that the user named."""
    applied: AppliedPack | None = None
    """Its entry in the ledger, compared with the rows."""
    released: ReleasedPack | None = None
    """Its name in the metadata of the files, compared with the rows."""


@dataclass(frozen=True, eq=False)
class Rows:
    """What the rows hold of a pack."""

    checks: tuple[Check, ...]
    presence: Presence | None = None
    """None where digests answer for all rows, and where nothing can be compared."""


def rows_of_pack(
    known: KnownPack, others: Sequence[KnownPack], checkpoint: Checkpoint, base: Checkpoint | None, policy: Policy, problem: str
) -> Rows:
    """Checks whether a pack is in the rows of a model, and which of its rows were changed since.

    Args:
        known: The pack.
        others: The other packs: rows that they change too are not measured.
        checkpoint: The model.
        base: The pack's base; None: sketches decide where digests do not.
        policy: Whose signatures count.
        problem: Why the ledger could not be compared with the rows; empty where it was.

    Returns:
        The checks "pack" and "rows".

    Raises:
        CheckpointError: Rows cannot be read.
        StateError: The ledger is broken.
    """
    applied = known.applied
    if applied is not None and not problem and not applied.missing_in:
        return _held(known, applied)
    if known.pack is None:
        return _unproven(known, problem)
    found = verify(
        checkpoint.path, known.pack, strength=known.strength, base=_for_rounded(known.pack, checkpoint, base), policy=policy
    )
    if found.verdict is Verdict.PATCHED and found.by in ("", "digests"):
        count = sum(delta.neurons for delta in known.pack)
        by = "the digests in it" if found.by else "its undo record"
        return Rows(
            (
                Check("pack", Health.OK, f"{known.label} is in the rows, by {by}", pack=known.label),
                Check(
                    "rows", Health.OK, f"all {count} rows of {found.tensors} tensors are as it leaves them", pack=known.label
                ),
            )
        )
    measured = presence(known.pack, checkpoint, strength=known.strength, base=base, others=rows_of_all(others))
    return Rows((_pack_check(known, found, measured), _rows_check(known, measured)), measured)


def _held(known: KnownPack, applied: AppliedPack) -> Rows:
    """The checks of a pack whose rows are what the ledger records of them, or what the pack makes of them."""
    entry = applied.entry
    by = "the pack's own digests" if entry.foreign else "the digests that this machine recorded"
    at = "" if entry.strength == 1 else f" at strength {entry.strength:g}"
    count = sum(record.rows for record in entry.tensors.values())
    whole = Check("rows", Health.OK, f"all {count} rows of {len(entry.tensors)} tensors are as it left them", pack=known.label)
    if entry.base_mismatch_allowed:
        detail = f"{known.label} is in the rows{at}, but was applied onto another base than its own"
        advice = "Nobody has measured that: nestpatch doctor --measure"
        return Rows((Check("pack", Health.WARNING, detail, advice, known.label), whole))
    return Rows((Check("pack", Health.OK, f"{known.label} is in the rows{at}, by {by}", pack=known.label), whole))


def _unproven(known: KnownPack, problem: str) -> Rows:
    """The checks of a pack of which there is no copy here."""
    advice, released = "Give the pack: nestpatch doctor MODEL --pack PACK", known.released
    if released is not None and released.differences:
        detail = f"the files name {known.label}, and {len(released.differences)} tensors are not what they record of it"
    elif released is not None and released.consistent:
        detail = f"the files name {known.label}, and the rows are what they record of it: only the pack proves that it is there"
    elif released is not None:
        detail = f"the files name {known.label}, and record nothing that could be compared"
    else:
        detail = f"the ledger names {known.label}, and nothing here can confirm it: {problem or 'its copy is missing'}"
    return Rows((Check("pack", Health.FAILED, detail, advice, known.label),))


def _for_rounded(pack: Pack, checkpoint: Checkpoint, base: Checkpoint | None) -> Checkpoint | None:
    """The base, where rows are rounded and their float base tells more than their sketches."""
    names = [delta.name for delta in pack if checkpoint.has(delta.name)]
    if base is None or all(checkpoint.info(name).plain for name in names):
        return None
    return base if all(base.has(name) and base.info(name).plain for name in names) else None


def rows_of_all(packs: Sequence[KnownPack]) -> dict[str, npt.NDArray[np.int64]]:
    """Tensor -> the rows that some packs change, as far as there are copies of them here.

    Args:
        packs: The packs.
    """
    rows: dict[str, npt.NDArray[np.int64]] = {}
    for one in packs:
        for delta in one.pack or ():
            rows[delta.name] = np.union1d(rows.get(delta.name, np.empty(0, np.int64)), delta.rows.astype(np.int64))
    return rows


def _pack_check(known: KnownPack, found: Verification, measured: Presence) -> Check:
    label, named = known.label, "the ledger names it, and " if known.applied is not None else ""
    if found.verdict is Verdict.BASE:
        detail, advice = f"{named}they hold its base", f"nestpatch apply MODEL PACK --in-place applies {label}."
    elif measured.foreign:
        lack = (
            f"{len(measured.missing)} of its tensors are missing" if measured.missing else f"likeness {measured.likeness:.2f}"
        )
        detail, advice = f"{named}they are those of another model ({lack})", "Get the pack for this model."
    else:
        return _by_share(known, found, measured, named)
    return Check("pack", Health.FAILED, f"{label} is not in the rows: {detail}", advice, label)


def _by_share(known: KnownPack, found: Verification, measured: Presence, named: str) -> Check:
    """The check of a pack whose base, with changes, is in the rows: how much of its own change is there."""
    label, share, error = known.label, measured.share, measured.error
    if share is None or error is None or error > _SURE * known.strength:
        if found.verdict is Verdict.PATCHED:
            return Check("pack", Health.OK, f"{label} is in the rows, by {found.by}", pack=label)
        detail = f"nothing shows whether {label} is in the rows: {named}too much was changed to tell"
        return Check("pack", Health.FAILED, detail, "Give the base: --base MODEL", label)
    part = share / known.strength
    held = f"{named}they hold {part:.0%} of its change, give or take {1.96 * error / known.strength:.1%}, by {_by(measured)}"
    if part < LEAST_SHARE:
        return Check("pack", Health.FAILED, f"{label} is in the rows in part only: {held}", _AGAIN, label)
    if part > 1 / LEAST_SHARE:
        return Check("pack", Health.WARNING, f"{label} is in the rows too strongly: {held}", _AGAIN, label)
    return Check("pack", Health.OK, f"{label} is in the rows, not to the byte: {held}", pack=label)


def _rows_check(known: KnownPack, measured: Presence) -> Check:
    label, changed, lost = known.label, measured.changed, measured.overwritten
    part = (measured.share or 0.0) / known.strength
    if measured.foreign or part < LEAST_SHARE:
        return Check(
            "rows", Health.NOT_CHECKED, f"too little of {label} is in the rows to tell which were overwritten", pack=label
        )
    if changed is None or lost is None:
        return Check(
            "rows", Health.NOT_CHECKED, "single changed rows cannot be told from the rounding of this type", pack=label
        )
    if changed == 0:
        detail = f"none of {measured.rows} rows was visibly changed since {label} was applied"
        return Check("rows", Health.OK, detail, pack=label)
    touched = [one for one in measured.tensors if one.changed]
    most = max(touched, key=lambda one: (one.changed or 0) / max(1, one.rows))
    where = f"{len(touched)} of {len(measured.tensors)} tensors, most in {most.tensor} ({most.changed} of {most.rows})"
    size = f", by {measured.change:.0%} of the size of the delta" if measured.change is not None else ""
    detail = (
        f"{changed} of {measured.rows} rows were changed since {label} was applied{size}, {lost} of them overwritten: {where}"
    )
    if lost > MOST_OVERWRITTEN * measured.rows:
        return Check("rows", Health.FAILED, detail, _AGAIN, label)
    return Check("rows", Health.WARNING, detail, "Measure what is left of the refusals: nestpatch doctor --measure", label)


def _by(measured: Presence) -> str:
    return "comparison with the base" if measured.by == "base" else f"its {measured.by}"
