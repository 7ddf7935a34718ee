"""Runs `nestpatch train` in forked processes that stop at a chosen moment, where the test kills them.

Started as a program that imports PyTorch once: reads one JSON request per line, answers with one JSON object per line. A child
stops itself (SIGSTOP) at the progress event or at the rename of a file that the request names; this process stands outside and
sends it the signal. Files of nestpatch appear by renaming, so a kill before each rename is a kill between any two writes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import click
import sklearn.cluster
import sklearn.linear_model  # noqa: F401
import torch
import transformers  # noqa: F401
from accelerate import Accelerator  # noqa: F401

from nestpatch.cli import main
from nestpatch.commands import training
from nestpatch.events import Event
from nestpatch.nest_train import _fit, _tune, plan, train  # noqa: F401
from nestpatch.views import evaluation  # noqa: F401
from nestpatch.views.progress import _Lines

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell


def stop_at_event(wanted: dict[str, Any]) -> None:
    """The process stops when progress has come that far."""

    @contextlib.contextmanager
    def progress(quiet: bool) -> Iterator[Any]:
        lines = _Lines()

        def listen(event: Event) -> None:
            lines(event)
            if event.stage == wanted["stage"] and event.done >= wanted["done"] and wanted["note"] in event.note:
                os.kill(os.getpid(), signal.SIGSTOP)

        yield listen

    training.progress = progress


def stop_at_rename(number: int, folder: str) -> None:
    """The process stops before it gives a file under the folder its final name, the given time."""
    left = [number]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and os.fspath(arguments[1]).startswith(folder):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)


def child(request: dict[str, Any], report: int) -> None:
    """Runs the command and reports how it ended."""
    if event := request.get("event"):
        stop_at_event(event)
    if number := request.get("rename"):
        stop_at_rename(number, request["folder"])
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main(args=request["args"], prog_name="nestpatch")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException as error:  # noqa: BLE001 - it is reported
            code = 1
            click.echo(f"TRACEBACK {error!r}", err=True)
    with open(report, "w") as pipe:
        json.dump({"code": code, "out": out.getvalue(), "err": err.getvalue()}, pipe)
    os._exit(0)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Forks a child; where it stops it gets the signal of the request."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(request, writing)
    os.close(writing)
    _, status = os.waitpid(pid, os.WUNTRACED)
    stopped = os.WIFSTOPPED(status)
    if stopped:
        os.kill(pid, request["signal"])
        os.kill(pid, signal.SIGCONT)
        with open(reading, closefd=False) as pipe:
            text = pipe.read()
        os.waitpid(pid, 0)
    else:
        with open(reading, closefd=False) as pipe:
            text = pipe.read()
    os.close(reading)
    return {"stopped": stopped, **(json.loads(text) if text else {"code": -1, "out": "", "err": ""})}


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")


if __name__ == "__main__":
    serve()
