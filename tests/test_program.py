"""How the process of `nestpatch` ends: with its exit code and all of its output, after what other modules have left to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def end_of(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python process that runs the program after some code."""
    program = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}\nfrom nestpatch.__main__ import run\nrun()"
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["--version"], 0, "nestpatch, version"),
        (["show", __file__], 1, "test_program.py"),
        (["aply"], 2, "Did you mean 'apply'"),
    ],
)
def test_the_exit_code_and_the_output_arrive(words: list[str], code: int, shown: str) -> None:
    done = end_of("", *words)
    assert done.returncode == code
    assert shown in done.stdout + done.stderr


def test_threads_and_exit_handlers_of_other_modules_come_first() -> None:
    late = """
import atexit, threading, time
def work():
    time.sleep(0.3)
    print("the thread has ended")
threading.Thread(target=work).start()
import nestpatch.__main__, nestpatch.cli
inner = nestpatch.cli.main
def main(**options):
    atexit.register(print, "the handler has run")
    inner(**options)
nestpatch.cli.main = main"""
    done = end_of(late, "--version")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == ["the thread has ended", "the handler has run"]


def test_an_exception_that_nobody_caught_is_reported() -> None:
    broken = """
import nestpatch.cli
def main(**options):
    raise RuntimeError("a mistake")
nestpatch.cli.main = main"""
    done = end_of(broken, "--version")
    assert done.returncode == 1
    assert "RuntimeError: a mistake" in done.stderr
