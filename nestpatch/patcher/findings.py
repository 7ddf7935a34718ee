"""What was found where a pack would change a model: the state of each tensor, and what it was recognised by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from nestpatch.values import dataclass

_SURE = 3.0
"""Standard deviations from which rounded rows count as patched. In doubt they are the base: a pack whose effect cannot be seen
is rejected when it is merged into such rows, and merged from the float base it gives the same rows again."""


class State(Enum):
    """What the touched rows of one tensor are."""

    BASE = "base"
    WIDENED = "the base, stored in another dtype"
    ROUNDED = "the base, by its rounded rows"
    PATCHED = "already patched with this pack"
    CHANGED = "near the base, but changed: fine-tuned, patched otherwise, or damaged"
    FOREIGN = "another model"
    MISSING = "missing"
    SHAPE = "of another shape"


APPLICABLE = (State.BASE, State.WIDENED, State.ROUNDED)


class By(Enum):
    """What the state of a tensor was recognised by; the surest first."""

    DIGESTS = "digests"
    FLOAT_BASE = "float base"
    SKETCHES = "sketches"


@dataclass(frozen=True)
class Evidence:
    """How much nearer rounded rows are to the base than to the patched base. The evidence of tensors adds up."""

    difference: float
    """Of the squared distances: positive for the base, negative for the patched base."""
    variance: float
    """Of that difference, from the noise of the rounding."""

    @classmethod
    def of(cls, near: float, far: float, pack: float, count: int) -> Evidence:
        """The evidence of the rows of one tensor.

        Args:
            near: Squared distance to the base.
            far: Squared distance to the patched base.
            pack: Squared distance between the base and the patched base.
            count: Numbers that were compared.

        Returns:
            The evidence.
        """
        return cls(far - near, 4 * min(near, far) / max(1, count) * pack)

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(self.difference + other.difference, self.variance + other.variance)

    @property
    def patched(self) -> bool:
        """Whether the pack is in the rows, beyond doubt."""
        return self.difference < -_SURE * math.sqrt(self.variance)

    @property
    def unpatched(self) -> bool:
        """Whether the pack is not in the rows, beyond doubt."""
        return self.difference > _SURE * math.sqrt(self.variance)


@dataclass(frozen=True)
class Finding:
    """One tensor of the pack, as found in a checkpoint."""

    name: str
    state: State
    detail: str = ""
    rows: tuple[int, ...] = ()
    """The rows whose sketches differ from those of the base."""
    evidence: Evidence | None = None
    """Whether the pack is in rounded rows; None for other rows."""
    by: By | None = None
    """What it was recognised by; None where it was not."""


def evidence_of(findings: Sequence[Finding]) -> Evidence:
    """The evidence of all rounded tensors together: the noise of a single one may exceed a small change.

    Args:
        findings: What was found in the tensors of a pack.

    Returns:
        The sum over those that were rounded.
    """
    return sum((f.evidence for f in findings if f.state is State.ROUNDED and f.evidence is not None), Evidence(0, 0))
