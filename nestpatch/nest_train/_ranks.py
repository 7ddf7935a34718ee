"""One training by many processes ("ranks"), as `torchrun` and `accelerate launch` start them: the few collective operations.

Every process runs the same stages. What is computed prompt by prompt is dealt out and gathered in the order of the prompts;
what is chosen, or read from a run directory, is decided by the first rank and sent to the others. In one process all of this
does nothing. Torch is imported inside functions, so that a missing package can be reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from nestpatch.errors import DataError, TrainingError
from nestpatch.runtimes.devices import pick_device

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
_WAIT = timedelta(days=1)
"""The others wait while the first rank selects neurons. A process that ends is noticed at once, however long this is."""


@dataclass
class _Ranks:
    """This process among the others."""

    rank: int = 0
    count: int = 1
    spoke: bool = False
    """Whether its error is the one that is reported."""


HERE = _Ranks()


def is_first() -> bool:
    """Whether this process writes, reports progress, and chooses for all."""
    return HERE.rank == 0


def on_this_machine() -> int:
    """Processes that share the memory of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", HERE.count)) if HERE.count > 1 else 1


@contextmanager
def together(device: str) -> Iterator[None]:
    """Inside, the processes that a launcher started (WORLD_SIZE, RANK, ..) work together; a single process works alone.

    When one fails, all end: the first error is raised, and its process prints it; the others exit with code 1.

    Args:
        device: The recipe's.

    Raises:
        DataError: The variables of the launcher are not complete, or there are fewer GPUs than processes.
        SystemExit: Another process has failed.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count <= 1 or HERE.count > 1:
        yield
        return
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, _ = next(iter(rendezvous("env://")))
    except (ValueError, RuntimeError, OSError) as error:
        advice = "Start the processes with torchrun or accelerate launch, or unset WORLD_SIZE to train with one."
        raise DataError(f"the {count} processes of WORLD_SIZE do not find each other: {error}", advice=advice) from error
    HERE.rank, HERE.count = rank, count
    try:
        _start(own_device(pick_device(device)[0]), store)
        yield
        distributed.destroy_process_group()
        _forget()
    except BaseException as error:
        # Before this process ends: what the others meet when it is gone comes later.
        HERE.spoke = _claims(store)
        if HERE.spoke or not isinstance(error, Exception):
            raise
        raise SystemExit(1) from None
    finally:
        HERE.rank, HERE.count = 0, 1


def _start(device: str, store: Store) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
    # Objects travel through the memory of the processors, gradients on a GPU through NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=HERE.rank, world_size=HERE.count, timeout=_WAIT)


def _claims(store: Store) -> bool:
    """Whether this is the first process that fails."""
    try:
        return bool(store.add("nestpatch failed", 1) == 1)
    except RuntimeError:  # the process that keeps the store has ended
        return False


def _forget() -> None:
    """Lets accelerate, which remembers the processes, begin anew."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def own_device(device: str) -> str:
    """The device of this process.

    Args:
        device: From `pick_device`.

    Returns:
        The same in one process and on a CPU; one GPU for each process of a machine.

    Raises:
        DataError: There is none for this process.
    """
    if HERE.count == 1 or device == "cpu":
        return device
    if device != "cuda":
        raise DataError(
            f"{HERE.count} processes cannot share the device {device}",
            advice="Use --device cuda, which gives each its own, or cpu.",
        )
    import torch

    local = int(os.environ.get("LOCAL_RANK", HERE.rank))
    if local >= (found := torch.cuda.device_count()):
        raise DataError(
            f"{on_this_machine()} processes were started here, and there are {found} GPUs",
            advice=f"Start {found} processes on this machine.",
        )
    return f"cuda:{local}"


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank.

    Args:
        make: Called on the first rank alone.

    Returns:
        Its result.
    """
    if HERE.count == 1:
        return make()
    from torch import distributed

    box = [make() if is_first() else None]
    with _noticing():
        distributed.broadcast_object_list(box, src=0)
    value: Any = box[0]
    return value  # type: ignore[no-any-return]


def gathered(value: T) -> list[T]:
    """The values of all ranks, on every rank.

    Args:
        value: That of this rank.

    Returns:
        One for each rank, in their order.
    """
    if HERE.count == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * HERE.count
    with _noticing():
        distributed.all_gather_object(found, value)
    return found


def at_first(value: T) -> list[T]:
    """The values of all ranks on the first one, for what is large.

    Args:
        value: That of this rank.

    Returns:
        One for each rank, in their order; nothing on the other ranks.
    """
    if HERE.count == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * HERE.count
    with _noticing():
        distributed.gather_object(value, found if is_first() else None, dst=0)
    return found if is_first() else []


def rounds(batches: Sequence[Sequence[T]]) -> Iterator[tuple[Sequence[T], int]]:
    """Deals batches out: in every round one to each rank, in the order of the ranks.

    The batches are those of one process, so that every prompt is computed beside the same others.

    Args:
        batches: The same on all ranks.

    Yields:
        (the batch of this rank, which may be empty in the last round; how many entries all ranks have got until then).
    """
    done = 0
    for start in range(0, len(batches), HERE.count):
        now = batches[start : start + HERE.count]
        done += sum(map(len, now))
        yield now[HERE.rank] if HERE.rank < len(now) else (), done


@contextmanager
def one_after_the_first() -> Iterator[None]:
    """Inside, the first rank comes first: it downloads or repairs what the others then find."""
    if not is_first():
        gathered(None)
    yield
    if is_first():
        gathered(None)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Adds the gradients of all ranks up, so that every rank has the sum.

    Args:
        parameters: On one device; without a gradient where this rank has computed none.
    """
    if HERE.count == 1:
        return
    import torch

    with torch.no_grad():
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([part.flatten() for part in parts])
        with _noticing():
            torch.distributed.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)


@contextmanager
def _noticing() -> Iterator[None]:
    """Turns what a collective operation raises when another process is gone into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"another process of this training has ended: {error}",
            advice="Its own message, or the log of its machine (out of memory?), says why.",
        ) from error
