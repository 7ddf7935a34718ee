"""The command that writes models in other formats: export."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click

from nestpatch.commands.options import PathType, json_option, print_json, progress, quiet_option
from nestpatch.events import OnEvent


def _to_gguf(model: Path, patch: Path | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.patcher.export import export_gguf

    return export_gguf(model, output, patch, **options)


def _to_safetensors(model: Path, patch: Path | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.patcher.export import export_safetensors

    _refuse(options, "name", "llama_cpp", "type")
    return export_safetensors(model, output, patch, **{name: options[name] for name in ("strength", "dry_run", "on_event")})


def _refuse(options: Mapping[str, Any], *names: str) -> None:
    """Raises UsageError for options that say something of GGUF files alone."""
    given = [f"--{name.replace('_', '-')}" for name in names if options[name] not in (None, "auto")]
    if given:
        raise click.UsageError(f"{', '.join(given)} go with --to gguf")


def _to_adapter(kind: str, model: Path, patch: Path | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    """MODEL PATCH, or PATCH alone: the model is only needed to count experts."""
    from nestpatch.patcher.adapters import export_gguf_lora, export_lora

    write = export_gguf_lora if kind == "gguf-lora" else export_lora
    _refuse(options, "name", "llama_cpp", "type")
    pack, base = (model, None) if patch is None else (patch, model)
    return write(pack, output, options["strength"], model=base, dry_run=options["dry_run"])


TARGETS: dict[str, Callable[[Path, Path | None, Path | None, Mapping[str, Any]], Any]] = {
    "gguf": _to_gguf,
    "gguf-lora": partial(_to_adapter, "gguf-lora"),
    "lora": partial(_to_adapter, "lora"),
    "safetensors": _to_safetensors,
}
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
@click.option("--check", is_flag=True, help="Run the file in llama.cpp and compare it with MODEL in transformers.")
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
    check: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL in another format, with PATCH merged into it on the way.

    --to gguf makes a file for llama.cpp and what is built on it. MODEL is a safetensors model directory and stays as it is.

    --to safetensors writes a release of its own, whose files say which patches they hold; it cannot be reverted.

    --to lora and --to gguf-lora write PATCH as an adapter that is loaded with the base: a directory for PEFT and vLLM, a file
    for llama.cpp. Give MODEL before PATCH where it stores experts one by one, else PATCH alone.
    """
    if check and (target != "gguf" or dry_run):
        raise click.UsageError("--check runs what --to gguf wrote")
    if patch is None and strength != 1.0:
        raise click.UsageError("--strength goes with a PATCH")
    with progress(quiet or as_json) as on_event, _unwinding():
        options = {"strength": strength, "type": type_, "name": name, "llama_cpp": llama_cpp, "dry_run": dry_run}
        if check:
            from nestpatch.nest_train.check import require_check

            require_check()
        done = TARGETS[target](model, patch, output, {**options, "on_event": on_event})
        found = _checked(done.path, model, patch, strength, on_event) if check else None
    _show(target, done, found, as_json)
    sys.exit(0 if found is None or found.passed else 1)


def _checked(file: Path, model: Path, patch: Path | None, strength: float, on_event: OnEvent) -> Any:
    from nestpatch.formats import nest
    from nestpatch.nest_train.check import check_gguf

    pack = nest.read(patch) if patch is not None else None
    return check_gguf(file, model, patch=pack, strength=strength, on_event=on_event)


def _show(target: str, done: Any, found: Any, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(done) | ({"check": found.as_json()} if found is not None else {}))
        return
    from nestpatch import views, views_adapters

    (views_adapters.show_adapter if "lora" in target else views.show_exported)(done)
    if found is not None:
        views_adapters.show_check(found)
