"""Runs under the shim: imports nestpatch once, then forks a process for every command that is run, stopped or killed.

Reads requests and writes answers, one JSON object a line. It never looks into a command: the shim stops it from within, and
this process, which stands outside, kills it or lets it go on.
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from nestpatch.channels import follow, publish  # noqa: F401
from nestpatch.cli import main
from nestpatch.export import adapters  # noqa: F401
from nestpatch.patcher import apply, fleet, inplace, update, verify  # noqa: F401
from nestpatch.views import models, packs  # noqa: F401

PR_SET_PDEATHSIG = 1
CAPABILITY_VERSION_3 = 0x20080522
reports: dict[int, int] = {}
"""Child -> the pipe where it leaves its report."""


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Forks a child that runs one command."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        report = run_command(request)
        os.write(writing, json.dumps(report).encode())
        os._exit(0)
    os.close(writing)
    reports[child] = reading
    return {"child": child}


def run_command(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: runs the command line with these arguments, and reports how it ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background of a shell
    system = ctypes.CDLL(None)
    system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if request["powerless"]:
        give_up_power(system)
    if request["home"]:
        os.environ["NESTPATCH_HOME"] = request["home"]
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND) if request["log"] else -1
    stop, fail = (ctypes.c_long(request[key]) for key in ("stop_at", "fail_at"))
    folder, code, crash = os.fsencode(request["folder"]), 0, ""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        shim.fault_arm(folder, stop, int(request["tear"]), fail, request["error"], int(request["dead"]), log)
        try:
            main(args=request["args"], prog_name="nestpatch")
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:  # noqa: BLE001 - it is reported
            code, crash = 1, traceback.format_exc()[-4000:]
        finally:
            shim.fault_disarm()
    return {"code": code, "crash": crash, "out": out.getvalue()[-8000:], "err": err.getvalue()[-8000:]}


def give_up_power(system: Any) -> None:
    """Drops the capabilities by which root writes read-only files."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if system.capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def wait(request: dict[str, Any]) -> dict[str, Any]:
    """Waits until a child has stopped or ended."""
    child = request["child"]
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        return {"how": "stopped"}
    with os.fdopen(reports.pop(child), "rb") as pipe:
        report = pipe.read()
    if os.WIFSIGNALED(status):
        return {"how": "killed"}
    return {"how": "ended", **json.loads(report)}


def send(request: dict[str, Any]) -> dict[str, Any]:
    """Sends a child a signal."""
    os.kill(request["child"], request["signal"])
    return {}


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    gc.freeze()  # children that never collect what they share with this process need not copy it
    for line in sys.stdin:
        request = json.loads(line)
        answer = {"start": start, "wait": wait, "send": send}[request["do"]](request)
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    serve()
