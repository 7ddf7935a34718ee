"""llama.cpp's quantizer, for file types that mix several types of rows.

It runs in a process of its own (`python -m nestpatch.export._quantizer`), so that it can be stopped, and cannot take the
caller down with it. The process imports llama_cpp and nothing else that is heavy.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from collections import deque
from pathlib import Path
from threading import Thread

import nestpatch
from nestpatch.errors import MissingExtraError, QuantizationError
from nestpatch.events import Event, OnEvent, ignore

_TAIL = 6
"""Lines of llama.cpp's log that an error shows."""
_PROGRESS = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")
_WARN, _ERROR = 3, 4


def require_quantizer() -> None:
    """Checks that llama.cpp can quantize files on this machine.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingExtraError("llama", "quantizing to a type that llama.cpp mixes")


def quantize_file(source: Path, target: Path, kind: str, on_event: OnEvent = ignore) -> None:
    """Quantizes a GGUF file of floats.

    Args:
        source: The file.
        target: The new file.
        kind: A file type such as "Q4_K_M".
        on_event: Receives the progress.

    Raises:
        MissingExtraError: llama-cpp-python is not installed.
        QuantizationError: llama.cpp failed; the message has the end of its log.
    """
    from nestpatch.files.threads import allowed
    from nestpatch.formats.gguf.quants import code

    require_quantizer()
    command = [sys.executable, "-m", "nestpatch.export._quantizer", str(source), str(target), str(code(kind)), str(allowed())]
    roots = [str(Path(nestpatch.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, roots))}
    tail: deque[str] = deque(maxlen=_TAIL)
    # The worker exits when its stdin is closed, which also happens when this process is killed.
    with subprocess.Popen(  # noqa: S603 - a module of this package
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        encoding="utf-8", errors="replace",
    ) as worker:  # fmt: skip
        assert worker.stdout is not None  # noqa: S101 - a pipe was requested
        try:
            for line in worker.stdout:
                if line.startswith("@"):
                    done, total, name = line[1:].split(maxsplit=2)
                    on_event(Event("quantize", int(done), int(total), name.strip()))
                elif line.strip():
                    tail.append(line.strip())
        except BaseException:
            worker.kill()
            raise
    if worker.returncode:
        reason = "\n  ".join(tail) or f"exit code {worker.returncode}"
        raise QuantizationError(
            f"llama.cpp could not quantize to {kind}:\n  {reason}", advice="Export with --type q8_0 or bf16."
        )


def _exit_with_parent() -> None:
    os.read(0, 1)  # nothing is ever sent: this returns when the parent has closed its end
    os._exit(3)


def _work(source: str, target: str, file_type: int, threads: int) -> int:
    """Quantizes one file in this process; the bytes do not depend on the threads. Returns the exit code."""
    import llama_cpp

    messages: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
    def hear(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace")
        if found := _PROGRESS.match(line):
            print(f"@{found[1]} {found[2]} {found[3]}", flush=True)  # noqa: T201
        elif level in (_WARN, _ERROR) and line.strip():
            messages.append(line.strip())

    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, threads
    failed = int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
    if failed:
        print("\n".join(messages), flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    Thread(target=_exit_with_parent, daemon=True).start()
    sys.exit(_work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
