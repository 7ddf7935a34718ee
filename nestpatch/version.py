"""Semantic versions and their order (semver.org)."""

from __future__ import annotations

from functools import total_ordering

from nestpatch.values import dataclass


@total_ordering
@dataclass(frozen=True)
class Version:
    """A semantic version, ordered as semver.org, section 11, says. Build metadata does not count.

    Attributes:
        release: Major, minor and patch.
        prerelease: The identifiers after the hyphen; empty for a release.
    """

    release: tuple[int, int, int]
    prerelease: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        """Parses a version.

        Args:
            text: A version that was checked, as that of a pack is.

        Returns:
            The version without its build metadata.
        """
        core, _, prerelease = text.partition("+")[0].partition("-")
        major, minor, patch = (int(part) for part in core.split("."))
        return cls((major, minor, patch), tuple(prerelease.split(".")) if prerelease else ())

    def _key(self) -> tuple[tuple[int, int, int], bool, list[tuple[bool, int, str]]]:
        # Numbers come before words, and no prerelease at all comes last.
        parts = [(not p.isdigit(), int(p) if p.isdigit() else 0, p if not p.isdigit() else "") for p in self.prerelease]
        return self.release, not self.prerelease, parts

    def __lt__(self, other: Version) -> bool:
        return self._key() < other._key()
