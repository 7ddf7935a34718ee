"""Which packs go together, and in which steps. Pure: no files, no network, no clock.

- A pack that is applied at the same strength is left alone; at another strength it is undone and applied anew.
- A pack with the name of an applied one replaces it: upwards freely, downwards only when that is allowed. The same version with
  other content is refused: a version means one content.
- A pack replaces those that it supersedes; one that an applied pack supersedes counts as a downgrade.
- Packs of other names stack. When they change rows in common, that has to be allowed; the new one is checked against the base
  below, and comes on top.
- A publisher speaks for itself alone. A pack replaces another one, by its name or by superseding it, only where one key signed
  both, or a channel's root key handed down to the other one's; what a pack requires holds up no other publisher's packs.
- What a pack requires must be applied, and stays as long as the pack does.
- A pack whose rows are found missing is undone where it is left, and applied again with those that replace it.
- Undoing goes from the top down as far as rows are shared, and what lay above is put back in the old order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from nestpatch.errors import ChainError, DowngradeError, OverlapError, PublisherError, RequirementError
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
    publishers: frozenset[str] = field(default=frozenset(), compare=False)
    """Key ids in whose name the pack speaks: of its signers, and of its channel's root keys. Empty: nobody's."""

    def may_answer_for(self, other: Link) -> bool:
        """Whether the same publisher speaks in both. A pack that nobody signed is anybody's."""
        return not other.publishers or bool(self.publishers & other.publishers)

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}"


class Action(Enum):
    """Kinds of steps."""

    UNDO = "undo"
    CHECK = "check that what lies below is the base"
    REDO = "apply again"
    APPLY = "apply"


@dataclass(frozen=True)
class Step:
    """One step of a transaction."""

    action: Action
    link: Link


Overlap = Callable[[Link, Link], bool]
"""Whether two packs change rows in common."""


@dataclass(frozen=True)
class Allowed:
    """What the rules forbid unless the user asks for it."""

    overlap: bool = False
    """Two packs that change the same rows."""
    downgrade: bool = False
    """An older version in the place of a newer one."""
    other_publisher: bool = False
    """A pack in the place of another publisher's."""


NOTHING = Allowed()


def plan_apply(
    applied: Sequence[Link], new: Link, overlap: Overlap, allowed: Allowed = NOTHING, lost: Sequence[Link] = ()
) -> tuple[Step, ...]:
    """The steps that add `new` to the applied packs (bottom first). None at all when it is there already.

    `lost`: applied packs whose rows are missing, at least in part.

    Raises ChainError, DowngradeError, OverlapError, PublisherError or RequirementError.
    """
    if any(link.pack_id == new.pack_id and link.strength == new.strength and link not in lost for link in applied):
        return _repair(applied, lost, overlap)
    replaced = [link for link in applied if _replaces(new, link, allowed)]
    kept = [link for link in applied if link not in replaced]
    _require(new, kept)
    _keep_requirements([*kept, new], replaced)
    clashing = [link for link in kept if overlap(new, link)]
    if clashing and not allowed.overlap:
        raise OverlapError(f"{new.label} changes rows that {', '.join(link.label for link in clashing)} changed")
    undone = _unwind(applied, [*replaced, *clashing, *lost], overlap)
    redone = [link for link in kept if link in undone]
    return (
        *(Step(Action.UNDO, link) for link in reversed(undone)),
        Step(Action.CHECK, new),
        *(Step(Action.REDO, link) for link in redone),
        Step(Action.APPLY, new),
    )


def _repair(applied: Sequence[Link], lost: Sequence[Link], overlap: Overlap) -> tuple[Step, ...]:
    """The steps that put packs back whose rows are missing."""
    undone = _unwind(applied, lost, overlap)
    return (*(Step(Action.UNDO, link) for link in reversed(undone)), *(Step(Action.REDO, link) for link in undone))


def plan_revert(
    applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap, lost: Sequence[Link] = ()
) -> tuple[Step, ...]:
    """The steps that take packs away; those that stay and whose rows are missing are put back.

    Raises RequirementError when one that stays needs one of its own publisher's that goes.
    """
    kept = [link for link in applied if link not in removed]
    _keep_requirements(kept, removed)
    undone = _unwind(applied, [*removed, *lost], overlap)
    redone = [link for link in kept if link in undone]
    return (*(Step(Action.UNDO, link) for link in reversed(undone)), *(Step(Action.REDO, link) for link in redone))


def _replaces(new: Link, old: Link, allowed: Allowed) -> bool:
    if old.pack_id == new.pack_id:
        return True
    if old.pack_id not in new.supersedes and new.pack_id not in old.supersedes and old.name != new.name:
        return False
    if new.pack_id in old.supersedes and old.name != new.name and not old.may_answer_for(new):
        return False  # another publisher's word against this pack
    if not allowed.other_publisher and not new.may_answer_for(old):
        who, other = (", ".join(sorted(key[:12] for key in link.publishers)) or "nobody" for link in (new, old))
        raise PublisherError(f"{new.label} is signed by {who}, and would replace {old.label}, which is signed by {other}")
    return old.pack_id in new.supersedes or _is_newer(new, old, allowed)


def _is_newer(new: Link, old: Link, allowed: Allowed) -> bool:
    if new.pack_id in old.supersedes:
        if not allowed.downgrade:
            raise DowngradeError(f"{new.label} is superseded by {old.label}, which is applied")
        return True
    before, after = Version.parse(old.version), Version.parse(new.version)
    if before == after:
        raise ChainError(
            f"another pack is applied as {old.label}: sha256 {old.pack_id[:12]}.., this one is {new.pack_id[:12]}..",
            advice="One version must mean one content: ask the publisher. `nestpatch diff OLD NEW` shows the difference.",
        )
    if after < before and not allowed.downgrade:
        raise DowngradeError(f"{new.label} is older than {old.label}, which is applied")
    return True


def _require(link: Link, present: Sequence[Link]) -> None:
    missing = [pack_id for pack_id in link.requires if pack_id not in {other.pack_id for other in present}]
    if missing:
        raise RequirementError(
            f"{link.label} requires the pack {missing[0][:12]}.., which is not applied or would be taken away"
        )


def _keep_requirements(present: Sequence[Link], removed: Sequence[Link]) -> None:
    """Packs that stay hold what they require, except other publishers' packs: those go their own way."""
    going = {link.pack_id: link for link in removed}
    for link in present:
        held = tuple(pack_id for pack_id in link.requires if pack_id in going and link.may_answer_for(going[pack_id]))
        _require(replace(link, requires=held), present)


def _unwind(applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap) -> list[Link]:
    """What has to be undone to take `removed` away, bottom first: they, and all above that share rows with what is undone."""
    undone: list[Link] = []
    for link in applied:
        if link in removed or any(overlap(link, below) for below in undone):
            undone.append(link)
    return undone
