"""How many threads compute, and how they wait: the same for PyTorch, llama.cpp and onnxruntime.

Threads that spin while they wait make a run several times slower when another process uses the same cores, so waiting is
passive unless the user sets OMP_WAIT_POLICY.
"""

from __future__ import annotations

import os

from nestpatch.files.threads import cores

_POLICY = "OMP_WAIT_POLICY"
_SPINS = "OPENBLAS_THREAD_TIMEOUT"
"""Binary logarithm of the processor cycles that numpy's OpenBLAS waits actively: at least 4, and 26 where it is not set."""


def wait_passively() -> None:
    """Makes the threads of OpenMP and of numpy's OpenBLAS sleep while they wait. What the user set is kept.

    The libraries read the variables when they are loaded: call this before numpy, torch or llama.cpp is imported.
    """
    os.environ.setdefault(_POLICY, "PASSIVE")
    if not may_spin():
        os.environ.setdefault(_SPINS, "4")


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
