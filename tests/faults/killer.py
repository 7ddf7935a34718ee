"""Starts nestpatch commands that stop, write only in part, or get an error at a chosen call, and kills them from outside."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MOST_CALLS = 2000
"""More calls than any command here makes: a loop that gets there does not end."""


def compiler() -> str | None:
    """A C compiler, if this machine has one."""
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


needs_shim = pytest.mark.skipif(
    sys.platform != "linux" or compiler() is None,
    reason="the shim that counts system calls is for Linux, and needs a C compiler",
)


def build_shim(folder: Path) -> Path:
    """Compiles the shim."""
    shim = folder / "shim.so"
    command = [compiler(), "-shared", "-fPIC", "-O1", "-o", str(shim), str(HERE / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return shim


@dataclass(frozen=True)
class Fault:
    """What happens to a command, and at which of its calls under the watched folder, counted from 1; 0 means never."""

    stop_at: int = 0
    tear: bool = False
    """Stop in the middle of the stop_at-th write instead of before the stop_at-th call."""
    fail_at: int = 0
    error: int = 0
    dead: bool = False
    """All calls from fail_at on fail."""
    powerless: bool = False
    """Root may not write read-only files."""


@dataclass(frozen=True)
class End:
    """How far a command got."""

    how: str
    """"stopped", "killed" or "ended"."""
    code: int = 0
    crash: str = ""
    """The traceback of anything that the command line did not turn into a message."""
    out: str = ""
    err: str = ""

    @property
    def stopped(self) -> bool:
        return self.how == "stopped"

    @property
    def trouble(self) -> str:
        """The end of the traceback, if there is one: the last places in nestpatch, innermost last, and the error."""
        lines = self.crash.strip().splitlines()
        frames = [line.split("nestpatch/")[-1].replace('"', "") for line in lines if "nestpatch/" in line and ", line " in line]
        return f"{lines[-1]} at {'; '.join(frames[-3:])}" if lines else ""


@dataclass(frozen=True)
class Call:
    """One line of a log."""

    kind: str
    path: str
    """Relative to the watched folder."""
    size: int


class Victim:
    """A started command."""

    def __init__(self, killer: Killer, child: int) -> None:
        self.killer, self.child = killer, child

    def wait(self) -> End:
        """Until it stops or ends."""
        return End(**self.killer.ask("wait", child=self.child))

    def kill(self) -> None:
        """SIGKILL, from outside."""
        self.killer.ask("send", child=self.child, signal=int(signal.SIGKILL))
        assert self.wait().how == "killed"

    def go_on(self) -> None:
        """Continues one that stopped."""
        self.killer.ask("send", child=self.child, signal=int(signal.SIGCONT))


class Killer:
    """The process that forks the victims."""

    def __init__(self, shim: Path) -> None:
        paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.victim"],
            env={**os.environ, **one_thread, "NESTPATCH_TRACEBACK": "1", "LD_PRELOAD": str(shim), "PYTHONPATH": paths},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """One request, one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def start(
        self, args: Sequence[str], folder: Path, fault: Fault, *, log: Path | None = None, home: Path | None = None
    ) -> Victim:
        """Starts a command; calls under `folder` are counted. `home`: its NESTPATCH_HOME, where it is not this process's."""
        target = {"args": list(args), "folder": str(folder), "log": str(log) if log else "", "home": str(home) if home else ""}
        return Victim(self, self.ask("start", **target, **vars(fault))["child"])

    def run(self, args: Sequence[str], folder: Path, fault: Fault | None = None, *, home: Path | None = None) -> End:
        """Runs a command until it stops or ends."""
        return self.start(args, folder, fault or Fault(), home=home).wait()

    def calls(self, args: Sequence[str], folder: Path, log: Path, *, code: int = 0, home: Path | None = None) -> list[Call]:
        """The calls that a command makes if it is not interrupted. It must end with that exit code."""
        end = self.start(args, folder, Fault(), log=log, home=home).wait()
        assert (end.how, end.code) == ("ended", code), end
        lines = [line.split("\t") for line in log.read_text(encoding="utf-8").splitlines()]
        log.unlink()
        return [Call(kind, path.removeprefix("/"), int(size)) for kind, path, size in lines]

    def kill_at_each(
        self,
        args: Callable[[Path], Sequence[str]],
        fresh: Callable[[], Path],
        *,
        tear: bool = False,
        after: Fault | None = None,
        home: Path | None = None,
        every: int = 1,
    ) -> Iterator[tuple[int, Path]]:
        """Kills a command at its first call, at its second, and so on, each time on a fresh folder: (number, folder) of each.

        `after`: the command also meets this fault, and is killed at the calls from there on. `every`: for commands of hundreds
        of calls, kills at every second one, third one, and so on.
        """
        also = after or Fault()
        for number in itertools.count(also.fail_at + 1, every):
            assert number < MOST_CALLS, "the command makes more and more calls"
            folder = fresh()
            fault = Fault(number, tear, also.fail_at, also.error, also.dead, also.powerless)
            victim = self.start(args(folder), folder, fault, home=home)
            if not victim.wait().stopped:
                return
            victim.kill()
            yield number, folder

    def close(self) -> None:
        """Ends the process; victims die with it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
