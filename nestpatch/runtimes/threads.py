"""How many threads compute, and how they wait: the same for PyTorch, llama.cpp and onnxruntime.

Threads that spin while they wait make a run several times slower when another process uses the same cores, so waiting is
passive unless the user sets OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os

from nestpatch.files.threads import cores

_POLICY = "OMP_WAIT_POLICY"


def wait_passively() -> None:
    """Makes OpenMP threads sleep while they wait. An OMP_WAIT_POLICY that the user set is kept.

    OpenMP reads the variable when it is loaded: call this before torch or llama.cpp is imported.
    """
    os.environ.setdefault(_POLICY, "PASSIVE")


def may_spin() -> bool:
    """Whether waiting threads may keep their cores busy: the user set OMP_WAIT_POLICY=ACTIVE."""
    return os.environ.get(_POLICY, "").upper() == "ACTIVE"


def pick_threads(wanted: int | None = None) -> int:
    """The number of threads to compute with.

    Args:
        wanted: What the user asked for; None: OMP_NUM_THREADS where it is set, else every processor of this process.

    Returns:
        At least 1.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted is None and first.isascii() and first.isdigit() and int(first):
        wanted = int(first)
    if wanted is not None:
        return max(1, wanted)
    return cores()
