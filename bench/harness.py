"""What the benchmarks share: whole processes that are timed, digests, and the dated log.

Imports nothing big: on Linux a child's peak RSS is at least that of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

LOG = Path(__file__).with_name("LOG.md")
TOOL = [sys.executable, "-m", "nestpatch"]
"""How a user starts nestpatch, but for the name."""


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return digest(iter(lambda: file.read(1 << 20), b""))


def digest(blocks: Iterable[bytes]) -> str:
    """SHA-256 of consecutive blocks."""
    state = sha256()
    for block in blocks:
        state.update(block)
    return state.hexdigest()


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    rss_mb: float
    written_mb: float
    """What it gave to write calls. The bytes that Linux counts as dirtied are whole folios, many times the rows."""

    def numbers(self) -> dict[str, float]:
        """For the JSON object."""
        return {"s": self.seconds, "rss_mb": self.rss_mb, "written_mb": self.written_mb}


def measure(command: list[object]) -> tuple[Run, str]:
    """Runs a command to its end; gives its last line too."""
    os.sync()
    # An installed program has its bytecode; machines that build images forbid writing it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.NamedTemporaryFile() as stderr:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        )
        said = process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - began
        io = Path(f"/proc/{process.pid}/io")  # still there until the process is waited for
        written = int(io.read_text().split()[3]) / 1e6 if io.exists() else 0.0
        _, status, usage = os.wait4(process.pid, 0)
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{command} failed:\n{Path(stderr.name).read_text()[-3000:]}")
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, rss / 1e6, written), (said.splitlines() or [""])[-1]


def measure_apart(command: list[object]) -> tuple[Run, str]:
    """As `measure`, from a small process in between, for callers that hold much memory themselves."""
    said = subprocess.check_output([sys.executable, "-m", "bench.harness", *map(str, command)], text=True)
    numbers, last = json.loads(said)
    return Run(*numbers), last


def medians(runs: Sequence[Run]) -> Run:
    """Of each number by itself."""
    return Run(*map(statistics.median, zip(*runs, strict=True)))


def in_rounds(one_round: Callable[[], dict[str, Run]], rounds: int) -> dict[str, Run]:
    """The medians of each contender, after a round that warms the page cache and does not count."""
    done = [one_round() for _ in range(rounds + 1)][1:]
    return {name: medians([results[name] for results in done]) for name in done[0]}


def prepared(module: str, size: str) -> Path:
    """The folder that a benchmark's first step prints, in a process of its own: this one stays small."""
    said = subprocess.check_output([sys.executable, "-m", module, "--step", "prepare", size], text=True)
    return Path(said.splitlines()[-1])


def machine() -> str:
    """The processor and its cores, for the log."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def table(results: dict[str, Run]) -> str:
    """Rows of a Markdown table: contender, seconds, peak RSS, bytes written."""
    rows = [f"| {who} | {run.seconds:.3f} | {run.rss_mb:.0f} | {run.written_mb:.1f} |" for who, run in results.items()]
    return "\n".join(["| | seconds | peak RSS, MB | written, MB |", "|---|---|---|---|", *rows])


def options_of(what: str | None, sizes: dict[str, str] | None = None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has; `sizes` are flags for other models."""
    parser = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="after one that is not counted")
    parser.add_argument("--log", action="store_true", help="add the result to bench/LOG.md")
    for flag, quantized_merge_ in (sizes or {}).items():
        parser.add_argument(flag, action="store_true", help=quantized_merge_)
    return parser


def ratios_of(results: dict[str, Run], pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """How many times as long the first of each pair took, of those that were run."""
    return {f"{a}/{b}": results[a].seconds / results[b].seconds for a, b in pairs if a in results and b in results}


def publish(title: str, notes: str, results: dict[str, Run], facts: dict[str, Any], *, log: bool) -> None:
    """Prints a dated block, and as the last line of stdout one JSON object; `log` keeps the block."""
    shown = [table(results)]
    if "ratios" in facts:
        shown.append(f"Ratios of the times: {', '.join(f'{name} {value:.2f}' for name, value in facts['ratios'].items())}.")
    numbers = {f"{name}_{what}": value for name, run in results.items() for what, value in run.numbers().items()}
    report(title, notes, shown, facts | numbers, log=log)


def report(title: str, notes: str, shown: Sequence[str], facts: dict[str, Any], *, log: bool) -> None:
    """Prints a dated block of paragraphs and tables, and as the last line of stdout one JSON object; `log` keeps the block."""
    command = " ".join(["python -m bench." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    head = f"## {datetime.now(timezone.utc):%Y-%m-%d}: {title}"
    block = "\n\n".join([head, f"`{command}` on {machine()}. {notes}", *shown]) + "\n"
    print(block)
    if log:
        _append_to_log(block)
    print(json.dumps(facts))


def _append_to_log(block: str) -> None:
    """Newest first, under the header."""
    head, mark, older = LOG.read_text(encoding="utf-8").partition("\n## ")
    LOG.write_text(f"{head.rstrip()}\n\n{block}{mark}{older}", encoding="utf-8")


if __name__ == "__main__":
    print(json.dumps(measure(list(sys.argv[1:]))))
