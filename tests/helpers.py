"""Tiny models and packs, made without torch, and comparisons that show what differs."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import HealthCheck, settings
from safetensors.numpy import save

from nestpatch import rows as library
from nestpatch.delta import TensorDelta
from nestpatch.pack import BaseIdentity, Manifest, Pack, TensorIdentity

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
FLOATS = ("BF16", "F16", "F32")
PATCHED = ("gate_proj", "up_proj")
FUSED = [f"model.layers.{layer}.mlp.gate_up_proj.weight" for layer in range(2)]
"""The same in one matrix, as Phi-3 has them, in two layers."""

PROPERTY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""For hypothesis: busy machines make examples slow, not wrong."""


def tiny_tensors(*, dtype: str, seed: int, hidden: int, inter: int, layers: int) -> dict[str, np.ndarray]:
    """The weights of a random llama-like model, without attention."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= {f"{mlp}.{name}.weight": (inter, hidden) for name in PATCHED}
        shapes[f"{mlp}.down_proj.weight"] = (hidden, inter)
    return {name: (0.1 * random.standard_normal(shape)).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def tiny_checkpoint(
    folder: Path,
    *,
    dtype: str = "BF16",
    sharded: bool = False,
    seed: int = 0,
    hidden: int = 16,
    inter: int = 24,
    layers: int = 2,
) -> Path:
    """Writes a random model directory, returns it."""
    tensors = tiny_tensors(dtype=dtype, seed=seed, hidden=hidden, inter=inter, layers=layers)
    return write_checkpoint(folder, tensors, sharded=sharded)


def write_checkpoint(folder: Path, tensors: Mapping[str, np.ndarray], *, sharded: bool = False) -> Path:
    """Writes a model directory with these weights, in one file or in two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures":["LlamaForCausalLM"],"model_type":"llama"}', encoding="utf-8")
    if not sharded:
        (folder / "model.safetensors").write_bytes(save(dict(tensors), {"format": "pt"}))
        return folder
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        (folder / file).write_bytes(save({name: tensors[name] for name in part}, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return folder


def weight_files(model: Path) -> list[Path]:
    """The safetensors files of a model, sorted by name."""
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))


def places(file: Path) -> dict[str, tuple[np.dtype[Any], tuple[int, ...], int, int]]:
    """Tensor name -> (dtype, shape, first byte, end) in a safetensors file, read without the library under test."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            found[name] = (DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start, 8 + length + stop)
    return found


def load_tensors(model: Path) -> dict[str, np.ndarray]:
    """All tensors of a model, as they are stored."""
    tensors = {}
    for file in weight_files(model):
        data = file.read_bytes()
        for name, (dtype, shape, start, stop) in places(file).items():
            tensors[name] = np.frombuffer(data[start:stop], dtype).reshape(shape)
    return tensors


def tiny_pack(
    checkpoint_dir: Path,
    *,
    clusters: int = 2,
    delta_dtype: str = "BF16",
    scale: float = 0.05,
    seed: int = 0,
    name: str = "no-harm",
    version: str = "1.0.0",
    neurons: int = 9,
    tensors: Sequence[str] | None = None,
    kind: str = "clusters",
) -> Pack:
    """A valid pack for a model: random deltas on random rows of its gate and up projections, or of the tensors named.

    Of the kind "low rank", rows get sums of the `clusters` vectors; of the kind "mixed", those of every second tensor do.
    """
    stored = load_tensors(checkpoint_dir)
    random = np.random.default_rng(seed)
    chosen = sorted(tensors or (n for n in stored if any(f".{part}." in n for part in PATCHED)))
    deltas, identities, results = [], {}, {}
    for number, tensor in enumerate(chosen):
        low_rank = kind == "low rank" or (kind == "mixed" and number % 2 == 0)
        whole = stored[tensor]
        matrix = whole.reshape(-1, whole.shape[-1])
        rows = np.sort(random.choice(len(matrix), neurons, replace=False)).astype(np.int32)
        delta = TensorDelta(
            tensor,
            delta=(scale * random.standard_normal((clusters, matrix.shape[1]))).astype(DTYPES[delta_dtype]),
            rows=rows,
            sketch=library.sketch(matrix[rows]),
            **(
                {"factors": random.standard_normal((neurons, clusters)).astype(DTYPES[delta_dtype])}
                if low_rank
                else {"cluster": random.permutation(np.arange(neurons) % clusters).astype(np.uint8)}
            ),
        )
        deltas.append(delta)
        digests = library.digest([whole]), library.digest([matrix[rows]])
        identities[tensor] = TensorIdentity(whole.shape, library.dtype_name(whole.dtype), *digests)
        results[tensor] = library.digest([library.merge(matrix[rows], delta.dense())])
    manifest = Manifest(
        name=name,
        version=version,
        description="für Prüfungen",
        license="Apache-2.0",
        created="2026-11-23T12:00:00Z",
        base=BaseIdentity("tiny/llama", "0123abc", "LlamaForCausalLM", "BF16", identities),
        result=results,
        tags=("test",),
        method={"seed": seed, "rate": 0.001},
    )
    return Pack(manifest, tuple(deltas))


def tree_digest(path: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of the file; directories and links are listed too."""
    found = {}
    for place in [path] if path.is_file() else sorted(path.rglob("*")):
        if place.is_symlink():
            kind = f"link to {place.readlink()}"
        else:
            kind = "directory" if place.is_dir() else sha256(place.read_bytes()).hexdigest()
        found[place.relative_to(path).as_posix()] = kind
    return found


def assert_same_bytes(got: bytes, want: bytes, dtype: str = "F32") -> None:
    """Fails with the XOR at the first difference and the worst element, read as values of `dtype`."""
    if got == want:
        return
    if len(got) != len(want):
        raise AssertionError(f"{len(got)} bytes instead of {len(want)}")
    ours, theirs = np.frombuffer(got, np.uint8), np.frombuffer(want, np.uint8)
    different = np.flatnonzero(ours ^ theirs)
    first = int(different[0])
    xor = (ours ^ theirs)[first : first + 16].tobytes().hex()
    # Elements are counted from the end: a header may have any length.
    size = DTYPES[dtype].itemsize
    spare = len(got) % size
    values = [np.frombuffer(data[spare:], DTYPES[dtype]).astype(np.float64) for data in (got, want)]
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(values[0] - values[1]), nan=np.inf)
    worst = int(distance.argmax())
    raise AssertionError(
        f"{len(different)} of {len(want)} bytes differ, first at {first}, XOR from there {xor}; worst element at byte "
        f"{spare + worst * size}: {values[0][worst]!r} instead of {values[1][worst]!r} as {dtype}"
    )


def changed(value: Any, change: Callable[[Any], None]) -> Any:
    """A deep copy of a JSON value after `change`."""
    copy = json.loads(json.dumps(value))
    change(copy)
    return copy
