"""What a publisher says of a pack."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import datetime, timezone

from nestpatch.errors import DataError
from nestpatch.pack import name_problem, version_problem


@dataclass(frozen=True)
class Label:
    """What a publisher says of a pack."""

    name: str
    version: str = "1.0.0"
    description: str = ""
    license: str = ""
    tags: tuple[str, ...] = ()
    supersedes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises DataError, before any work, for what a manifest would refuse at the end."""
        if problem := name_problem(self.name) or version_problem(self.version):
            raise DataError(problem)
        now()


def now() -> str:
    """The time of making, or SOURCE_DATE_EPOCH where a build has to give the same bytes again."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError) as error:
        raise DataError(f"SOURCE_DATE_EPOCH is no time in seconds: {epoch!r}") from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
