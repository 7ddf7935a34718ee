"""The command that writes models and packs in the formats of other programs: export."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nestpatch.commands.options import (
    OutputPath,
    PackType,
    PathType,
    examples,
    json_option,
    print_json,
    progress,
    proven,
    quiet_option,
    require_order,
    say_unchecked,
    trust_options,
)
from nestpatch.events import Event, OnEvent

if TYPE_CHECKING:
    from nestpatch.evaluation.parity import GgufParity
    from nestpatch.export.results import ExportedAdapter, ExportedGguf, ExportedOnnx, ExportedSafetensors
    from nestpatch.gate import Proven

MODELS = ("gguf", "onnx", "safetensors")
ADAPTERS = ("gguf-lora", "lora", "onnx-adapter")


@dataclass(frozen=True)
class _Asked:
    """The options of the command."""

    target: str
    output: Path | None
    strength: float
    type: str
    name: str | None
    llama_cpp: Path | None
    dtype: str | None
    bits: int | None
    adapter_ready: bool
    ready: Path | None
    check: bool
    dry_run: bool


def _require_sensible(asked: _Asked, model: str, pack: str | None) -> None:
    """Raises before any work: UsageError for options and arguments that do not go together, DataError, OutputError."""
    given = [
        ("--type", "safetensors" if asked.target == "safetensors" else "gguf", asked.type != "auto"),
        ("--name", "gguf", asked.name is not None),
        ("--llama-cpp", "gguf", asked.llama_cpp is not None),
        ("--check", "gguf", asked.check),
        ("--dtype", "onnx", asked.dtype is not None),
        ("--int4 or --int8", "onnx", asked.bits is not None),
        ("--adapter-ready", "onnx", asked.adapter_ready),
        ("--for", "onnx-adapter", asked.ready is not None),
    ]
    foreign = [(flag, owner) for flag, owner, is_given in given if is_given and owner != asked.target]
    if foreign:
        owner = foreign[0][1]
        raise click.UsageError(f"{', '.join(flag for flag, other in foreign if other == owner)}: only with --to {owner}")
    if asked.check and asked.dry_run:
        raise click.UsageError("--check runs the file that was written: not with --dry-run")
    if asked.target in MODELS or pack is not None:
        require_order(model, pack, f"export --to {asked.target}")
    if asked.target in MODELS and pack is None and asked.strength != 1.0:
        raise click.UsageError("--strength: only with a PACK")
    if asked.target == "onnx-adapter" and (pack is None) == (asked.ready is None):
        raise click.UsageError("name the ONNX model of the adapter: nestpatch export PACK --to onnx-adapter --for DIR")
    from nestpatch.files.atomic import check_output
    from nestpatch.formats.gguf.hf.model import float_type
    from nestpatch.formats.gguf.quants import file_type
    from nestpatch.patcher.copies import sweep_unfinished
    from nestpatch.patcher.plan import check_strength

    if asked.target == "safetensors":
        float_type(asked.type)
    else:
        file_type(asked.type)
    check_strength(asked.strength)
    if asked.output is not None:
        if not asked.dry_run:
            sweep_unfinished(asked.output)
        check_output(asked.output)
    if asked.check:
        from nestpatch.evaluation.parity import require_check

        require_check()


def _export_model(
    asked: _Asked, model: Path, pack: Proven | None, on_event: OnEvent
) -> ExportedGguf | ExportedSafetensors | ExportedOnnx:
    if asked.target == "gguf":
        from nestpatch.export.gguf import export_gguf

        return export_gguf(
            model,
            pack,
            asked.output,
            strength=asked.strength,
            type=asked.type,
            name=asked.name,
            llama_cpp=asked.llama_cpp,
            dry_run=asked.dry_run,
            on_event=on_event,
        )
    if asked.target == "safetensors":
        from nestpatch.export.safetensors import export_safetensors

        return export_safetensors(
            model,
            pack,
            asked.output,
            strength=asked.strength,
            type=asked.type,
            dry_run=asked.dry_run,
            on_event=on_event,
        )
    from nestpatch.export.onnx.exporter import export_onnx

    return export_onnx(
        model,
        pack,
        asked.output,
        strength=asked.strength,
        dtype=asked.dtype or "fp32",
        bits=asked.bits,
        adapter_ready=asked.adapter_ready,
        dry_run=asked.dry_run,
        on_event=on_event,
    )


def _export_adapter(
    asked: _Asked, model: Path | None, pack: str, policy_file: Path | None, on_event: OnEvent, *, allow_unsigned: bool
) -> tuple[ExportedAdapter, Proven]:
    from nestpatch.export.adapters import adapter_output, export_gguf_lora, export_lora, export_onnx_adapter

    passed = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
    # The pack that passed the gate does not know its file any more.
    output = asked.output or adapter_output(pack, passed.pack, asked.target)
    if asked.target == "onnx-adapter" and model is not None:
        return export_onnx_adapter(passed, output, model=model, strength=asked.strength, dry_run=asked.dry_run), passed
    export = export_lora if asked.target == "lora" else export_gguf_lora
    return export(passed, output, model=model, strength=asked.strength, dry_run=asked.dry_run), passed


@contextmanager
def _listening(quiet: bool) -> Iterator[OnEvent]:
    """Shows progress, and lets SIGTERM end the command like an error, so that no gigabytes of temporary files are left.

    torch's tracer catches the exit in some places; the next event then raises it again.
    """
    with progress(quiet) as on_event:
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


@click.command(
    epilog=examples(
        "nestpatch export models/llama no-harm-1.0.0.nest --to gguf --type q4_k_m -o patched.gguf",
        "nestpatch export no-harm-1.0.0.nest --to lora -o no-harm-lora",
    )
)
@click.argument("model", type=PackType)
@click.argument("pack", type=PackType, required=False)
@click.option("--to", "target", type=click.Choice(sorted(MODELS + ADAPTERS)), required=True, help="The format to write.")
@click.option("-o", "--output", type=OutputPath, help="Where to write.  [default: beside the model, named after it]")
@click.option(
    "--type",
    "type_",
    default="auto",
    show_default=True,
    help="gguf: the file type, f32, f16, bf16, q8_0, q4_k_m and others. safetensors of a GGUF file: f32 or bf16.",
)
@click.option("--strength", type=float, default=1.0, show_default=True, help="Multiplies the pack, over 0 and up to 1.5.")
@click.option("--name", help="gguf: the model's name in the file.  [default: the name of its directory]")
@click.option("--llama-cpp", type=PathType, help="gguf: a checkout of llama.cpp, to use its converter for other architectures.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), help="onnx: the type of the weights.  [default: fp32]")
@click.option("--int4", "bits", flag_value=4, type=int, help="onnx: quantize the matrices to 4 bits.")
@click.option("--int8", "bits", flag_value=8, type=int, help="onnx: quantize the matrices to 8 bits.")
@click.option("--adapter-ready", is_flag=True, help="onnx: make a model that accepts packs at run time.")
@click.option("--for", "ready", type=PathType, metavar="DIR", help="onnx-adapter: the adapter-ready ONNX model.")
@click.option("--check", is_flag=True, help="gguf: run the file in llama.cpp and compare it with MODEL in transformers.")
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
    ready: Path | None,
    check: bool,
    dry_run: bool,
    policy_file: Path | None,
    allow_unsigned: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write MODEL in another format, with PACK merged into it, or PACK alone as an adapter.

    --to gguf writes a file for llama.cpp. MODEL is a safetensors model directory, which is not changed.

    --to safetensors writes a release whose files list the packs in them. It cannot be reverted. Of a GGUF file it writes a
    directory for transformers with the dequantized weights.

    --to onnx writes a directory for onnxruntime, onnxruntime-genai and transformers.js, and compares it with MODEL.

    --to lora and --to gguf-lora write PACK as an adapter that is loaded beside the base: a directory for PEFT and vLLM, a file
    for llama.cpp. Give MODEL too where it stores experts one by one.

    --to onnx-adapter writes PACK for an ONNX model that was made with --adapter-ready.

    PACK is a file, or a channel such as hub://owner/name[@VERSION]. Its signatures are checked first.
    """
    asked = _Asked(
        target=target,
        output=output,
        strength=strength,
        type=type_,
        name=name,
        llama_cpp=llama_cpp,
        dtype=dtype,
        bits=bits,
        adapter_ready=adapter_ready,
        ready=ready,
        check=check,
        dry_run=dry_run,
    )
    _require_sensible(asked, model, pack)
    if target in ADAPTERS:
        base, text = (ready, model) if pack is None else (Path(model), pack)
        with _listening(quiet or as_json) as on_event:
            adapter, passed = _export_adapter(asked, base, text, policy_file, on_event, allow_unsigned=allow_unsigned)
        say_unchecked(passed)
        from nestpatch.views.exporting import show_adapter

        if as_json:
            print_json({"model": None if base is None else str(base), **adapter.as_json()})
        else:
            show_adapter(adapter)
        return
    found, merged = None, None
    with _listening(quiet or as_json) as on_event:
        if pack is not None:
            merged = proven(pack, model, policy_file, on_event, allow_unsigned=allow_unsigned)
        done = _export_model(asked, Path(model), merged, on_event)
        if check:
            from nestpatch.evaluation.parity import check_gguf

            content = merged.pack if merged is not None else None
            found = check_gguf(done.output, Path(model), pack=content, strength=strength, on_event=on_event)
    say_unchecked(merged)
    if as_json:
        check_facts = {"check": found.as_json()} if found is not None else {}
        print_json({"model": model, **done.as_json(), **check_facts})
    else:
        _show(done, found)
    sys.exit(0 if found is None or found.passed else 1)


def _show(done: ExportedGguf | ExportedSafetensors | ExportedOnnx, found: GgufParity | None) -> None:
    from nestpatch.views.exporting import show_check, show_exported

    show_exported(done)
    if found is not None:
        show_check(found)
