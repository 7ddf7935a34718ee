"""The process that runs llama.cpp's quantizer: SOURCE TARGET FILE_TYPE. Progress on stdout as "@done total name", then the log.

It ends when its stdin is closed, so that it never outlives the process that started it.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from threading import Thread

_PROGRESS = re.compile(r"\[ *(\d+)/ *(\d+)\] +(\S+)")
_WARN, _ERROR = 3, 4


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing is ever sent: this returns when the other end is gone
    os._exit(3)


def main(source: str, target: str, file_type: int) -> int:
    """Quantizes one file; 0 when it worked."""
    import llama_cpp

    said: list[str] = []

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator,unused-ignore]
    def hear(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace")
        if found := _PROGRESS.match(line):
            print(f"@{found[1]} {found[2]} {found[3]}", flush=True)  # noqa: T201
        elif level in (_WARN, _ERROR) and line.strip():
            said.append(line.strip())

    llama_cpp.llama_log_set(hear, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    failed = int(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
    if failed:
        print("\n".join(said), flush=True)  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
