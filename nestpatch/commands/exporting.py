"""The command that writes models in other formats: export."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nestpatch.commands._options import (
    OutputPath,
    PackType,
    PathType,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    say_unchecked,
    trust_options,
)
from nestpatch.events import Event, OnEvent

if TYPE_CHECKING:
    from nestpatch.gate import Proven


def _to_gguf(model: Path, pack: Proven | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.models import export_gguf

    own = ("strength", "type", "name", "llama_cpp", "dry_run", "on_event")
    return export_gguf(model, output, pack, **{name: options[name] for name in own})


def _to_safetensors(model: Path, pack: Proven | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.models import export_safetensors

    own = ("strength", "dry_run", "on_event")
    return export_safetensors(model, output, pack, **{name: options[name] for name in own})


def _to_onnx(model: Path, pack: Proven | None, output: Path | None, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.onnx.exporter import export_onnx

    own = {name: options[name] for name in ("strength", "bits", "adapter_ready", "dry_run", "on_event")}
    return export_onnx(model, output, pack, dtype=options["dtype"] or "fp32", **own)


def _to_onnx_adapter(model: Path, pack: Proven, output: Path, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.adapters import export_onnx_adapter

    return export_onnx_adapter(pack, model, output, options["strength"], dry_run=options["dry_run"])


def _to_lora(model: Path | None, pack: Proven, output: Path, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.adapters import export_lora

    return export_lora(pack, output, options["strength"], model=model, dry_run=options["dry_run"])


def _to_gguf_lora(model: Path | None, pack: Proven, output: Path, options: Mapping[str, Any]) -> Any:
    from nestpatch.export.adapters import export_gguf_lora

    return export_gguf_lora(pack, output, options["strength"], model=model, dry_run=options["dry_run"])


_OWN = {
    "type": "gguf", "name": "gguf", "llama_cpp": "gguf", "dtype": "onnx", "bits": "onnx", "adapter_ready": "onnx",
    "for_": "onnx-adapter",
}  # fmt: skip
"""Options that one target alone understands."""
_FLAGS = {"bits": "--int4 or --int8", "for_": "--for"}


def _refuse_others(target: str, options: Mapping[str, Any]) -> None:
    """Raises UsageError for options that say something of another target alone."""
    foreign = {name: own for name, own in _OWN.items() if own != target and options[name] not in (None, False, "auto")}
    for owner in foreign.values():
        given = [_FLAGS.get(name, f"--{name.replace('_', '-')}") for name, own in foreign.items() if own == owner]
        raise click.UsageError(f"{', '.join(given)} go with --to {owner}")


ADAPTERS = ("gguf-lora", "lora", "onnx-adapter")
TARGETS: dict[str, Callable[..., Any]] = {
    "gguf": _to_gguf,
    "gguf-lora": _to_gguf_lora,
    "lora": _to_lora,
    "onnx": _to_onnx,
    "onnx-adapter": _to_onnx_adapter,
    "safetensors": _to_safetensors,
}
"""What `--to` may name -> the function that exports to it."""


def _sides(target: str, model: str, pack: str | None, ready: Path | None) -> tuple[Path | None, str | None]:
    """(the model, the patch). Adapters are made of MODEL PACK or of PACK alone; for ONNX, of PACK --for ONNX too."""
    if target == "onnx-adapter":
        if (pack is None) == (ready is None):
            raise click.UsageError("say which ONNX model the adapter is for: nestpatch export PACK --to onnx-adapter --for DIR")
        return (ready, model) if pack is None else (Path(model), pack)
    if target in ADAPTERS and pack is None:
        return None, model
    return Path(model), pack


def _place(target: str, output: Path | None, pack: str | None, done: Proven | None) -> Path | None:
    """Where the export goes, where the command has a say in that: an adapter beside the pack's file."""
    if output is not None or target not in ADAPTERS or pack is None or done is None:
        return output
    from nestpatch.export.adapters import default_output

    return default_output(pack, done.pack, target)


@contextmanager
def _unwinding(on_event: OnEvent) -> Iterator[OnEvent]:
    """A polite kill ends the command like an error: no gigabytes of temporary files stay behind.

    torch swallows the exit at some places of its tracer; the next event then brings it back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield on_event
        return
    asked = threading.Event()

    def end(*_: object) -> None:
        asked.set()
        sys.exit(128 + signal.SIGTERM)

    def hear(event: Event) -> None:
        if asked.is_set():
            end()
        on_event(event)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield hear
    finally:
        signal.signal(signal.SIGTERM, before)


@click.command()
@click.argument("model", type=PackType)
@click.argument("pack", type=PackType, required=False)
@click.option("--to", "target", type=click.Choice(sorted(TARGETS)), required=True, help="The format to write.")
@click.option("-o", "--output", type=OutputPath, help="Where to write.  [default: beside the model, named after it]")
@click.option(
    "--type", "type_", default="auto", show_default=True, help="Of the weights: f32, f16, bf16, q8_0, or q4_k_m and the like."
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the patch, over 0 and up to 1.5.")
@click.option("--name", help="What the file calls the model.  [default: the name of its directory]")
@click.option("--llama-cpp", type=PathType, help="A checkout of llama.cpp: use its converter, for models unknown here.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="Of an ONNX model's weights.  [default: fp32]")
@click.option("--int4", "bits", flag_value=4, type=int, help="Quantize an ONNX model's matrices to 4 bits.")
@click.option("--int8", "bits", flag_value=8, type=int, help="Quantize an ONNX model's matrices to 8 bits.")
@click.option("--adapter-ready", is_flag=True, help="Make an ONNX model that takes patches at run time.")
@click.option("--for", "for_", type=PathType, metavar="DIR", help="The adapter-ready ONNX model that an adapter is for.")
@click.option("--check", is_flag=True, help="Run the file in llama.cpp and compare it with MODEL in transformers.")
@click.option("--dry-run", is_flag=True, help="Check everything and write nothing.")
@trust_options
@quiet_option
@json_option
def export(
    model: str,
    pack: str | None,
    target: str,
    output: Path | None,
    type_: str,
    strength: float,
    name: str | None,
    llama_cpp: Path | None,
    dtype: str | None,
    bits: int | None,
    adapter_ready: bool,
    for_: Path | None,
    check: bool,
    dry_run: bool,
    policy_file: Path | None,
    allow_unsigned: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL in another format, with PACK merged into it on the way.

    --to gguf makes a file for llama.cpp and what is built on it. MODEL is a safetensors model directory and stays as it is.

    --to safetensors writes a release of its own, whose files say which patches they hold; it cannot be reverted.

    --to lora and --to gguf-lora write PACK as an adapter that is loaded with the base: a directory for PEFT and vLLM, a file
    for llama.cpp. Give MODEL before PACK where it stores experts one by one, else PACK alone.

    --to onnx makes a directory for onnxruntime, onnxruntime-genai and transformers.js, run and compared with MODEL before it
    gets its name. --to onnx-adapter writes PACK for one that was made with --adapter-ready, which stays as it is.

    PACK is a file, or hub://owner/name[@VERSION] and other channels. Its signatures are checked first.
    """
    if check and (target != "gguf" or dry_run):
        raise click.UsageError("--check runs what --to gguf wrote")
    if pack is None and strength != 1.0 and target in ("gguf", "onnx", "safetensors"):
        raise click.UsageError("--strength goes with a PACK")
    with progress(quiet or as_json) as drawn, _unwinding(drawn) as on_event:
        options = {"strength": strength, "type": type_, "name": name, "llama_cpp": llama_cpp, "dry_run": dry_run}
        options |= {"dtype": dtype, "bits": bits, "adapter_ready": adapter_ready, "for_": for_}
        _refuse_others(target, options)
        source, text = _sides(target, model, pack, for_)
        if check:
            from nestpatch.evaluation.parity import require_check

            require_check()
        passed = None
        if text is not None:
            passed = proven(text, source, policy_file, on_event, allow_unsigned=allow_unsigned)
        place = _place(target, output, text, passed)
        done = TARGETS[target](source, passed, place, {**options, "on_event": on_event})
        found = _checked(done.path, Path(model), passed, strength, on_event) if check else None
    say_unchecked(passed)
    _show(target, done, found, as_json)
    sys.exit(0 if found is None or found.passed else 1)


def _checked(file: Path, model: Path, pack: Proven | None, strength: float, on_event: OnEvent) -> Any:
    from nestpatch.evaluation.parity import check_gguf

    return check_gguf(file, model, pack=pack.pack if pack else None, strength=strength, on_event=on_event)


def _show(target: str, done: Any, found: Any, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(done) | ({"check": found.as_json()} if found is not None else {}))
        return
    from nestpatch.views import exporting as views

    if target == "onnx":
        views.show_exported_onnx(done)
    elif target in ("gguf", "safetensors"):
        views.show_exported(done)
    else:
        views.show_adapter(done)
    if found is not None:
        views.show_check(found)
