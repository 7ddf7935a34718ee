"""Exports a model to a directory that onnxruntime, onnxruntime-genai and transformers.js serve: traced, checked, then named."""

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
from nestpatch.export._source import ExportSource, Wanted, open_wanted, require_unchanged, source_of
from nestpatch.files.atomic import check_output, sync_tree
from nestpatch.files.hashing import seal
from nestpatch.files.scratch import new_output
from nestpatch.formats.checkpoint import Checkpoint
from nestpatch.formats.lora.onnx import ADAPTER, AdapterInput, inputs_json
from nestpatch.formats.provenance import VERSION
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.signing.trust import Policy

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from nestpatch.export.onnx.parity import Parity, Probe

DTYPES = ("fp32", "fp16")
BITS = (4, 8)
NEEDED = ("torch", "transformers", "onnxscript", "onnx_ir", "onnxruntime")
_ALIGNMENT = 4096
"""Of every matrix in the data file: readers map pages, and patches write elements in place."""


@dataclass(frozen=True)
class OnnxFile:
    """One file of an export."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ExportedOnnx:
    """What an export wrote, or with `dry_run` would write."""

    path: Path
    files: tuple[OnnxFile, ...]
    """The graph and its data; empty after a dry run."""
    dtype: str
    """fp32 or fp16: of all that is not quantized."""
    bits: int | None
    """4 or 8: of the quantized matrices."""
    matrices: int
    """How many are quantized."""
    architecture: str
    packs: tuple[str, ...]
    """The packs in it, bottom first."""
    adapter_weights: int
    """How many weights take a patch at run time."""
    parity: tuple[Parity, ...]
    """How far the graph is from the model in transformers: of floats, and quantized."""
    notes: tuple[str, ...]
    """What a user should know of the files."""
    seconds: float
    dry_run: bool = False


@dataclass(frozen=True)
class _Kind:
    """What kind of export."""

    dtype: str
    bits: int | None
    adapter_ready: bool


def export_onnx(
    model: str | Path,
    output: str | Path | None = None,
    pack: PackLike | None = None,
    *,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strength: float = 1.0,
    dtype: str = "fp32",
    bits: int | None = None,
    adapter_ready: bool = False,
    dry_run: bool = False,
    on_event: OnEvent = ignore,
) -> ExportedOnnx:
    """Exports a safetensors model, or a Hub id, to a new directory, with a pack merged into it if one is given.

    `dtype` is that of weights and activations, fp32 or fp16; `bits` 4 or 8 quantizes the matrices besides. `adapter_ready`
    makes a base that takes patches at run time (`export_onnx_adapter`). The packs in it are listed in the graph's metadata
    under "nestpatch.packs". After that the graph is run in onnxruntime and compared with transformers. The patch passes the
    gate first, by `policy`, `trust` and `allow_unsigned`, as for `apply_in_place`.

    Raises SignatureError, PackError, CheckpointError (ParityError when the graph computes something else), ChainError,
    OutputError, DataError, MissingExtraError; then nothing was written.
    """
    began = time.perf_counter()
    kind = _Kind(dtype, bits, adapter_ready)
    _check(kind, patched=pack is not None)
    from nestpatch.runtimes.transformers import locate

    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event)
    wanted = open_wanted(locate(model).path, proven, strength)
    target = Path(output) if output is not None else wanted.default_output("", "onnx", f"int{bits}" if bits else dtype)
    check_output(target)
    before, made = wanted.fingerprint, _Made()
    with source_of(wanted, target, dry_run=dry_run, on_event=on_event) as source:
        if not dry_run:
            with new_output(target, directory=True) as sibling:
                made = _export(wanted, source, sibling, kind, on_event)
                require_unchanged(wanted, before)
    return ExportedOnnx(
        path=target,
        files=made.files,
        dtype=dtype,
        bits=bits,
        matrices=made.matrices,
        architecture=made.architecture,
        packs=source.labels,
        adapter_weights=made.adapter_weights,
        parity=made.parity,
        notes=made.notes,
        seconds=time.perf_counter() - began,
        dry_run=dry_run,
    )


def _check(kind: _Kind, *, patched: bool) -> None:
    """Refuses before any work what would fail after minutes of it."""
    if kind.dtype not in DTYPES:
        raise DataError(
            f"{kind.dtype!r} is no type for an ONNX export",
            advice="Use fp32 or fp16: onnxruntime computes bf16 on no CPU, and fp32 holds every bf16 weight exactly.",
        )
    if kind.bits is not None and kind.bits not in BITS:
        raise DataError(f"matrices are quantized to 4 or 8 bits, not to {kind.bits}")
    if kind.adapter_ready and patched:
        raise DataError(
            "an adapter-ready model is the base: its patches come at run time",
            advice="Leave the patch away, and export it for the new model: nestpatch export PATCH --to onnx-adapter --for DIR",
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError("onnx", f"exporting to ONNX ({missing[0]})")


@dataclass(frozen=True)
class _Made:
    """What came out of an export."""

    files: tuple[OnnxFile, ...] = ()
    matrices: int = 0
    architecture: str = ""
    adapter_weights: int = 0
    parity: tuple[Parity, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Traced:
    """What is left of a model when its graph is on disk."""

    architecture: str
    sites: Mapping[str, str]
    """Weights that are to take a patch at run time: name on disk -> name in the model."""
    notes: tuple[str, ...]
    probe: Probe


def _export(wanted: Wanted, source: ExportSource, folder: Path, kind: _Kind, on_event: OnEvent) -> _Made:
    """Fills an empty directory."""
    from nestpatch.export.onnx._companions import DATA, GRAPH
    from nestpatch.export.onnx.parity import compare

    floats = folder / "floats.tmp" if kind.bits else folder
    floats.mkdir(exist_ok=True)
    traced = _trace(wanted, source, folder, floats, kind, on_event)
    on_event(Event("onnx.check", note=kind.dtype))
    # The floats are judged also where they are not kept: they tell whether the graph is right.
    matrices, parity = 0, [compare(floats / GRAPH, kind.dtype, traced.probe)]
    if kind.bits:
        matrices = _quantize(floats, folder, kind.bits, traced.sites, on_event)
        gc.collect()  # some systems do not remove files that are mapped
        shutil.rmtree(floats)
        on_event(Event("onnx.check", note=f"int{kind.bits}"))
        parity.append(compare(folder / GRAPH, f"int{kind.bits}", traced.probe))
    for note in traced.notes:
        on_event(Event("note", note=note))
    present = [folder / name for name in (GRAPH, DATA) if (folder / name).is_file()]
    files = tuple(OnnxFile(file.name, *seal(file)) for file in present)
    sync_tree(folder)
    return _Made(files, matrices, traced.architecture, len(traced.sites), tuple(parity), traced.notes)


def _trace(wanted: Wanted, source: ExportSource, folder: Path, floats: Path, kind: _Kind, on_event: OnEvent) -> _Traced:
    """Writes the graph of floats to `floats` and all that lies beside a graph to `folder`."""
    from nestpatch.export.onnx._adapter_ready import add_inputs
    from nestpatch.export.onnx._companions import write_companions
    from nestpatch.export.onnx._graph import cache_shapes, decoder_graph, require_dense
    from nestpatch.export.onnx._weights import load, sites_of
    from nestpatch.export.onnx.parity import make_probe

    model, tokenizer = load(wanted, source, on_event)
    require_dense(model)
    # Known before minutes of tracing, and the matrices are still those of the model.
    sites = sites_of(source.checkpoint, model) if kind.adapter_ready else {}
    inputs = {name: weight for name, (weight, _) in sites.items()}
    probe = make_probe(model, tokenizer)
    notes = _as_dtype(model, kind.dtype, source.checkpoint)
    on_event(Event("onnx.trace", note=type(model).__name__))
    shapes = cache_shapes(model)
    graph = decoder_graph(model, shapes)
    _sign(graph, source, {name: site for name, (_, site) in sites.items()})
    if not kind.bits:
        add_inputs(graph, inputs)
    save(graph, floats, on_event)
    origin = wanted.checkpoint.path
    notes += write_companions(origin if origin.is_dir() else origin.parent, folder, model, tokenizer, shapes)
    return _Traced(type(model).__name__, inputs, tuple(notes), probe)


def _quantize(floats: Path, folder: Path, bits: int, sites: Mapping[str, str], on_event: OnEvent) -> int:
    """Makes the graph of small integers from that of floats, which is read matrix by matrix. Returns how many there are."""
    import onnx_ir as ir

    from nestpatch.export.onnx._adapter_ready import add_inputs
    from nestpatch.export.onnx._companions import GRAPH
    from nestpatch.export.onnx._quantize import quantize

    graph = ir.load(floats / GRAPH)
    matrices = quantize(graph, bits, on_event)
    # After it: products with the vectors of a patch stay in floats.
    add_inputs(graph, sites)
    save(graph, folder, on_event)
    return matrices


def _as_dtype(model: PreTrainedModel, dtype: str, checkpoint: Checkpoint) -> list[str]:
    """Converts the weights; buffers such as rotary frequencies stay float32, as when transformers loads a model."""
    import torch

    notes = []
    stored = {checkpoint.info(name).dtype for name in checkpoint.tensors()}
    if "BF16" in stored:
        how = "which holds them exactly" if dtype == "fp32" else "which rounds small ones and cannot hold large ones"
        notes.append(f"bfloat16 weights became {dtype}, {how}: onnxruntime computes bfloat16 on no CPU")
    if dtype == "fp16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float16)
    return notes


def _sign(graph: ir.Model, source: ExportSource, sites: Mapping[str, AdapterInput]) -> None:
    """Writes into the file what made it, and what is in it."""
    graph.metadata_props.update({VERSION: __version__, **source.keys()})
    if sites:
        graph.metadata_props[ADAPTER] = inputs_json(sites)


def save(graph: ir.Model, folder: Path, on_event: OnEvent = ignore) -> None:
    """Writes a graph and beside it the content of all but its smallest tensors."""
    import onnx_ir as ir

    from nestpatch.export.onnx._companions import DATA, GRAPH

    def tell(tensor: Any, state: Any) -> None:
        on_event(Event("export", state.index + 1, state.total, str(tensor.name)))

    ir.save(
        graph,
        folder / GRAPH,
        external_data=DATA,
        alignment=_ALIGNMENT,
        align_threshold=1,
        callback=tell,
        size_threshold_bytes=256,
    )
