"""The other route to GGUF: llama.cpp's own converter, from a checkout, for architectures that are not known here."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nestpatch import __version__
from nestpatch.errors import DataError, UnsupportedModelError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._model_config import model_name
from nestpatch.export._quantizer import quantize_file, require_quantizer
from nestpatch.export.results import ExportedGguf
from nestpatch.files.hashing import Sink, seal
from nestpatch.files.scratch import CONVERTED, WHOLE, claimed, new_output, scratch
from nestpatch.formats.checkpoint import CHUNK, Checkpoint
from nestpatch.formats.gguf.header import Fact, encode_facts, read_header
from nestpatch.formats.gguf.quants import AUTO, file_type
from nestpatch.formats.provenance import VERSION

SCRIPT = "convert_hf_to_gguf.py"
_TAIL = 12
"""Lines of the converter's output that an error shows."""


def require_converter(llama_cpp: Path) -> Path:
    """Finds the converter in a checkout of llama.cpp.

    Args:
        llama_cpp: The checkout.

    Returns:
        convert_hf_to_gguf.py.

    Raises:
        DataError: There is none.
    """
    script = llama_cpp / SCRIPT
    if not script.is_file():
        raise DataError(
            f"{llama_cpp} contains no {SCRIPT}",
            advice="Give a checkout of llama.cpp: git clone https://github.com/ggml-org/llama.cpp",
        )
    return script


def convert_gguf(
    checkpoint: Checkpoint,
    target: Path,
    llama_cpp: Path,
    *,
    kind: str = AUTO,
    name: str | None = None,
    keys: Mapping[str, str] | None = None,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
    confirm: Callable[[], None] = lambda: None,
) -> ExportedGguf:
    """Converts a model directory with llama.cpp's converter.

    Args:
        checkpoint: The model.
        target: The new .gguf file.
        llama_cpp: A checkout of llama.cpp.
        kind: The file type, for `file_type`.
        name: The model's name in the metadata; that of its directory when None.
        keys: Metadata to add to the file.
        dry_run: Whether to check only.
        on_event: Receives the steps.
        confirm: Called before the file gets its name; when it raises, no file is left.

    Returns:
        What was written, or would be.

    Raises:
        DataError: There is no converter, or no such file type.
        UnsupportedModelError: The converter failed; the message has the end of its output.
        QuantizationError: llama.cpp cannot quantize the result.
        OutputError: The path exists already, or cannot be written.
        MissingExtraError: The result must be quantized, and llama-cpp-python is not installed.
    """
    began = time.perf_counter()
    script, wanted = require_converter(llama_cpp), file_type(kind)
    if not wanted.direct:
        require_quantizer()
    facts: dict[str, Fact] = {VERSION: __version__, **(keys or {})}
    if dry_run:
        seconds = time.perf_counter() - began
        return ExportedGguf(target, 0, "", 0, wanted.name, "", (), seconds=seconds, dry_run=True)
    # The wanted type, or one that loses nothing where none is wanted or llama.cpp quantizes afterwards.
    dtypes = {checkpoint.info(tensor).dtype for tensor in checkpoint.tensors()}
    outtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= {"F16", "BF16"} else "F32"
    outtype = (wanted.name if wanted.direct and wanted.name != AUTO else outtype).lower()
    with new_output(target) as sibling, scratch(sibling, CONVERTED) as raw:
        _run(script, checkpoint, raw, outtype, name or model_name(checkpoint.path), on_event)
        if wanted.direct:
            architecture, tensors = _add_facts(raw, sibling, facts)
            on_event(Event("convert", 1, 1, target.name))
        else:
            with scratch(sibling, WHOLE) as whole, claimed(whole):
                architecture, tensors = _add_facts(raw, whole, facts)
                raw.unlink()
                quantize_file(whole, sibling, wanted.name, on_event)
        nbytes, digest = seal(sibling)
        confirm()
    seconds = time.perf_counter() - began
    return ExportedGguf(target, nbytes, digest, tensors, wanted.name, architecture, (), seconds=seconds)


def _run(script: Path, checkpoint: Checkpoint, target: Path, outtype: str, name: str, on_event: OnEvent) -> None:
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    on_event(Event("convert", 0, 1, str(folder)))
    command = [sys.executable, str(script), str(folder), "--outfile", str(target), "--outtype", outtype, "--model-name", name]
    done = subprocess.run(  # noqa: S603 - the user's own checkout, named with --llama-cpp
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        check=False,
    )  # fmt: skip
    if done.returncode or not target.is_file():
        tail = "\n  ".join(line for line in done.stdout.splitlines()[-_TAIL:] if line.strip())
        raise UnsupportedModelError(
            f"llama.cpp's converter could not convert {folder} (exit code {done.returncode}):\n  {tail}",
            advice=f"Install what it needs (pip install -r {script.parent / 'requirements.txt'}), or take a newer checkout.",
        )


def _add_facts(source: Path, target: Path, facts: Mapping[str, Fact]) -> tuple[str, int]:
    """Copies a GGUF file with more metadata. Returns (architecture, number of tensors)."""
    header = read_header(source)
    facts = {key: value for key, value in facts.items() if key not in header.keys}
    first, end = header.entries
    with open(source, "rb") as file, Sink(target) as sink:
        magic, version, tensors, count = struct.unpack("<4sIQQ", file.read(24))
        sink.write(struct.pack("<4sIQQ", magic, version, tensors, count + len(facts)))
        sink.write(file.read(first - 24) + encode_facts(facts) + file.read(end - first))
        sink.write(bytes(-sink.nbytes % header.alignment))
        file.seek(header.data)
        while block := file.read(CHUNK):
            sink.write(block)
    return str(header.metadata.get("general.architecture", "")), len(header.tensors)
