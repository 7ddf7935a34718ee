"""Peak memory of a piece of work: of a GPU, or of this process."""

from __future__ import annotations

import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


class Peak:
    """The most memory that was used since this was made.

    On a GPU it is what PyTorch allocated, elsewhere the resident memory of the process. Linux alone forgets the earlier peak of
    a process; on other systems it is the peak since the process began.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident (proc(5))
        self._before = self.total()

    def total(self) -> int:
        """Bytes, with what there was before."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def extra(self) -> int:
        """Bytes, without what there was before."""
        return self.total() - self._before
