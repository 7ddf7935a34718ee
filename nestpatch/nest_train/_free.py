"""Free memory: of this machine or container, and of a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from nestpatch.nest_train import _ranks

if TYPE_CHECKING:
    import torch

_GROUP = Path("/sys/fs/cgroup")
"""Where Linux shows a container its limits."""


def free_memory(group: Path = _GROUP) -> int:
    """Bytes that this process can still take.

    Args:
        group: The control group of the process, of version 2, whose limit counts too.

    Returns:
        At least 0.
    """
    free = int(psutil.virtual_memory().available)
    try:
        limit = int((group / "memory.max").read_text())
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, min(free, limit - int(used["anon"])))
    except (OSError, ValueError, KeyError):  # no group, or no limit ("max")
        return free


def free_on(device: torch.device) -> int:
    """Bytes that this process can still take on a device.

    Args:
        device: Where it computes.

    Returns:
        Of the memory of the machine, which its processes share, the part of this one.
    """
    if device.type != "cuda":
        return free_memory() // _ranks.on_this_machine()
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + unused)
