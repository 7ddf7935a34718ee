"""Semantic versions and their order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import total_ordering


@total_ordering
@dataclass(frozen=True)
class Version:
    """A semantic version with the precedence of semver.org, section 11. Build metadata does not count."""

    release: tuple[tuple[int, str], ...]
    """Of each number its length and its digits: in the order of the numbers, which may be longer than Python reads."""
    prerelease: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Version:
        """From a text that a pack has already checked."""
        core, _, prerelease = text.partition("+")[0].partition("-")
        return cls(tuple((len(part), part) for part in core.split(".")), tuple(prerelease.split(".")) if prerelease else ())

    def _key(self) -> tuple[tuple[tuple[int, str], ...], bool, list[tuple[bool, int, str]]]:
        # Numbers come before words, and no prerelease at all comes last.
        parts = [(not part.isdigit(), len(part) if part.isdigit() else 0, part) for part in self.prerelease]
        return self.release, not self.prerelease, parts

    def __lt__(self, other: Version) -> bool:
        return self._key() < other._key()
