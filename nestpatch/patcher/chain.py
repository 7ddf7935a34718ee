"""The version rules: which packs may be applied together, and in which steps. Pure: no files, no network, no clock.

- A pack that is already applied at the same strength is left alone. At another strength it is undone and applied again.
- A pack replaces the applied pack of the same name. A newer version may do so freely, an older one only with permission. The
  same version with different content is rejected: a version has exactly one content.
- A pack replaces the packs that it supersedes. A pack that an applied pack supersedes counts as a downgrade.
- Packs with different names stack. If they change the same rows, that needs permission; the new pack is then checked against
  the base below the others, and is applied on top of them.
- A publisher acts only on its own packs. A pack replaces another, by name or by superseding it, only if the two share a key:
  a signer's, or a root key in the hand-over chain of a channel. A requirement never keeps another publisher's pack applied.
- The packs that a pack requires must be applied, and remain applied as long as that pack does.
- A pack whose rows are missing is undone, then applied again or replaced.
- Packs are undone from the top down, together with every pack above that shares rows with them. Those that stay are applied
  again in their old order.

Public: `Link`, `Step`, `Action`, `Allowed`, `steps_to_apply`, `steps_to_revert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from enum import Enum
from typing import TypeAlias

from nestpatch.errors import ChainError, DowngradeError, OverlapError, PublisherError, RequirementError
from nestpatch.values import dataclass
from nestpatch.version import Version


@dataclass(frozen=True)
class Link:
    """One pack of a chain: the facts that the rules use."""

    pack_id: str
    """SHA-256 of the pack's bytes, hex."""
    name: str
    version: str
    strength: float = 1.0
    supersedes: tuple[str, ...] = ()
    """Pack ids."""
    requires: tuple[str, ...] = ()
    """Pack ids."""
    publishers: frozenset[str] = field(default=frozenset(), compare=False)
    """Key ids of the signers and of the channel's root keys. Empty: the pack is unsigned."""

    def has_authority_over(self, other: Link) -> bool:
        """Whether this pack may replace or keep the other one.

        Args:
            other: An applied pack, or one that is about to be applied.

        Returns:
            True if the two packs share a key, or if the other one is unsigned.
        """
        return not other.publishers or bool(self.publishers & other.publishers)

    @property
    def label(self) -> str:
        """Name and version, for messages."""
        return f"{self.name} {self.version}"


class Action(Enum):
    """What a step does with its pack."""

    UNDO = "undo"
    CHECK = "check the base of"
    REDO = "apply again"
    APPLY = "apply"


@dataclass(frozen=True)
class Step:
    """One step of a transaction."""

    action: Action
    link: Link


Overlap: TypeAlias = Callable[[Link, Link], bool]
"""Reports whether two packs change rows in common."""


@dataclass(frozen=True)
class Allowed:
    """What the user has permitted beyond the rules."""

    overlap: bool = False
    """Two packs may change the same rows."""
    downgrade: bool = False
    """An older version may replace a newer one."""
    other_publisher: bool = False
    """A pack may replace one of another publisher."""


NOTHING = Allowed()


def steps_to_apply(
    applied: Sequence[Link], new: Link, overlap: Overlap, allowed: Allowed = NOTHING, lost: Sequence[Link] = ()
) -> tuple[Step, ...]:
    """The steps that add a pack to those that are applied.

    Args:
        applied: The applied packs, bottom first.
        new: The pack to add.
        overlap: Reports whether two packs change rows in common.
        allowed: What the user has permitted.
        lost: The applied packs whose rows are missing from the model, at least in part.

    Returns:
        The steps in order. Empty if the pack is applied already and no rows are missing.

    Raises:
        DowngradeError: The pack is older than the one that it replaces, or superseded by it.
        OverlapError: An applied pack changes the same rows.
        PublisherError: The pack would replace one of another publisher.
        RequirementError: A required pack is not applied, or would be removed.
        ChainError: The version is applied with different content.
    """
    if any(link.pack_id == new.pack_id and link.strength == new.strength and link not in lost for link in applied):
        return steps_to_revert(applied, (), overlap, lost)
    replaced = [link for link in applied if _replaces(new, link, allowed)]
    kept = [link for link in applied if link not in replaced]
    _check_requirements(new, kept)
    _check_own_requirements([*kept, new], replaced)
    clashing = [link for link in kept if overlap(new, link)]
    if clashing and not allowed.overlap:
        raise OverlapError(f"{new.label} changes rows that {', '.join(link.label for link in clashing)} changed")
    undone = _unwind(applied, [*replaced, *clashing, *lost], overlap)
    return (
        *(Step(Action.UNDO, link) for link in reversed(undone)),
        Step(Action.CHECK, new),
        *(Step(Action.REDO, link) for link in kept if link in undone),
        Step(Action.APPLY, new),
    )


def steps_to_revert(
    applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap, lost: Sequence[Link] = ()
) -> tuple[Step, ...]:
    """The steps that remove packs, and put back those that stay but whose rows are missing.

    Args:
        applied: The applied packs, bottom first.
        removed: Those of them to remove. May be empty, to repair missing rows only.
        overlap: Reports whether two packs change rows in common.
        lost: The applied packs whose rows are missing from the model, at least in part.

    Returns:
        The steps in order.

    Raises:
        RequirementError: A pack that stays requires a removed pack of its own publisher.
    """
    kept = [link for link in applied if link not in removed]
    _check_own_requirements(kept, removed)
    undone = _unwind(applied, [*removed, *lost], overlap)
    return (
        *(Step(Action.UNDO, link) for link in reversed(undone)),
        *(Step(Action.REDO, link) for link in kept if link in undone),
    )


def _replaces(new: Link, old: Link, allowed: Allowed) -> bool:
    if old.pack_id == new.pack_id:
        return True
    if old.pack_id not in new.supersedes and new.pack_id not in old.supersedes and old.name != new.name:
        return False
    if new.pack_id in old.supersedes and old.name != new.name and not old.has_authority_over(new):
        return False  # another publisher's claim against this pack
    if not allowed.other_publisher and not new.has_authority_over(old):
        signer, other = (", ".join(sorted(key[:12] for key in link.publishers)) or "no key" for link in (new, old))
        raise PublisherError(f"{new.label} is signed by {signer}, and would replace {old.label}, which is signed by {other}")
    return old.pack_id in new.supersedes or _is_upgrade(new, old, allowed)


def _is_upgrade(new: Link, old: Link, allowed: Allowed) -> bool:
    """True for a newer version, and for a permitted downgrade. Everything else is an error."""
    if new.pack_id in old.supersedes:
        if not allowed.downgrade:
            raise DowngradeError(f"{new.label} is superseded by {old.label}, which is applied")
        return True
    before, after = Version.parse(old.version), Version.parse(new.version)
    if before == after:
        raise ChainError(
            f"another pack is applied as {old.label}: sha256 {old.pack_id[:12]}.., this one is {new.pack_id[:12]}..",
            advice="A version must have exactly one content: ask the publisher. `nestpatch diff OLD NEW` shows the difference.",
        )
    if after < before and not allowed.downgrade:
        raise DowngradeError(f"{new.label} is older than {old.label}, which is applied")
    return True


def _check_requirements(link: Link, present: Sequence[Link]) -> None:
    missing = [pack_id for pack_id in link.requires if pack_id not in {other.pack_id for other in present}]
    if missing:
        raise RequirementError(f"{link.label} requires the pack {missing[0][:12]}.., which is not applied or would be removed")


def _check_own_requirements(present: Sequence[Link], removed: Sequence[Link]) -> None:
    """Checks the packs that stay, but only for what they require of their own publisher."""
    going = {link.pack_id: link for link in removed}
    for link in present:
        own = tuple(pack_id for pack_id in link.requires if pack_id in going and link.has_authority_over(going[pack_id]))
        _check_requirements(replace(link, requires=own), present)


def _unwind(applied: Sequence[Link], removed: Sequence[Link], overlap: Overlap) -> list[Link]:
    """The removed packs and all packs above that share rows with one that is undone, bottom first."""
    undone: list[Link] = []
    for link in applied:
        if link in removed or any(overlap(link, below) for below in undone):
            undone.append(link)
    return undone
