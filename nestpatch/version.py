"""Semantic versions and their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering


@total_ordering
@dataclass(frozen=True)
class Version:
    """A semantic version with the precedence of semver.org, section 11. Build metadata does not count."""

    release: tuple[int, int, int]
    prerelease: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        """From a text that a pack has already checked."""
        core, _, prerelease = text.partition("+")[0].partition("-")
        major, minor, patch = (int(part) for part in core.split("."))
        return cls((major, minor, patch), tuple(prerelease.split(".")) if prerelease else ())

    def _key(self) -> tuple[tuple[int, int, int], bool, list[tuple[bool, int, str]]]:
        # Numbers come before words, and no prerelease at all comes last.
        parts = [(not p.isdigit(), int(p) if p.isdigit() else 0, p if not p.isdigit() else "") for p in self.prerelease]
        return self.release, not self.prerelease, parts

    def __lt__(self, other: Version) -> bool:
        return self._key() < other._key()
