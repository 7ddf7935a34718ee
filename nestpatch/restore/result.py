"""What a restoration gives: the pack that was written, and what it changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RestoredTensor:
    """What a pack changes in one matrix."""

    name: str
    rows: int
    """Rows that the pack changes."""
    considered: int
    """Rows that were looked at: those that the alignment changed, or that the carried pack changes."""

    def as_json(self) -> dict[str, Any]:
        """The matrix for `--json`."""
        return {"tensor": self.name, "rows": self.rows, "considered_rows": self.considered}


@dataclass(frozen=True)
class Restored:
    """A pack whose base is a fine-tune, and that restores its safety. Nothing was measured."""

    method: str
    """"transplant", "carry" or "extrapolate"."""
    model: Path
    """The model that the pack is for."""
    output: Path
    """The file that was written."""
    label: str
    """Name and version of the pack."""
    pack_id: str
    nbytes: int
    """Size of the file."""
    tensors: tuple[RestoredTensor, ...]
    """The matrices that the pack changes."""
    inexact: int = 0
    """Rows that the merge does not give the stored bits of the reference."""
    moved: int = 0
    """Rows whose change went to a row of another number."""

    @property
    def rows(self) -> int:
        """Rows that the pack changes."""
        return sum(tensor.rows for tensor in self.tensors)

    @property
    def considered(self) -> int:
        """Rows that were looked at, in the matrices that the pack changes."""
        return sum(tensor.considered for tensor in self.tensors)

    @property
    def note(self) -> str:
        """What a person should do next."""
        return f"nothing was measured: nestpatch eval {self.model} {self.output}"

    def as_json(self) -> dict[str, Any]:
        """The result for `--json`.

        Returns:
            A JSON object; docs/json.md describes its names.
        """
        return {
            "method": self.method,
            "model": str(self.model),
            "output": str(self.output),
            "pack": self.label,
            "pack_id": self.pack_id,
            "bytes": self.nbytes,
            "rows": self.rows,
            "considered_rows": self.considered,
            "inexact_rows": self.inexact,
            "moved_rows": self.moved,
            "tensors": len(self.tensors),
            "restored": [tensor.as_json() for tensor in self.tensors],
            "notes": [self.note],
        }
