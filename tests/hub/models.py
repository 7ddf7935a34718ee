"""Models on the local Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.helpers import weight_files, write_checkpoint
from tests.hubserver.server import Hub

MODEL = "acme/tiny-llama"


def put(hub: Hub, folder: Path, repo_id: str = MODEL) -> str:
    """Commits a model directory, returns the commit."""
    return hub.store.seed(repo_id, {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()})


def wide_model(folder: Path, *, seed: int = 0, rows: int = 20_000) -> Path:
    """One matrix of many rows of 128 bytes, 2.5 MB: most of it is never asked for."""
    random = np.random.default_rng(seed)
    tensors = {"a.weight": random.standard_normal((rows, 32)).astype(np.float32), "b.bias": np.zeros(4, np.float32)}
    return write_checkpoint(folder, tensors)


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))
