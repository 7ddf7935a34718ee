"""The program `nestpatch`, which is also `python -m nestpatch`: how its process begins and ends."""

from __future__ import annotations

import atexit
import gc
import os
import sys

_YOUNG = 10_000
"""New objects after which Python looks for garbage. Its own 700 have it search the imported modules a hundred times, in vain:
10 of 150 ms."""
_SLOTS = 16_384
"""Of 8 bytes each, in the first frame."""
_ENDING = frozenset({"torch", "llama_cpp", "onnxruntime"})
"""Modules whose libraries have an end of their own."""


def run() -> None:
    """Runs the command line in `sys.argv`, and exits."""
    gc.set_threshold(_YOUNG)
    ended: list[int] = []
    # What is registered first is called last: after all threads and the handlers of other modules.
    atexit.register(_leave, ended)
    from nestpatch.cli import main

    try:
        main(prog_name="nestpatch")
    except SystemExit as end:
        ended.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise


def _leave(ended: list[int]) -> None:
    """Ends the process before Python takes its modules apart, which would take numpy's 16 ms and change nothing."""
    if not ended or _ENDING & sys.modules.keys():
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python reports it
    os._exit(ended[0])


# CPython keeps frames in pieces of 16 kB and frees a piece as soon as a call returns from it. A loop whose calls cross the end
# of a piece asks the system for memory each time: importing numpy from within click takes 10 to 30 ms longer. A first frame of
# this size has a piece of 256 kB around it, with room for some 400 frames. Its pages are never touched.
run.__code__ = run.__code__.replace(co_stacksize=_SLOTS)

if __name__ == "__main__":
    run()
