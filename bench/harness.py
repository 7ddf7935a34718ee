"""What the benchmarks share: whole processes that are timed, digests, and the dated log.

Imports nothing big: on Linux a child's peak RSS is at least that of the process that started it.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

LOG = Path(__file__).with_name("LOG.md")


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


def measure(command: list[object]) -> tuple[Run, str]:
    """Runs a command to its end; gives its last line too."""
    os.sync()
    # An installed program has its bytecode; machines that build images forbid writing it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.NamedTemporaryFile() as told:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], stdout=subprocess.PIPE, stderr=told, text=True, env=environment
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
            sys.exit(f"{command} failed:\n{Path(told.name).read_text()[-3000:]}")
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(seconds, rss / 1e6, written), (said.splitlines() or [""])[-1]


def medians(runs: Sequence[Run]) -> Run:
    """Of each number by itself."""
    return Run(*map(statistics.median, zip(*runs, strict=True)))


def machine() -> str:
    """The processor and its cores, for the log."""
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    return f"{found[1] if found else platform.machine()}, {os.cpu_count()} cores"


def table(results: dict[str, Run]) -> str:
    """Rows of a Markdown table: contender, seconds, peak RSS, bytes written."""
    rows = [f"| {who} | {run.seconds:.3f} | {run.rss_mb:.0f} | {run.written_mb:.1f} |" for who, run in results.items()]
    return "\n".join(["| | seconds | peak RSS, MB | written, MB |", "|---|---|---|---|", *rows])


def append_to_log(block: str) -> None:
    """Newest first, under the header."""
    head, mark, older = LOG.read_text(encoding="utf-8").partition("\n## ")
    LOG.write_text(f"{head.rstrip()}\n\n{block}{mark}{older}", encoding="utf-8")
