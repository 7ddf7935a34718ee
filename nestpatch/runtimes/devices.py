"""Where and in which arithmetic PyTorch computes a model, each with the reason."""

from __future__ import annotations

import time

from nestpatch.errors import DataError

_LARGE = 50_000_000
"""Bytes of a model from which the arithmetic outweighs everything else."""
_WORTHWHILE = 1.5
"""Gain from which a CPU computes in bfloat16."""


def pick_device(wanted: str) -> tuple[str, str]:
    """Chooses where PyTorch computes.

    Args:
        wanted: "auto", or a device of PyTorch such as "cpu", "cuda", "cuda:1" or "mps".

    Returns:
        (device, reason).

    Raises:
        DataError: PyTorch cannot compute on that device here.
    """
    import torch

    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda", f"{torch.cuda.get_device_name()} found"
        if torch.backends.mps.is_available():
            return "mps", "Apple GPU found"
        return "cpu", "no GPU found"
    try:
        torch.zeros(1, device=wanted).item()
    except Exception as error:  # PyTorch's errors of devices and drivers have no common base
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DataError(
            f"PyTorch cannot compute on the device {wanted!r} here: {reason}",
            advice="Use the device cpu, or install a PyTorch that supports this one.",
        ) from error
    return wanted, "asked for"


def pick_dtype(wanted: str, device: str, nbytes: int = 0) -> tuple[str, str]:
    """Chooses in which type PyTorch computes.

    Args:
        wanted: "auto", or the name of a torch dtype.
        device: From `pick_device`.
        nbytes: Size of the model's files. On a CPU a large model is computed in bfloat16 where that is faster here, which is
            measured; 0 leaves float32.

    Returns:
        (torch dtype name, reason).
    """
    if wanted != "auto":
        return wanted, "asked for"
    if device != "cpu":
        return "bfloat16", "accelerators compute it natively"
    if nbytes < _LARGE:
        return "float32", "exact, and fast enough for this model"
    # The reason goes into the pack, whose bytes must not depend on a measured number.
    if _bfloat16_gain() >= _WORTHWHILE:
        return "bfloat16", f"this processor multiplies it at least {_WORTHWHILE:g} times as fast as float32"
    return "float32", f"this processor does not multiply bfloat16 {_WORTHWHILE:g} times as fast"


def _bfloat16_gain() -> float:
    """How many times as fast this processor multiplies bfloat16 as float32, by a product of a typical layer."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        rows, matrix = torch.ones(512, 1024, dtype=dtype), torch.ones(2048, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            torch.nn.functional.linear(rows, matrix)
            times.append(time.perf_counter() - began)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)
