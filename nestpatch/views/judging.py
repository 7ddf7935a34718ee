"""How the agreement of judges is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from nestpatch.views.console import escape

if TYPE_CHECKING:
    from nestpatch.evaluation.agreement import Agreement


def agreement_table(agreement: Sequence[Agreement]) -> Table:
    """Judges beside the one that they are compared with.

    Args:
        agreement: At least one comparison, all with the same judge or person.

    Returns:
        The table: a row for each judge, with the verdicts on which they differ.
    """
    reference = escape(agreement[0].reference)
    table = Table("judge", "kappa", "agrees", f"differs ({reference}: judge)", box=None, pad_edge=False, header_style="bold")
    for one in agreement:
        total, kappa = len(one.pairs), one.kappa
        counts = Counter((first.value, second.value) for first, second in one.pairs if first is not second)
        table.add_row(
            escape(one.judge),
            "not defined" if kappa is None else f"{kappa:.2f}",
            f"{one.agreed} of {total}",
            ", ".join(f"{first}: {second} {many}" for (first, second), many in sorted(counts.items())),
        )
    return table
