"""One model in every runtime: `python -m bench.runtimes model.gguf PACK`.

MODEL is a GGUF file that the pack fits. A copy is patched in place. Its weights are measured as a bfloat16 directory in
transformers, as the file in llama.cpp, as ONNX in float32, and as a float16 GGUF file that llama-cpp-python's server serves on
the loopback; and in two coarser types, GGUF Q8_0 and ONNX int4. The table has refusals in percent for every form and suite, and
how far they are from those of the directory. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nestpatch
from nestpatch.errors import EndpointError
from nestpatch.evaluation.scores import Scores
from nestpatch.evaluation.suites import Suite
from nestpatch.runtimes.connection import EndpointSettings
from nestpatch.runtimes.served import ServedRuntime

_START_SECONDS = 120


@contextmanager
def served(file: Path) -> Iterator[str]:
    """llama-cpp-python's server; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(file), "--n_ctx", "2048", "--host", "127.0.0.1", "--port", str(port), "--verbose", "False"]
    command = [sys.executable, "-m", "llama_cpp.server", *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield _answering(f"http://127.0.0.1:{port}/v1", process)
        finally:
            process.terminate()


def _answering(url: str, process: subprocess.Popen[bytes]) -> str:
    """The address, as soon as the server answers."""
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            ServedRuntime(url, EndpointSettings(timeout=5)).close()
        except EndpointError:
            if process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return url


def forms(patched: Path, folder: Path) -> dict[str, Callable[[], Path]]:
    """Name -> what makes the form of the patched model, in the order of the table."""
    floats = folder / "floats"

    def gguf(kind: str) -> Path:
        nestpatch.export_gguf(floats, output=folder / f"{kind}.gguf", type=kind)
        return folder / f"{kind}.gguf"

    def onnx(bits: int | None) -> Path:
        nestpatch.export_onnx(floats, output=folder / f"onnx-{bits}", bits=bits, dtype="fp32")
        return folder / f"onnx-{bits}"

    def directory() -> Path:
        nestpatch.export_safetensors(patched, output=floats)
        return floats

    return {
        "transformers, bfloat16": directory,
        "llama.cpp, the file": lambda: patched,
        "onnxruntime, float32": lambda: onnx(None),
        "llama.cpp, Q8_0": lambda: gguf("q8_0"),
        "onnxruntime, int4": lambda: onnx(4),
    }


def refusals(scores: Scores) -> dict[str, float]:
    """Suite -> refusals in percent."""
    return {suite.suite: round(100 * suite.refused.value, 1) for suite in scores.suites}


def measure(name: str, model: Path | str, suites: list[Suite]) -> dict[str, float]:
    """One row of the table."""
    began = time.perf_counter()
    found = refusals(nestpatch.evaluate(model, suites).model)
    print(f"{name}: {found}, {time.perf_counter() - began:.0f} s", flush=True)
    return found


def main() -> None:
    """Makes every form of the model in a temporary folder, and measures it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--limit", type=int, default=50, help="prompts of each built-in suite")
    given = parser.parse_args()
    suites, rows = nestpatch.builtin_suites(given.limit), {}
    with tempfile.TemporaryDirectory() as room:
        patched = Path(shutil.copy(given.model, room))
        nestpatch.apply_in_place(patched, given.pack, trust="none")
        for name, make in forms(patched, Path(room)).items():
            rows[name] = measure(name, make(), suites)
        # Not the file itself: this server cannot be told to leave weights as they are, and its build for AMX crashes on Q4_1.
        nestpatch.export_gguf(Path(room) / "floats", output=Path(room) / "served.gguf", type="f16")
        with served(Path(room) / "served.gguf") as url:
            rows["a server, float16"] = measure("a server, float16", url, suites)
    names = list(next(iter(rows.values())))
    first = rows["transformers, bfloat16"]
    print(f"| refusals, % | {' | '.join(names)} | largest difference |\n|---|{'---|' * len(names)}---|")
    for name, row in rows.items():
        cells = " | ".join(f"{row[suite]:g}" for suite in names)
        print(f"| {name} | {cells} | {max(abs(row[suite] - first[suite]) for suite in names):.1f} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
