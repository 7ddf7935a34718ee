"""What an export tells of what it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WrittenModel:
    """A file or directory that was written, or with `dry_run` would be."""

    path: Path
    nbytes: int
    """0 after a dry run where llama.cpp decides on it, tensor by tensor."""
    sha256: str
    """Of the file; empty after a dry run, and for a directory of several."""
    tensors: int
    type: str
    """The dtype of the weights."""
    architecture: str
    """As the format names it; empty where it does not."""
    notes: tuple[str, ...]
    """What a user should know of this file."""
    seconds: float
    dry_run: bool = False
