"""Tiny GGUF files of tiny checkpoints, written by the gguf package, and quantized by llama.cpp where that is installed."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import gguf
import numpy as np
import pytest

from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Label, Pack
from nestpatch.packing import PackedTensor, build_pack, pack_tensor
from tests.gguf_files import silence_llama
from tests.helpers import load_tensors

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    **{
        f"model.layers.{layer}.mlp.{part}_proj.weight": f"blk.{layer}.ffn_{part}.weight"
        for layer in range(4)
        for part in ("gate", "up", "down")
    },
}
"""The names of the tiny checkpoint's tensors in a GGUF file, written down here on their own."""
PLAIN = ("F32", "F16", "BF16")
ROUND = ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1")
"""Types that the gguf package quantizes."""
K_TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q2_K", "Q3_K", "IQ4_XS")
"""Types that need llama.cpp."""
FILE_TYPES = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7, "Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
    "IQ4_NL": 25, "IQ4_XS": 30,
}  # fmt: skip
"""llama.cpp's numbers for files that hold one type throughout."""
needs_llama = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    kind: str,
    *,
    architecture: str = "llama",
    extra: Mapping[str, str | int] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Path:
    """A GGUF file with these tensors, by their GGUF names: matrices of one type but for `kinds`, vectors as F32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(4)
    # llama.cpp needs these even to quantize.
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_head_count(4)
    writer.add_feed_forward_length(320)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in (extra or {}).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    for name, tensor in tensors.items():
        wide = tensor.astype(np.float32)
        code = gguf.GGMLQuantizationType[(kinds or {}).get(name, kind) if wide.ndim > 1 else "F32"]
        writer.add_tensor(name, wide if code == 0 else gguf.quantize(wide, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_of(checkpoint: Path, path: Path, kind: str) -> Path:
    """A tiny checkpoint as a GGUF file of a type."""
    if kind in K_TYPES:
        return by_llama(gguf_of(checkpoint, path.with_suffix(".f32"), "F32"), path, kind)
    return write_gguf(path, {NAMES[name]: tensor for name, tensor in load_tensors(checkpoint).items()}, kind)


def by_llama(source: Path, path: Path, kind: str) -> Path:
    """Quantizes a file with llama.cpp, every matrix to one type."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure, parameters.nthread = FILE_TYPES[kind], True, 1
    silence_llama()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(parameters))
    assert code == 0, f"llama.cpp could not write {kind}"
    source.unlink()
    return path


def repacked(model: Path, like: Pack) -> Pack:
    """A pack with the same deltas and facts as another one, with this model as its base."""
    facts = like.manifest
    label = Label(facts.name, facts.version, facts.description, facts.license, facts.tags)
    base = {"model_id": facts.base.model_id, "revision": facts.base.revision, "architecture": facts.base.architecture}
    pack = build_pack(packed(model, like), label, **base, method=facts.method)
    return replace(pack, manifest=replace(pack.manifest, created=facts.created))


def packed(model: Path, like: Pack) -> list[PackedTensor]:
    """The tensors of such a pack."""
    checkpoint = open_checkpoint(model)
    return [
        pack_tensor(checkpoint, one.name, one.rows.astype(np.int64), one.delta, cluster=one.cluster, factors=one.factors)
        for one in like
    ]


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def places(path: Path) -> dict[str, tuple[str, int, int, int]]:
    """Tensor -> (type, first byte, bytes of a row, rows), as gguf's own reader sees it."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        width, rows = int(tensor.shape[0]), int(np.prod(tensor.shape[1:]))
        found[tensor.name] = (tensor.tensor_type.name, int(tensor.data_offset), int(tensor.n_bytes) // rows, rows)
        assert width
    return found


def values(path: Path) -> dict[str, np.ndarray]:
    """Tensor -> its numbers, float32 [rows, width], by gguf's own reader."""
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32).reshape(-1, int(t.shape[0]))
        for t in gguf.GGUFReader(path).tensors
    }
