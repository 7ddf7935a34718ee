"""Which calls a command makes, and models that were killed before one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from nestpatch.errors import NestpatchError
from tests.faults.cases import Case, digests
from tests.faults.killer import Call, Fault, Killer

CaseOf = Callable[[str, str], Case]
MAIN = ("apply", "upgrade", "revert")


def calls_of(killer: Killer, case: Case, folder: Path) -> list[Call]:
    """What the command of a case does, call by call."""
    return killer.calls(case.command(case.fresh(folder)), folder, folder.with_name("calls"))


def number_of(calls: list[Call], kind: str, path: str) -> int:
    """The number of the first call of that kind to that path."""
    return next(n for n, call in enumerate(calls, start=1) if call.kind == kind and call.path == path)


def row_writes(calls: list[Call]) -> list[int]:
    """The numbers of the calls that write rows."""
    return [
        n for n, call in enumerate(calls, start=1) if call.kind == "write" and call.path.endswith((".safetensors", ".gguf"))
    ]


def interrupted(killer: Killer, case: Case, folder: Path, number: int) -> Path:
    """A model whose command was killed before a call."""
    case.fresh(folder)
    victim = killer.start(case.command(folder), folder, Fault(number))
    assert victim.wait().stopped
    victim.kill()
    return folder


def interrupted_template(killer: Killer, case: Case, folder: Path, number: int) -> Path:
    """The same, moved away: copied back to `folder`, the journal fits the model again."""
    template = folder.with_name("interrupted")
    interrupted(killer, case, folder, number).rename(template)
    return template


def settle_all(case: Case, what: str, kills: Iterator[tuple[int, Path]]) -> tuple[list[str], int]:
    """Settles every killed model: (states in the order of the kills, how many were in neither state before recovery).

    Fails with the operation, the number, the mode and the digests of all that could not be settled.
    """
    states, torn, failures = [], 0, []
    for number, folder in kills:
        torn += case.state_of(folder) is None
        try:
            states.append(case.settle(folder).name)
        except (AssertionError, NestpatchError, OSError) as error:
            failures.append(f"{case.name}, {what} {number}: {error!r}")
    assert not failures, f"{len(failures)} of {len(failures) + len(states)} kills:\n" + "\n".join(failures[:20])
    assert digests(case.model(case.template)) == case.before.weights, "what the model links to was changed"
    return states, torn


INTERRUPTIONS = {
    # State of the model after the first kill -> (call before which it came, the state that every recovery must end in)
    "half a journal": (lambda calls: number_of(calls, "write", ".nestpatch/journal"), "before"),
    "a journal only": (lambda calls: row_writes(calls)[0], "before"),
    "half the rows": (lambda calls: row_writes(calls)[len(row_writes(calls)) // 2], "before"),
    "all rows": (lambda calls: number_of(calls, "rename", "nestpatch.json"), "before"),
    "the commit": (lambda calls: number_of(calls, "unlink", ".nestpatch/journal"), "after"),
}
