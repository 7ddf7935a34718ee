"""Types that llama.cpp mixes itself. Its quantizer runs in a process of its own, so that it can be stopped, or die, alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import nestpatch
from nestpatch.errors import MissingExtraError, QuantizationError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.formats.export import gguf_types

_TAIL = 6
"""Lines of llama.cpp's log that an error shows."""


def require() -> None:
    """Raises MissingExtraError without llama-cpp-python."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtraError("llama", "quantizing to a type that llama.cpp mixes")


def quantize(source: Path, target: Path, kind: str, on_event: OnEvent = ignore) -> None:
    """Quantizes a GGUF file of floats to a file type such as "Q4_K_M".

    Raises MissingExtraError without llama-cpp-python, QuantizationError with the end of llama.cpp's log when it fails.
    """
    require()
    command = [sys.executable, "-m", "nestpatch.formats.export.quantize_worker"]
    command += [str(source), str(target), str(gguf_types.code(kind))]
    roots = [str(Path(nestpatch.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    tail: deque[str] = deque(maxlen=_TAIL)
    # The worker ends itself when its stdin closes: also when this process is killed.
    with subprocess.Popen(  # noqa: S603 - a module of ours
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        encoding="utf-8", errors="replace",
    ) as worker:  # fmt: skip
        try:
            _listen(worker, tail, on_event)
        except BaseException:
            worker.kill()
            raise
    if worker.returncode:
        reason = "\n  ".join(tail) or f"exit code {worker.returncode}"
        raise QuantizationError(
            f"llama.cpp could not quantize to {kind}:\n  {reason}", advice="Export with --type q8_0 or bf16."
        )


def _listen(worker: subprocess.Popen[str], tail: deque[str], on_event: OnEvent) -> None:
    assert worker.stdout is not None  # noqa: S101 - it was asked for
    for line in worker.stdout:
        if line.startswith("@"):
            done, total, name = line[1:].split(maxsplit=2)
            on_event(Event("quantize", int(done), int(total), name.strip()))
        elif line.strip():
            tail.append(line.strip())
