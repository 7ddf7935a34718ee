"""Exports a model to a directory for onnxruntime, onnxruntime-genai and transformers.js: traced, compared, then named."""

from __future__ import annotations

import gc
import importlib.util
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestpatch import __version__
from nestpatch.errors import DataError, MissingExtraError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export._model_config import model_name
from nestpatch.export._source import ExportSource, MergedCheckpoint, Request, free_place, open_request, source_of
from nestpatch.export.results import ExportedFile, ExportedOnnx, Parity
from nestpatch.files.atomic import sync_tree
from nestpatch.files.hashing import seal
from nestpatch.files.scratch import new_output
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.lora.onnx import ADAPTER, inputs_json
from nestpatch.formats.provenance import VERSION
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.patcher.plan import check_strength
from nestpatch.patcher.state_dir import LEDGER
from nestpatch.signing.trust import Policy

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nestpatch.export.onnx._parity import Probe

DTYPES = ("fp32", "fp16")
BITS = (4, 8)
_NEEDED = ("torch", "transformers", "onnxscript", "onnx_ir", "onnxruntime")
_ALIGNMENT = 4096
"""Of every matrix in the data file: readers map pages, and packs are merged in place."""
_COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the files that transformers reads beside weights."""


@dataclass(frozen=True)
class _Kind:
    """The kind of export."""

    dtype: str
    bits: int | None
    adapter_ready: bool


def export_onnx(
    model: str | Path,
    pack: PackLike | None = None,
    output: str | Path | None = None,
    *,
    strength: float = 1.0,
    dtype: str = "fp32",
    bits: int | None = None,
    adapter_ready: bool = False,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedOnnx:
    """Exports a safetensors model to an ONNX directory, with a pack merged into it if one is given; or a GGUF file.

    The graph is run in onnxruntime and compared with transformers before the directory gets its name. The packs in it are
    listed in the graph's metadata under "nestpatch.packs".

    Args:
        model: A model directory, a weight file with its configuration beside it, a Hub id, or a GGUF file, whose weights are
            dequantized first. It is not changed.
        pack: The pack to merge, checked as by `apply`; not into a GGUF file.
        output: The directory to write; by default beside the model, named after it, the pack and the type.
        strength: Multiplies the pack's deltas, over 0 and up to 1.5.
        dtype: Of weights and activations: fp32 or fp16.
        bits: 4 or 8: quantizes the matrices too.
        adapter_ready: Makes a base that accepts packs at run time (see `export_onnx_adapter`). Excludes `pack`.
        policy: The trust policy for the pack; by default that of this user and this machine.
        trust: "none" skips the check of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        dry_run: Checks everything that takes no tracing, and writes nothing.
        on_event: Receives progress.

    Returns:
        Where the directory is, its files with their digests, the comparisons, and the packs in it.

    Raises:
        DataError: An option is unknown or out of range.
        MissingExtraError: The extra `onnx` is not installed.
        OutputError: The output exists or cannot be written.
        SignatureError: The pack is not signed as the policy requires.
        PackError: The pack is broken.
        CheckpointError: The model cannot be exported, or is not the pack's base; ParityError when the graph computes
            something else than the model.
        ChainError: The pack does not go together with those in the model.
    """
    began = time.perf_counter()
    kind = _Kind(dtype, bits, adapter_ready)
    _check(kind, patched=pack is not None)
    check_strength(strength)
    target = None if output is None else free_place(output, dry_run=dry_run)
    from nestpatch.runtimes.loading import locate

    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    request = open_request(locate(model).path, proven, strength, gguf=True)
    if target is None:
        target = free_place(request.beside("", "onnx", f"int{bits}" if bits else dtype), dry_run=dry_run)
    made = _Made()
    with source_of(request, target, whole=request.gguf, kind="F32", dry_run=dry_run, on_event=on_event) as source:
        if not dry_run:
            with new_output(target, directory=True) as sibling:
                made = _export(request, source, sibling, kind, on_event)
                request.require_unchanged()
    return ExportedOnnx(
        output=target,
        files=made.files,
        nbytes=sum(file.nbytes for file in made.files),
        dtype=dtype,
        bits=bits,
        matrices=made.matrices,
        architecture=made.architecture,
        adapter_weights=made.adapter_weights,
        parity=made.parity,
        notes=made.notes,
        packs=source.labels,
        strength=strength,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _check(kind: _Kind, *, patched: bool) -> None:
    """Raises before any work for options that would fail after minutes of it."""
    if kind.dtype not in DTYPES:
        raise DataError(
            f"{kind.dtype!r} is not a type of ONNX exports; expected {' or '.join(DTYPES)}",
            advice="onnxruntime does not compute bf16 on a CPU, and fp32 holds every bf16 weight exactly.",
        )
    if kind.bits is not None and kind.bits not in BITS:
        raise DataError(f"matrices are quantized to 4 or 8 bits, not to {kind.bits}")
    if kind.adapter_ready and patched:
        raise DataError(
            "an adapter-ready model is the base: its packs are added at run time",
            advice="Export the model without the pack, then the pack: nestpatch export PACK --to onnx-adapter --for DIR",
        )
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("onnx", f"exporting to ONNX ({missing[0]})")


@dataclass(frozen=True)
class _Made:
    """The content of an exported directory."""

    files: tuple[ExportedFile, ...] = ()
    matrices: int = 0
    architecture: str = ""
    adapter_weights: int = 0
    parity: tuple[Parity, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Traced:
    """What is needed of a model after its graph is on disk."""

    architecture: str
    inputs: Mapping[str, str]
    """Weights that accept a pack at run time: name on disk -> name in the model."""
    notes: tuple[str, ...]
    probe: Probe


def _export(request: Request, source: ExportSource, folder: Path, kind: _Kind, on_event: OnEvent) -> _Made:
    """Fills an empty directory."""
    from nestpatch.export.onnx._companions import DATA, GRAPH
    from nestpatch.export.onnx._parity import compare

    floats = folder / "floats.tmp" if kind.bits else folder
    floats.mkdir(exist_ok=True)
    traced = _trace(request, source, folder, floats, kind, on_event)
    on_event(Event("onnx.check", note=kind.dtype))
    # The graph in floats is compared even where it is not kept: its differences are within a known bound.
    matrices, parity = 0, [compare(floats / GRAPH, kind.dtype, traced.probe)]
    if kind.bits:
        matrices = _quantize(floats, folder, kind.bits, traced.inputs, on_event)
        gc.collect()  # some systems do not remove files that are mapped
        shutil.rmtree(floats)
        on_event(Event("onnx.check", note=f"int{kind.bits}"))
        parity.append(compare(folder / GRAPH, f"int{kind.bits}", traced.probe))
    for note in traced.notes:
        on_event(Event("note", note=note))
    present = [folder / name for name in (GRAPH, DATA) if (folder / name).is_file()]
    files = tuple(ExportedFile(file.name, *seal(file)) for file in present)
    sync_tree(folder)
    return _Made(files, matrices, traced.architecture, len(traced.inputs), tuple(parity), traced.notes)


def _trace(request: Request, source: ExportSource, folder: Path, floats: Path, kind: _Kind, on_event: OnEvent) -> _Traced:
    """Writes the graph in floats to `floats`, and the files beside a graph to `folder`."""
    from nestpatch.export.onnx._adapter_ready import adapter_inputs, add_inputs
    from nestpatch.export.onnx._companions import write_companions
    from nestpatch.export.onnx._graph import cache_shapes, decoder_graph, require_dense
    from nestpatch.export.onnx._parity import make_probe

    model, tokenizer = _load(request, source, on_event)
    require_dense(model)
    # Before minutes of tracing, and while the matrices are those of the model.
    sites = adapter_inputs(source.checkpoint, model) if kind.adapter_ready else {}
    inputs = {name: weight for name, (weight, _) in sites.items()}
    probe = make_probe(model, tokenizer)
    notes = _as_dtype(model, kind.dtype, source.checkpoint)
    on_event(Event("onnx.trace", note=type(model).__name__))
    shapes = cache_shapes(model)
    graph = decoder_graph(model, shapes)
    graph.metadata_props.update({VERSION: __version__, **source.keys()})
    if sites:
        graph.metadata_props[ADAPTER] = inputs_json({name: site for name, (_, site) in sites.items()})
    if not kind.bits:
        add_inputs(graph, inputs)
    save(graph, floats, on_event)
    origin = source.checkpoint.path if request.gguf else request.checkpoint.path
    notes += write_companions(origin if origin.is_dir() else origin.parent, folder, model, tokenizer, shapes)
    return _Traced(type(model).__name__, inputs, tuple(notes), probe)


def _load(request: Request, source: ExportSource, on_event: OnEvent) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 on the CPU; a pack is merged in the dtype on disk. Raises CheckpointFormatError."""
    from nestpatch.runtimes.loading import load_model
    from nestpatch.runtimes.weights import fold

    path, origin = source.checkpoint.path, request.checkpoint.path
    if path.is_file() and path != origin and not request.gguf:  # a patched copy of a single file has no configuration beside it
        for file in origin.parent.iterdir():
            if file.suffix in _COMPANIONS and not file.name.endswith((".index.json", LEDGER)):
                shutil.copyfile(file, path.parent / file.name)
    on_event(Event("load", note=model_name(origin)))
    model, tokenizer = load_model(path, "cpu", "float32")
    # The graph consists of plain operators, and so does the model that it is compared with.
    model.set_attn_implementation("eager")
    if isinstance(source.checkpoint, MergedCheckpoint) and request.pack is not None:
        fold(model, request.checkpoint, request.pack, request.strength)
    return model, tokenizer


def _quantize(floats: Path, folder: Path, bits: int, inputs: Mapping[str, str], on_event: OnEvent) -> int:
    """Writes the quantized graph from the one in floats, matrix by matrix. Returns the number of matrices."""
    import onnx_ir as ir

    from nestpatch.export.onnx._adapter_ready import add_inputs
    from nestpatch.export.onnx._companions import GRAPH
    from nestpatch.export.onnx._quantize import quantize_graph

    graph = ir.load(floats / GRAPH)
    matrices = quantize_graph(graph, bits, on_event)
    add_inputs(graph, inputs)  # afterwards: products with the vectors of a pack stay in floats
    save(graph, folder, on_event)
    return matrices


def _as_dtype(model: PreTrainedModel, dtype: str, checkpoint: Checkpoint) -> list[str]:
    """Converts the weights; buffers such as rotary frequencies stay float32, as when transformers loads a model."""
    import torch

    notes = []
    stored = {checkpoint.info(name).dtype for name in checkpoint.tensors()}
    if "BF16" in stored:
        how = "which holds them exactly" if dtype == "fp32" else "which rounds small ones and cannot hold large ones"
        notes.append(f"bfloat16 weights became {dtype}, {how}: onnxruntime does not compute bfloat16 on a CPU")
    if dtype == "fp16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float16)
    return notes


def save(graph: ir.Model, folder: Path, on_event: OnEvent = ignore) -> None:
    """Writes a graph to model.onnx, and tensors of more than 256 bytes to model.onnx_data.

    Args:
        graph: The graph with its tensors.
        folder: An existing directory.
        on_event: Receives progress.
    """
    import onnx_ir as ir

    from nestpatch.export.onnx._companions import DATA, GRAPH

    def report(tensor: Any, state: Any) -> None:
        on_event(Event("export", state.index + 1, state.total, str(tensor.name)))

    ir.save(
        graph,
        folder / GRAPH,
        external_data=DATA,
        alignment=_ALIGNMENT,
        align_threshold=1,
        callback=report,
        size_threshold_bytes=256,
    )
