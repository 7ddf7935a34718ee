"""Which packs go together, and in which steps. Pure: no files, no network, no clock.

- A pack that is applied at the same strength is left alone; at another strength it is undone and applied anew.
- A pack with the name of an applied one replaces it: upwards freely, downwards only when that is allowed. The same version with
  other content is refused: a version means one content.
- A pack replaces those that it supersedes; one that an applied pack supersedes counts as a downgrade.
- Packs of other names stack. When they change rows in common, that has to be allowed; the new one is checked against the base
  below, and comes on top.
- What a pack requires must be applied, and stays as long as the pack does.
- Undoing goes from the top down as far as rows are shared, and what lay above is put back in the old order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from nestpatch.errors import ChainError, DowngradeError, OverlapError, RequirementError
from nestpatch.version import Version


@dataclass(frozen=True)
class Link:
    """What the rules need to know of a pack."""

    pack_id: str
    name: str
    version: str
    strength: float = 1.0
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"


class Do(Enum):
    """Kinds of steps."""

    UNDO = "undo"
    CHECK = "check that what lies below is the base"
    REDO = "apply again"
    APPLY = "apply"


@dataclass(frozen=True)
class Step:
    """One step of a transaction."""

    do: Do
    link: Link


Overlap = Callable[[Link, Link], bool]
"""Whether two packs change rows in common."""


def plan_apply(
    applied: Sequence[Link], new: Link, overlap: Overlap, *, allow_overlap: bool = False, allow_downgrade: bool = False
) -> tuple[Step, ...]:
    """The steps that add `new` to the applied packs (bottom first). None at all when it is there already.

    Raises ChainError, DowngradeError, OverlapError or RequirementError.
    """
    if any(link.pack_id == new.pack_id and link.strength == new.strength for link in applied):
        return ()
    replaced = [link for link in applied if _replaces(new, link, allow_downgrade=allow_downgrade)]
    kept = [link for link in applied if link not in replaced]
    _require(new, kept)
    for link in kept:
        _require(link, [*kept, new])
    clashing = [link for link in kept if overlap(new, link)]
    if clashing and not allow_overlap:
        raise OverlapError(f"{new.label} changes rows that {', '.join(link.label for link in clashing)} changed")
    undone = _unwind(applied, [*replaced, *clashing], overlap)
    redone = [link for link in kept if link in undone]
    return (
        *(Step(Do.UNDO, link) for link in reversed(undone)),
        Step(Do.CHECK, new),
        *(Step(Do.REDO, link) for link in redone),
        Step(Do.APPLY, new),
    )


def plan_revert(applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap) -> tuple[Step, ...]:
    """The steps that take packs away.

    Raises RequirementError when one that stays needs one that goes.
    """
    kept = [link for link in applied if link not in removed]
    for link in kept:
        _require(link, kept)
    undone = _unwind(applied, removed, overlap)
    redone = [link for link in kept if link in undone]
    return (*(Step(Do.UNDO, link) for link in reversed(undone)), *(Step(Do.REDO, link) for link in redone))


def _replaces(new: Link, old: Link, *, allow_downgrade: bool) -> bool:
    if old.pack_id == new.pack_id or old.pack_id in new.supersedes:
        return True
    if new.pack_id in old.supersedes:
        if not allow_downgrade:
            raise DowngradeError(f"{new.label} is superseded by {old.label}, which is applied")
        return True
    if old.name != new.name:
        return False
    before, after = Version.parse(old.version), Version.parse(new.version)
    if before == after:
        raise ChainError(
            f"another pack is applied as {old.label}: sha256 {old.pack_id[:12]}.., this one is {new.pack_id[:12]}..",
            advice="One version must mean one content: ask the publisher. `nestpatch diff OLD NEW` shows the difference.",
        )
    if after < before and not allow_downgrade:
        raise DowngradeError(f"{new.label} is older than {old.label}, which is applied")
    return True


def _require(link: Link, present: Sequence[Link]) -> None:
    missing = [pack_id for pack_id in link.requires if pack_id not in {other.pack_id for other in present}]
    if missing:
        raise RequirementError(
            f"{link.label} requires the pack {missing[0][:12]}.., which is not applied or would be taken away"
        )


def _unwind(applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap) -> list[Link]:
    """What has to be undone to take `removed` away, bottom first: they, and all above that share rows with what is undone."""
    undone: list[Link] = []
    for link in applied:
        if link in removed or any(overlap(link, below) for below in undone):
            undone.append(link)
    return undone
