"""What a check of signatures is about: the model, as the user and the pack name it, and the patterns that match it.

A pattern is a path pattern or a model id. Path patterns match what the user calls the model, so no pack can influence them.
Model ids match what the pack states as its base (`manifest.base.model_id`), which its signature covers. Everything here is a
value; only `Subject.of` looks at the disk.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from pathlib import Path

from nestpatch.values import dataclass

EVERYTHING = "*"
_PATH = re.compile(r"[/~\\]|[A-Za-z]:[/\\]|\*+[/\\]|\.{1,2}(?:[/\\]|$)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def is_path(pattern: str) -> bool:
    """Distinguishes the two kinds of patterns.

    Args:
        pattern: A path pattern or a pattern of model ids.

    Returns:
        True for paths: it starts with "/", "~", a drive letter, "./", "../" or "*/". Others are model ids.
    """
    return _PATH.match(pattern) is not None


@dataclass(frozen=True)
class Subject:
    """The model that a pack is for, as the user names it and as the pack names it."""

    paths: tuple[str, ...] | None = None
    """The model's paths as the user gave them; None: no particular model; empty: a model that is not on this disk."""
    named: str = ""
    """The Hub id that the user gave instead of a path."""
    base: str | None = None
    """The base that the pack names; None: no pack is known yet."""

    @classmethod
    def of(cls, model: str | Path | None) -> Subject:
        """What the user says about a model.

        No id is derived from folder names: whoever hands over a folder chooses them.

        Args:
            model: A path, a Hub id (owner/name, hub://owner/name), or None.

        Returns:
            The model's paths, with and without links, for a file also its folder; or the Hub id.
        """
        if model is None:
            return cls()
        text = os.fspath(model)
        name = text.removeprefix("hub://").partition("@")[0]
        # os.path.exists answers no where Path.exists raises.
        if text.startswith("hub://") or (_HUB_ID.fullmatch(name) and not os.path.exists(text)):  # noqa: PTH110
            return cls((), name)
        paths = [Path(os.path.abspath(text)), Path(os.path.realpath(text))]
        paths += [path.parent for path in paths if os.path.isfile(path)]  # noqa: PTH113 - the same
        return cls(tuple(dict.fromkeys(path.as_posix() for path in paths)))

    @property
    def ids(self) -> tuple[str, ...]:
        """The known model ids: the user's and the pack's."""
        return (*([self.named] if self.named else []), *([self.base] if self.base is not None else []))

    def fits(self, pattern: str) -> bool:
        """Whether a rule for a pattern applies.

        Args:
            pattern: A path pattern or a pattern of model ids.

        Returns:
            True when it matches a path of the model, or one of the ids.
        """
        if pattern == EVERYTHING:
            return True
        if is_path(pattern):
            if pattern.startswith("~"):
                start, slash, rest = pattern.partition("/")
                pattern = glob.escape(os.path.expanduser(start)) + slash + rest  # noqa: PTH111 - Path.expanduser raises
            # As the system compares paths: on Windows without case, and with either slash.
            return any(fnmatchcase(os.path.normcase(path), os.path.normcase(pattern)) for path in self.paths or ())
        return any(fnmatchcase(model_id, pattern) for model_id in self.ids)

    def is_covered(self, patterns: Sequence[str]) -> bool:
        """Whether a key counts that is trusted for models of these patterns.

        One path decides, or ids that match both what the user gave and what the pack states. What is unknown excludes no key:
        without a model any path pattern counts, before a pack is known any model id.

        Args:
            patterns: Path patterns and model ids.

        Returns:
            True when the key counts.
        """
        paths = [pattern for pattern in patterns if is_path(pattern)]
        if EVERYTHING in patterns or any(self.fits(pattern) for pattern in paths):
            return True
        if paths and self.paths is None:
            return True
        others = [pattern for pattern in patterns if not is_path(pattern)]
        return bool(others) and all(any(fnmatchcase(one, pattern) for pattern in others) for one in self.ids)


NO_MODEL = Subject()
"""No particular model, and no pack."""


@dataclass(frozen=True)
class Origin:
    """Where a pack came from and who signed it. Nothing here decides which bytes are written into a model."""

    signers: Mapping[str, str] = field(default_factory=dict)
    """Name -> key id of the trusted keys whose signatures were checked."""
    channel: str = ""
    """Address of the channel that the model follows from now on: hub://owner/name, https://... or file://..."""
    roots: tuple[str, ...] = ()
    """Key ids of the channel's root keys, oldest first: each has signed that the next one follows it."""
    signatures: Mapping[str, bytes] = field(default_factory=dict)
    """Suffix after the pack's file name -> content of the signature file, to be kept beside the model."""

    @property
    def publishers(self) -> frozenset[str]:
        """The key ids of the pack's publishers; empty when no key stands behind it."""
        return frozenset((*self.signers.values(), *self.roots))
