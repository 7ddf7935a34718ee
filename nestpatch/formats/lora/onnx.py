"""Packs as .onnx_adapter files, for ONNX models that were exported adapter-ready. Needs onnxruntime, no torch.

Such a model says in its metadata, under ADAPTER, which weights take a patch: JSON, weight -> its shape and the SHA-256
that it had in the base. What it does with its two inputs for each of them is told in docs/onnx-export.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.errors import BaseMismatchError, CheckpointFormatError, MissingExtraError, OutputError, UnsupportedModelError
from nestpatch.files.reading import read_bounded
from nestpatch.files.scratch import new_output
from nestpatch.formats.lora.factors import Written, sync_size
from nestpatch.formats.nest import pack_id
from nestpatch.formats.provenance import read_packs
from nestpatch.pack import Pack, TensorDelta
from nestpatch.rows import FloatArray

ADAPTER = "nestpatch.adapter"
DELTA, MAP = ".nest_delta", ".nest_map"
"""What follows a weight's module in the names of its two inputs."""
SUFFIX = ".onnx_adapter"
MAX_GRAPH = 512 << 20
"""Bytes of the file of a graph, which is read whole. The weights of an adapter-ready model lie in another."""
_FLOATS = {1: np.float32, 10: np.float16}
"""ONNX's numbers for the types that activations may have."""
_VERSION = 1


@dataclass(frozen=True)
class AdapterInput:
    """A weight that takes a patch at run time."""

    shape: tuple[int, int]
    """[out, in], as in the base."""
    sha256: str
    """Of the base's bytes."""


@dataclass(frozen=True)
class AdapterReady:
    """What an adapter-ready ONNX file says of itself."""

    file: Path
    sites: Mapping[str, AdapterInput]
    """By the names of packs."""
    packs: tuple[str, ...]
    """Ids of the packs that its weights hold already."""
    dtype: np.dtype[Any]
    """Of the activations, float32 or float16: vectors must have the same."""


def onnx_file(model: Path) -> Path | None:
    """The ONNX file of a model: itself, or what a directory has under the usual names; None where there is none."""
    if model.suffix == ".onnx":
        return model if model.is_file() else None
    for name in ("model.onnx", "onnx/model.onnx"):
        if (model / name).is_file():
            return model / name
    found = sorted(model.glob("*.onnx")) if model.is_dir() else []
    return found[0] if len(found) == 1 else None


def sites_json(sites: Mapping[str, AdapterInput]) -> str:
    """What goes under ADAPTER."""
    listed = {name: {"shape": list(site.shape), "sha256": site.sha256} for name, site in sorted(sites.items())}
    return json.dumps({"format": "nest-adapter/1", "weights": listed})


def read_sites(model: Path) -> AdapterReady:
    """Reads what an ONNX model says of itself; no weights are loaded.

    Raises CheckpointFormatError when it cannot be read, UnsupportedModelError when it takes no patches at run time.
    """
    import onnx

    file = onnx_file(model)
    if file is None:
        raise CheckpointFormatError(f"there is no ONNX model at {model}", advice="Give the directory that holds model.onnx.")
    try:
        found = onnx.load_from_string(read_bounded(file, MAX_GRAPH))
    except Exception as error:  # protobuf's and onnx's own errors have no common base
        raise CheckpointFormatError(f"cannot read {file}: {error}") from error
    facts = {entry.key: entry.value for entry in found.metadata_props}
    if ADAPTER not in facts:
        raise UnsupportedModelError(
            f"{file} takes no patches at run time",
            advice="Export it anew with --adapter-ready, or merge the patch: nestpatch apply MODEL PATCH",
        )
    types = {value.name: value.type.tensor_type.elem_type for value in found.graph.input}
    try:
        sites = _sites(json.loads(facts[ADAPTER]), file)
        dtypes = {_FLOATS[types[_module(name) + DELTA]] for name in sites}
        (dtype,) = dtypes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(f"what {file} says of its adapters is broken: {error!r}") from error
    packs = tuple(str(entry["pack_id"]) for entry in read_packs(facts))
    return AdapterReady(file, sites, packs, np.dtype(dtype))


def _sites(value: Any, file: Path) -> dict[str, AdapterInput]:
    if value["format"] != "nest-adapter/1":
        raise CheckpointFormatError(
            f"{file} takes adapters of format {value['format']!r}, which this nestpatch does not know",
            advice="Upgrade nestpatch: pip install -U nestpatch",
        )
    sites = {}
    for name, entry in value["weights"].items():
        rows, width = entry["shape"]
        sites[str(name)] = AdapterInput((int(rows), int(width)), str(entry["sha256"]))
    return sites


def _module(weight: str) -> str:
    return weight.removesuffix(".weight")


def parameters(pack: Pack, ready: AdapterReady, strength: float = 1.0) -> dict[str, npt.NDArray[Any]]:
    """Input name -> its content: vectors [in, clusters + 1] in the model's dtype, and int32 [out], the column of each neuron.

    Raises BaseMismatchError when the model was not made from the pack's base, or holds the pack already,
    UnsupportedModelError when the pack changes weights that take no patch at run time.
    """
    _require_base(pack, ready)
    found: dict[str, npt.NDArray[Any]] = {}
    for delta in pack:
        rows, width = ready.sites[delta.name].shape
        with np.errstate(over="ignore"):
            vectors = _vectors(delta, width, strength).astype(ready.dtype)
        if not np.isfinite(vectors).all():
            raise UnsupportedModelError(
                f"{delta.name}: the patch has numbers that {ready.dtype} cannot hold",
                advice="Export the model with --dtype fp32.",
            )
        columns = np.full(rows, delta.clusters, np.int32)
        columns[delta.rows] = delta.cluster
        module = _module(delta.name)
        found |= {module + DELTA: vectors, module + MAP: columns}
    return found


def _vectors(delta: TensorDelta, width: int, strength: float) -> FloatArray:
    vectors = np.zeros((width, delta.clusters + 1), np.float32)
    vectors[:, :-1] = np.float32(strength) * delta.delta.astype(np.float32).T
    return vectors


def _require_base(pack: Pack, ready: AdapterReady) -> None:
    missing = [delta.name for delta in pack if delta.name not in ready.sites]
    if missing:
        raise UnsupportedModelError(
            f"{ready.file} takes no patch of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            advice="Merge this patch into the weights instead: nestpatch apply MODEL PATCH",
        )
    if pack_id(pack) in ready.packs:
        raise BaseMismatchError(f"the weights of {ready.file} hold {pack.label} already", advice="Run it without an adapter.")
    identities = pack.manifest.base.tensors
    odd = [d.name for d in pack if (identities[d.name].matrix, identities[d.name].sha256) != _known(ready.sites[d.name])]
    if odd:
        raise BaseMismatchError(
            f"{ready.file} was not made from the base of {pack.label}: {odd[0]} is another one"
            + (f", and {len(odd) - 1} more" if odd[1:] else "")
        )


def _known(site: AdapterInput) -> tuple[tuple[int, int], str]:
    return site.shape, site.sha256


def write(content: Mapping[str, npt.NDArray[Any]], ready: AdapterReady, output: Path, *, dry_run: bool = False) -> Written:
    """Writes an .onnx_adapter file, after onnxruntime has run the model with it. `content` is what `parameters` gives.

    Raises MissingExtraError without onnxruntime, OutputError; then nothing was written.
    """
    ranks = [values.shape[1] - 1 for name, values in content.items() if name.endswith(DELTA)]
    size = Written(len(ranks), max(ranks), sum(values.nbytes for values in content.values()))
    if dry_run:
        return size
    runtime = _runtime()
    with new_output(output) as sibling:
        form = runtime.AdapterFormat()
        form.set_adapter_version(_VERSION)
        form.set_model_version(_VERSION)
        form.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(values) for name, values in content.items()})
        form.export_adapter(os.fspath(sibling))
        _check(content, ready, sibling)
        return replace(size, nbytes=sync_size(sibling))


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnx", "writing an adapter for onnxruntime") from error
    return onnxruntime


def _check(content: Mapping[str, npt.NDArray[Any]], ready: AdapterReady, adapter: Path) -> None:
    """Raises OutputError when onnxruntime reads something else, or the model does not take it."""
    runtime = _runtime()
    stored = runtime.AdapterFormat.read_adapter(os.fspath(adapter)).get_parameters()
    same = stored.keys() == content.keys() and all(np.array_equal(stored[name].numpy(), content[name]) for name in content)
    if not same:
        raise OutputError("onnxruntime reads other numbers from the adapter than were written")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay where they are on disk: this loads as fast as the file can be read.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        loaded = runtime.LoraAdapter()
        loaded.Load(os.fspath(adapter))
        session = runtime.InferenceSession(os.fspath(ready.file), options, providers=["CPUExecutionProvider"])
        how = runtime.RunOptions()
        how.add_active_adapter(loaded)
        (logits,) = session.run(["logits"], _two_tokens(session), how)
    except Exception as error:  # onnxruntime's errors have no common base
        raise OutputError(f"onnxruntime cannot run {ready.file} with the adapter: {error}") from error
    if not np.isfinite(logits).all():
        raise OutputError(f"{ready.file} gives no finite numbers with the adapter")


def _two_tokens(session: Any) -> dict[str, npt.NDArray[Any]]:
    sizes = {"batch_size": 1, "sequence_length": 2, "total_sequence_length": 2, "past_sequence_length": 0}
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        entry.name: (np.ones if entry.name == "attention_mask" else np.zeros)(
            [sizes.get(n, n) for n in entry.shape], types[entry.type]
        )
        for entry in session.get_inputs()
    }
