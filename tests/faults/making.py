"""Commands that write a new file or folder. A killed command may leave nothing under the final name, or everything."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from nestpatch.errors import NestpatchError
from nestpatch.patcher.inplace import revert
from nestpatch.patcher.verify import Verdict, verify
from tests.faults.cases import digests
from tests.faults.killer import Call, End, Fault, Killer
from tests.helpers import tree_digest

_TRANSACTION = re.compile(r"[0-9a-f]{16}(?=-[0-9a-f]{16}\.undo$)")
_WHEN = re.compile(rb'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ|(?<=transaction\\":\\")[0-9a-f]{16}(?=\\")')


def names(folder: Path) -> list[str]:
    """Everything in a folder; random transactions are left out of the names of undo records."""
    return sorted(_TRANSACTION.sub("*", name) for name in tree_digest(folder))


def weights(model: Path) -> dict[str, str]:
    """Weight file -> SHA-256; of a single file, that of the file, whatever is beside it."""
    return tree_digest(model) if model.is_file() and model.suffix != ".onnx" else digests(model)


def _exported(target: Path) -> dict[str, str]:
    """File -> SHA-256 of all of it but the times and the transactions in the record of its patches."""
    files = [target] if target.is_file() else [file for file in target.rglob("*") if file.is_file()]
    return {file.name: sha256(_WHEN.sub(b"", file.read_bytes())).hexdigest() for file in files}


@dataclass(frozen=True)
class Making:
    """A command that writes `target`, in a folder that has the model too."""

    folder: Path
    """Where copies of the template have to be: a seal is valid for one path only."""
    template: Path
    command: Sequence[str]
    target: Path
    """In `folder`."""
    names: list[str]
    """Everything in the folder after an uninterrupted run."""
    content: dict[str, str]
    """The target then: relative path -> SHA-256; for copies, of the weight files alone; without times."""
    copy: Path | None
    """The model in the target, for copies; None for exports, which have no undo records."""
    base: dict[str, str]
    """The weights that a copy has when it is reverted."""

    def fresh(self) -> Path:
        """The folder as it was before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        return Path(shutil.copytree(self.template, self.folder, symlinks=True))

    def found(self) -> dict[str, str]:
        """The target, as in `content`."""
        return weights(self.copy) if self.copy else _exported(self.target)

    def check_source(self) -> None:
        """Checks that everything that was in the folder before is unchanged."""
        before, now = tree_digest(self.template), tree_digest(self.folder)
        assert {name: now.get(name) for name in before} == before, "the source was changed"

    def check_target(self) -> None:
        """It is complete."""
        assert self.found() == self.content, "the target is not complete"
        if self.copy:
            found = verify(self.copy, full=True)
            assert (found.verdict, bool(found.packs)) == (Verdict.PATCHED, True), f"verify says {found}"

    def check_reverted(self) -> None:
        """Reverting the copy gives the base."""
        if self.copy:
            revert(self.copy)
            assert weights(self.copy) == self.base, "the copy does not revert to the base"

    def check_retry(self, killer: Killer, *, thorough: bool) -> str:
        """The same command run again, after a kill: "nothing" was there under the final name, or "all" was."""
        self.check_source()
        complete = os.path.lexists(self.target)
        if complete:
            self.check_target()
        before = tree_digest(self.target) if complete else {}
        end = killer.run(self.command, self.folder)
        assert (end.how, end.trouble) == ("ended", ""), end
        assert names(self.folder) == self.names, f"left over: {set(names(self.folder)) ^ set(self.names)}, {end.err}"
        self.check_source()
        if complete:
            assert_refused(end)
            assert tree_digest(self.target) == before, "the refused retry changed the target"
        else:
            assert end.code == 0, end.err
        if complete or thorough:
            self.check_target()
            self.check_reverted()
        return "all" if complete else "nothing"


def assert_refused(end: End) -> None:
    """Refused because the output exists."""
    assert end.code == 1, end
    assert "exists already" in end.err, end.err


def make(
    killer: Killer,
    folder: Path,
    command: Sequence[str],
    target: Path,
    copy: Path | None = None,
    base: dict[str, str] | None = None,
) -> Making:
    """The case of a command, in a folder that is ready for it. Its result is recorded by running it uninterrupted."""
    template = folder.with_name("template")
    shutil.copytree(folder, template, symlinks=True)
    end = killer.run(command, folder)
    assert (end.how, end.code, end.trouble) == ("ended", 0, ""), end
    making = Making(folder, template, command, target, names(folder), {}, copy, base or {})
    making.check_source()
    return replace(making, content=making.found())


def settle_all(killer: Killer, making: Making, kills: Iterator[tuple[int, Path]]) -> list[str]:
    """Runs each killed command again: what was there under the final name, in the order of the kills."""
    states, failures = [], []
    for number, _ in kills:
        try:
            states.append(making.check_retry(killer, thorough=number % 8 == 1))
        except (AssertionError, NestpatchError, OSError) as error:
            failures.append(f"kill {number}: {error!r}"[:1500])
    assert not failures, f"{len(failures)} of {len(failures) + len(states)} kills:\n" + "\n".join(failures[:20])
    return states


def kills_of(killer: Killer, making: Making, *, tear: bool = False, every: int = 1) -> Iterator[tuple[int, Path]]:
    """The command of a case killed at each call."""
    return killer.kill_at_each(lambda _: making.command, making.fresh, tear=tear, every=every)


def stopped_before(killer: Killer, making: Making, number: int) -> None:
    """The command killed before one call."""
    making.fresh()
    victim = killer.start(making.command, making.folder, Fault(number))
    assert victim.wait().stopped
    victim.kill()


def calls_of(killer: Killer, making: Making) -> list[Call]:
    """What the command does, call by call."""
    making.fresh()
    return killer.calls(making.command, making.folder, making.folder.with_name("calls"))
