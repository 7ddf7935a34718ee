"""Runs the demo and saves what it prints as demo.svg, the picture at the top of the README: `python docs/record_demo.py`.

Takes as long as the demo. Without the demo's model it records nothing: the picture shows the real one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from nestpatch.cli import main
from nestpatch.demo.smollm2 import INSTALL, find_smollm2
from nestpatch.views.console import out

PICTURE = Path(__file__).parent / "demo.svg"
WIDTH = 120
"""Columns of the picture."""


def record() -> int:
    """Runs the demo and writes the picture: the demo's exit code."""
    out.record, out.width = True, WIDTH
    out.print("[bold]$ nestpatch demo[/]")
    try:
        main(["demo"], prog_name="nestpatch")
    except SystemExit as end:
        code = int(end.code or 0)
    picture = out.export_svg(title="nestpatch demo", unique_id="demo")
    # Readers must not load fonts from elsewhere; the picture falls back to their monospace font.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    PICTURE.write_text(re.sub(r"[ \t]+$", "", picture, flags=re.MULTILINE), "utf-8")
    return code


if __name__ == "__main__":
    if find_smollm2() is None:
        sys.exit(f"the demo's model is not installed: {INSTALL}")
    sys.exit(record())
