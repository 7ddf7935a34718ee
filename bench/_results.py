"""The rows that `bench.efficacy` has measured, in a file that grows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
_SHOWN = ("method", "seed", "max_prompts", "strength", "trained", "bytes", "kept_step", "tokens_per_second", "peak_mb")
_SHOWN += (
    "attack_plain",
    "attack_wrapped",
    "incoherent",
    "refusal_benign",
    "refusal_lookalike",
    "benign_correct",
    "kl",
    "perplexity",
)


class Results:
    """The rows of a file of JSON lines, which grows; without a file, of this run.

    Args:
        output: The file.
    """

    def __init__(self, output: Path | None) -> None:
        self._output = output
        self.rows: list[Row] = []
        if output is not None and output.exists():
            whole, _, half = output.read_text("utf-8").rpartition("\n")
            if half:  # a run was killed while it wrote
                output.write_text(whole + "\n" if whole else "", "utf-8")
            self.rows = [json.loads(line) for line in whole.splitlines()]

    def missing(self, settings: str, strengths: Sequence[float]) -> list[float]:
        """The strengths at which these settings are not measured yet."""
        done = {row.get("strength") for row in self.rows if row.get("settings") == settings}
        return [strength for strength in strengths if strength not in done]

    def add(self, row: Row) -> None:
        """Prints a row, and adds it to the file."""
        self.rows.append(row)
        print(" ".join(f"{name}={_short(row[name])}" for name in _SHOWN if row.get(name) is not None), flush=True)
        if self._output is not None:
            with self._output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return f"{value['count']}/{value['total']}"
    return round(value, 4) if isinstance(value, float) else value
