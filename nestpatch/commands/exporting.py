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

Options = Mapping[str, Any]
OWN = {
    "gguf": {"type", "name", "llama_cpp", "check"},
    "onnx": {"dtype", "int4", "int8", "adapter_ready"},
    "onnx-adapter": {"for_model"},
}
"""Options that only one target has; all others are everybody's."""
EVERYBODY = ("strength", "dry_run", "on_event")


def _to_gguf(model: Path, patch: Path | None, output: Path | None, options: Options) -> Any:
    from nestpatch.patcher.export import export_gguf

    own = {name: options[name] for name in ("type", "name", "llama_cpp")}
    return export_gguf(model, output, patch, **own, **_common(options))


def _to_safetensors(model: Path, patch: Path | None, output: Path | None, options: Options) -> Any:
    from nestpatch.patcher.export import export_safetensors

    return export_safetensors(model, output, patch, **_common(options))


def _to_onnx(model: Path, patch: Path | None, output: Path | None, options: Options) -> Any:
    from nestpatch.onnx_export.to_onnx import export_onnx

    if options["int4"] and options["int8"]:
        raise click.UsageError("--int4 or --int8, not both")
    bits = 4 if options["int4"] else 8 if options["int8"] else None
    own = {"dtype": options["dtype"], "bits": bits, "adapter_ready": options["adapter_ready"]}
    return export_onnx(model, output, patch, **own, **_common(options))


def _to_adapter(kind: str, model: Path, patch: Path | None, output: Path | None, options: Options) -> Any:
    """MODEL PATCH, or PATCH alone: the model is only needed to count experts."""
    from nestpatch.patcher.adapters import export_gguf_lora, export_lora

    write = export_gguf_lora if kind == "gguf-lora" else export_lora
    pack, base = (model, None) if patch is None else (patch, model)
    return write(pack, output, options["strength"], model=base, dry_run=options["dry_run"])


def _to_onnx_adapter(model: Path, patch: Path | None, output: Path | None, options: Options) -> Any:
    """PATCH alone: the ONNX model is named by --for."""
    from nestpatch.patcher.adapters import export_onnx_adapter

    if patch is not None or options["for_model"] is None:
        raise click.UsageError("nestpatch export PATCH --to onnx-adapter --for DIR, a model that was exported --adapter-ready")
    return export_onnx_adapter(model, options["for_model"], output, options["strength"], dry_run=options["dry_run"])


def _common(options: Options) -> dict[str, Any]:
    return {name: options[name] for name in EVERYBODY}


def _refuse_foreign(target: str, options: Options, context: click.Context) -> None:
    """Raises UsageError for options that say something of another target's files."""
    for owner, names in OWN.items():
        for name in sorted(names if owner != target else ()):
            if name in options and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_model', '').replace('_', '-')} goes with --to {owner}")


TARGETS: dict[str, Callable[[Path, Path | None, Path | None, Options], Any]] = {
    "gguf": _to_gguf,
    "gguf-lora": partial(_to_adapter, "gguf-lora"),
    "lora": partial(_to_adapter, "lora"),
    "onnx": _to_onnx,
    "onnx-adapter": _to_onnx_adapter,
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
    "--type", default="auto", show_default=True, help="GGUF: type of the weights: f32, f16, bf16, q8_0, q4_k_m and the like."
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the patch, over 0 and up to 1.5.")
@click.option("--name", help="GGUF: what the file calls the model.  [default: its directory's name]")
@click.option("--llama-cpp", type=PathType, help="GGUF: a checkout of llama.cpp, to use its converter.")
@click.option("--check", is_flag=True, help="GGUF: run the file in llama.cpp and compare it with MODEL in transformers.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="ONNX: of the weights.")
@click.option("--int4", is_flag=True, help="ONNX: quantize the matrices to 4 bits.")
@click.option("--int8", is_flag=True, help="ONNX: quantize the matrices to 8 bits.")
@click.option("--adapter-ready", is_flag=True, help="ONNX: make a base that takes patches at run time.")
@click.option("--for", "for_model", type=PathType, help="ONNX adapter: the adapter-ready model that it is for.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@quiet_option
@json_option
@click.pass_context
def export(
    context: click.Context,
    /,
    model: Path,
    patch: Path | None,
    target: str,
    output: Path | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write MODEL in another format, with PATCH merged into it on the way. MODEL is a safetensors model and stays as it is.

    --to gguf makes a file for llama.cpp and what is built on it, --to onnx a directory for onnxruntime, onnxruntime-genai and
    transformers.js.

    --to safetensors writes a release of its own, whose files say which patches they hold; it cannot be reverted.

    --to lora, --to gguf-lora and --to onnx-adapter write PATCH as an adapter that is loaded with the base: a directory for PEFT
    and vLLM, a file for llama.cpp, one for onnxruntime. Give PATCH alone; MODEL before it where it stores experts one by one.
    """
    _refuse_foreign(target, options, context)
    if options["check"] and options["dry_run"]:
        raise click.UsageError("--check runs what was written")
    if patch is None and options["strength"] != 1.0 and target in ("gguf", "onnx", "safetensors"):
        raise click.UsageError("--strength goes with a PATCH")
    with progress(quiet or as_json) as on_event, _unwinding():
        if options["check"]:
            from nestpatch.nest_train.check import require_check

            require_check()
        done = TARGETS[target](model, patch, output, {**options, "on_event": on_event})
        found = _checked(done.path, model, patch, options["strength"], on_event) if options["check"] else None
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

    shows: dict[str, Callable[[Any], None]] = {
        "gguf": views.show_exported,
        "safetensors": views.show_exported,
        "onnx": views_adapters.show_onnx,
    }
    shows.get(target, views_adapters.show_adapter)(done)
    if found is not None:
        views_adapters.show_check(found)
