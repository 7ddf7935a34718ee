"""`python -m nestpatch.nest_train` is `nestpatch train`, for launchers that start a module in many processes."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout

from nestpatch.cli import main
from nestpatch.nest_train import _ranks


def run() -> None:
    """Runs the command. Processes beside the first print nothing, unless theirs is the error that ends all."""
    if int(os.environ.get("RANK", "0")) == 0:
        main(["train", *sys.argv[1:]], prog_name="nestpatch")
    said = io.StringIO()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            main(["train", "--quiet", *sys.argv[1:]], prog_name="nestpatch")
    finally:
        if _ranks.HERE.spoke:
            sys.stderr.write(said.getvalue())


if __name__ == "__main__":
    run()
