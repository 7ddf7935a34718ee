"""Packs as .onnx_adapter files, for ONNX models that were exported adapter-ready. Needs onnxruntime, no torch.

The metadata of such a model has a record under ADAPTER of the weights that take a pack at run time: JSON, weight -> its shape
and the SHA-256 that it had in the base. docs/onnx-export.md says what the model does with its two inputs for each of them.
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

from nestpatch.delta import TensorDelta
from nestpatch.errors import BaseMismatchError, CheckpointFormatError, MissingExtraError, OutputError, UnsupportedModelError
from nestpatch.files.scratch import new_output
from nestpatch.formats.lora.factors import Written, sync_size
from nestpatch.formats.nest import pack_id
from nestpatch.formats.onnx.graph import read_graph
from nestpatch.formats.provenance import read_packs
from nestpatch.pack import Pack
from nestpatch.rows import FloatArray

ADAPTER = "nestpatch.adapter"
DELTA, FACTORS, MAP = ".nest_delta", ".nest_factors", ".nest_map"
"""What follows a weight's module in the names of its three inputs."""
SUFFIX = ".onnx_adapter"
MAX_GRAPH = 512 << 20
"""Bytes of the file of a graph that is read whole. The weights of an adapter-ready model are in another file."""
FORMAT, _OLD_FORMAT = "nest-adapter/2", "nest-adapter/1"
"""In the old one there is no input for factors."""
_FLOATS = {1: np.float32, 10: np.float16}
"""ONNX's numbers for the types that activations may have."""
_VERSION = 1


@dataclass(frozen=True)
class AdapterInput:
    """A weight that takes a pack at run time."""

    shape: tuple[int, int]
    """[out, in], as in the base."""
    sha256: str
    """Of the base's bytes."""


@dataclass(frozen=True)
class AdapterReady:
    """What an adapter-ready ONNX file records."""

    file: Path
    inputs: Mapping[str, AdapterInput]
    """By the names that packs use."""
    packs: tuple[str, ...]
    """Ids of the packs that its weights contain already."""
    dtype: np.dtype[Any]
    """Of the activations, float32 or float16: vectors must have the same."""
    factors: bool
    """Whether changes of low rank can be added; nestpatch exported models that cannot before there were any."""


def onnx_file(model: Path) -> Path | None:
    """Finds the ONNX file of a model.

    Args:
        model: The file, or a directory that has one under the usual names.

    Returns:
        The file; None where there is none.
    """
    if model.suffix == ".onnx":
        return model if model.is_file() else None
    for name in ("model.onnx", "onnx/model.onnx"):
        if (model / name).is_file():
            return model / name
    found = sorted(model.glob("*.onnx")) if model.is_dir() else []
    return found[0] if len(found) == 1 else None


def runtime_errors() -> tuple[type[Exception], ...]:
    """The exceptions that onnxruntime raises; they have no common base.

    Returns:
        The classes, for an `except` clause.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as state
    except ImportError as error:
        raise MissingExtraError("onnx", "running an ONNX model") from error
    found = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    # LookupError and TypeError are raised for inputs of unknown types or dimensions.
    return (RuntimeError, ValueError, LookupError, TypeError, *found)


def inputs_json(inputs: Mapping[str, AdapterInput]) -> str:
    """Encodes the record under ADAPTER.

    Args:
        inputs: The weights that take a pack at run time, by the names that packs use.

    Returns:
        JSON.
    """
    listed = {name: {"shape": list(one.shape), "sha256": one.sha256} for name, one in sorted(inputs.items())}
    return json.dumps({"format": FORMAT, "weights": listed})


def read_inputs(model: Path) -> AdapterReady:
    """Reads the record of an adapter-ready ONNX model; no weights are loaded.

    Args:
        model: A .onnx file, or a directory with one.

    Returns:
        The record.

    Raises:
        CheckpointFormatError: There is no ONNX model, or it or its record is broken.
        UnsupportedModelError: The model takes no packs at run time.
    """
    file = onnx_file(model)
    if file is None:
        raise CheckpointFormatError(f"there is no ONNX model at {model}", advice="Give the directory that holds model.onnx.")
    graph = read_graph(file)
    if ADAPTER not in graph.metadata:
        raise UnsupportedModelError(
            f"{file} takes no packs at run time",
            advice="Export it anew with --adapter-ready, or merge the pack: nestpatch apply MODEL PACK",
        )
    try:
        record = json.loads(graph.metadata[ADAPTER])
        if record["format"] not in (FORMAT, _OLD_FORMAT):
            raise CheckpointFormatError(
                f"{file} takes adapters of format {record['format']!r}, which this nestpatch does not know",
                advice="Upgrade nestpatch: pip install -U nestpatch",
            )
        inputs = {}
        for name, entry in record["weights"].items():
            rows, width = entry["shape"]
            inputs[str(name)] = AdapterInput((int(rows), int(width)), str(entry["sha256"]))
        (dtype,) = {_FLOATS[graph.inputs[name.removesuffix(".weight") + DELTA]] for name in inputs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointFormatError(f"the record of adapters in {file} is broken: {error!r}") from error
    packs = tuple(str(entry["pack_id"]) for entry in read_packs(graph.metadata))
    return AdapterReady(file, inputs, packs, np.dtype(dtype), record["format"] == FORMAT)


def parameters(pack: Pack, ready: AdapterReady, strength: float = 1.0) -> dict[str, npt.NDArray[Any]]:
    """Computes the content of a model's inputs for a pack.

    Args:
        pack: The pack.
        ready: The model.
        strength: How much of the deltas the adapter adds.

    Returns:
        Input name -> its content: vectors [in, rank] and factors [rank, columns] in the model's dtype, and int32 [out], the
        column of each neuron. An old model has no factors, and a last vector of zeros.

    Raises:
        BaseMismatchError: The model was not made from the pack's base, or contains the pack already.
        UnsupportedModelError: The pack changes weights that take no pack at run time, or its numbers do not fit the dtype.
    """
    _require_base(pack, ready)
    found: dict[str, npt.NDArray[Any]] = {}
    for delta in pack:
        rows, module = ready.inputs[delta.name].shape[0], delta.name.removesuffix(".weight")
        vectors, factors = np.float32(strength) * delta.delta.astype(np.float32).T, _columns(delta)
        if not ready.factors:
            vectors = np.pad(vectors, ((0, 0), (0, 1)))
        columns = np.full(rows, factors.shape[1] - 1, np.int32)
        columns[delta.rows] = np.arange(delta.neurons) if delta.cluster is None else delta.cluster
        found |= {module + DELTA: _fitted(delta, vectors, ready.dtype), module + MAP: columns}
        if ready.factors:
            found[module + FACTORS] = _fitted(delta, factors, ready.dtype)
    return found


def _columns(delta: TensorDelta) -> FloatArray:
    """The factors of all that a neuron can add: [rank, columns]; the last column adds nothing."""
    columns = np.eye(delta.rank, dtype=np.float32) if delta.factors is None else delta.factors.astype(np.float32).T
    return np.pad(columns, ((0, 0), (0, 1)))


def _fitted(delta: TensorDelta, values: FloatArray, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values in the type of a model's activations."""
    with np.errstate(over="ignore"):
        fitted = np.ascontiguousarray(values, dtype)
    if not np.isfinite(fitted).all():
        raise UnsupportedModelError(
            f"{delta.name}: the pack has numbers that {dtype} cannot hold", advice="Export the model with --dtype fp32."
        )
    return fitted


def _require_base(pack: Pack, ready: AdapterReady) -> None:
    missing = [delta.name for delta in pack if delta.name not in ready.inputs]
    if missing:
        raise UnsupportedModelError(
            f"{ready.file} takes no patch of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""),
            advice="Merge this pack into the weights instead: nestpatch apply MODEL PACK",
        )
    if pack_id(pack) in ready.packs:
        raise BaseMismatchError(f"the weights of {ready.file} hold {pack.label} already", advice="Run it without an adapter.")
    low_rank = [delta.name for delta in pack if delta.factors is not None]
    if low_rank and not ready.factors:
        raise UnsupportedModelError(
            f"{ready.file} was exported before changes of low rank were known, such as that of {low_rank[0]}",
            advice="Export it anew with --adapter-ready, or merge the pack: nestpatch apply MODEL PACK",
        )
    base, inputs = pack.manifest.base.tensors, ready.inputs
    odd = [d.name for d in pack if (base[d.name].matrix, base[d.name].sha256) != (inputs[d.name].shape, inputs[d.name].sha256)]
    if odd:
        raise BaseMismatchError(
            f"{ready.file} was not made from the base of {pack.label}: {odd[0]} differs"
            + (f", and {len(odd) - 1} more" if odd[1:] else "")
        )


def write(content: Mapping[str, npt.NDArray[Any]], ready: AdapterReady, output: Path, *, dry_run: bool = False) -> Written:
    """Writes an .onnx_adapter file, after onnxruntime has run the model with it. When it raises, nothing was written.

    Args:
        content: What `parameters` returns.
        ready: The model.
        output: The new file.
        dry_run: Whether to compute the size only.

    Returns:
        The size of the adapter.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        OutputError: The path exists already, cannot be written, or onnxruntime does not run the model with the adapter.
    """
    spare = 0 if any(name.endswith(FACTORS) for name in content) else 1
    ranks = [values.shape[1] - spare for name, values in content.items() if name.endswith(DELTA)]
    size = Written(len(ranks), max(ranks), sum(values.nbytes for values in content.values()))
    if dry_run:
        return size
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise MissingExtraError("onnx", "writing an adapter for onnxruntime") from error
    with new_output(output) as sibling:
        form = runtime.AdapterFormat()
        form.set_adapter_version(_VERSION)
        form.set_model_version(_VERSION)
        form.set_parameters({name: runtime.OrtValue.ortvalue_from_numpy(values) for name, values in content.items()})
        form.export_adapter(os.fspath(sibling))
        _check(content, ready, sibling)
        return replace(size, nbytes=sync_size(sibling))


def _check(content: Mapping[str, npt.NDArray[Any]], ready: AdapterReady, adapter: Path) -> None:
    """Raises OutputError when onnxruntime reads other numbers than were written, or does not run the model with them."""
    import onnxruntime as runtime

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
    except runtime_errors() as error:
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
