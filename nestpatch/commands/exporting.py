"""The command that writes models in other formats: export."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from nestpatch.commands.options import PathType, json_option, progress, quiet_option, report


def _to_gguf(model: Path, patch: Path | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.patcher.export import export_gguf

    return export_gguf(model, output, patch, **options)


TARGETS: dict[str, Callable[[Path, Path | None, Path | None, Mapping[str, Any]], Any]] = {"gguf": _to_gguf}
"""What `--to` may name -> the function that exports to it."""


@contextmanager
def _unwinding() -> Iterator[None]:
    """A polite kill ends the command like an error: no gigabytes of temporary files stay behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command()
@click.argument("model", type=PathType)
@click.argument("patch", type=PathType, required=False)
@click.option("--to", "target", type=click.Choice(sorted(TARGETS)), required=True, help="The format to write.")
@click.option("-o", "--output", type=PathType, help="Where to write.  [default: beside the model, named after it]")
@click.option(
    "--type", "type_", default="auto", show_default=True, help="Of the weights: f32, f16, bf16, q8_0, or q4_k_m and the like."
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the patch, over 0 and up to 1.5.")
@click.option("--name", help="What the file calls the model.  [default: the name of its directory]")
@click.option("--llama-cpp", type=PathType, help="A checkout of llama.cpp: use its converter, for models unknown here.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@quiet_option
@json_option
def export(
    model: Path,
    patch: Path | None,
    target: str,
    output: Path | None,
    type_: str,
    strength: float,
    name: str | None,
    llama_cpp: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL in another format, with PATCH merged into it on the way.

    --to gguf makes a file for llama.cpp and what is built on it. MODEL is a safetensors model directory and stays as it is.
    """
    if patch is None and strength != 1.0:
        raise click.UsageError("--strength goes with a PATCH")
    with progress(quiet or as_json) as on_event, _unwinding():
        options = {"strength": strength, "type": type_, "name": name, "llama_cpp": llama_cpp, "dry_run": dry_run}
        done = TARGETS[target](model, patch, output, {**options, "on_event": on_event})
    report(done, "show_exported", as_json)
