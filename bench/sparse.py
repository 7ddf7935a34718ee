"""Models of 8 and 70 billion parameters in files of holes: the rows that a pack touches hold numbers, and take room on disk.

A directory of shards as transformers saves them, and a GGUF file of the types that llama.cpp's Q4_K_M mixes. nestpatch reads,
hashes and writes the touched rows of such files as those of any model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from bench.model import (
    DELTA_STD,
    MODELS,
    SHARE,
    WEIGHT_STD,
    forget,
    place_of,
    safetensors_header,
    shapes_of,
    touched_rows,
    write_config,
    write_pack,
)

if TYPE_CHECKING:
    from bench.model import Rows, Sizes

SHARD = 5_000_000_000
"""Most bytes of a shard: the limit with which the checkpoints of Llama 3.1 were saved."""
VERSIONS = ("1.0.0", "1.1.0")
"""Of the pack: the second one has other deltas on the same rows."""
GGUF = "q4_k_m.gguf"
_MERGES = 280_147
"""Merges of Llama 3's vocabulary, which a GGUF header holds."""
_PAGE = 4096


def rows_of(sizes: Sizes) -> Rows:
    """Tensor name -> the rows that the packs touch: 3 % of the neurons in the middle half of the layers."""
    layers = sizes.num_hidden_layers
    return touched_rows(sizes, 2 * SHARE, range(layers // 4, layers // 4 + layers // 2))


def write_shards(folder: Path, sizes: Sizes, limit: int = SHARD) -> None:
    """Writes a directory of safetensors shards, all zeros."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes_of(sizes).items():
        if shards[-1] and safetensors_header({**shards[-1], name: shape})[1] > limit:
            shards.append({})
        shards[-1][name] = shape
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards, start=1):
        header, nbytes = safetensors_header(shapes)
        file = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_hole(file, header, nbytes)
        weight_map |= dict.fromkeys(shapes, file.name)
        total += nbytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_config(folder, sizes)


def fill_rows(model: Path, rows: Rows) -> None:
    """Gives the touched rows of a directory random numbers."""
    import numpy as np

    from nestpatch.formats.opening import open_checkpoint
    from nestpatch.rows import DTYPES

    checkpoint, random = open_checkpoint(model), np.random.default_rng(0)
    for name, chosen in rows.items():
        values = random.standard_normal((len(chosen), checkpoint.info(name).shape[1]), np.float32) * np.float32(WEIGHT_STD)
        checkpoint.write_rows(name, chosen, values.astype(DTYPES["BF16"]))


def write_gguf(file: Path, base: Path, sizes: Sizes, rows: Rows) -> None:
    """Writes a GGUF file whose touched rows are those of the base, quantized as llama.cpp does."""
    from nestpatch.formats.checkpoint import float_rows
    from nestpatch.formats.gguf import quants
    from nestpatch.formats.gguf.header import encode_header, padding
    from nestpatch.formats.gguf.names import gguf_name
    from nestpatch.formats.opening import open_checkpoint

    entries, total = [], 0
    for name, shape in shapes_of(sizes).items():
        kind, place = _type_of(name, sizes), gguf_name(name, "llama", sizes.num_hidden_layers)
        nbytes = 4 * shape[0] if kind == "F32" else shape[0] * quants.row_bytes(kind, shape[1])
        entries.append((place, shape, kind, nbytes))
        total += nbytes + padding(nbytes)
    _write_hole(file, encode_header(_facts(sizes), entries), total)
    origin, target = open_checkpoint(base), open_checkpoint(file)
    for name, chosen in rows.items():
        target.write_rows(name, chosen, target.info(name).coding.encode(float_rows(origin, name, chosen)))


def _type_of(name: str, sizes: Sizes) -> str:
    """The type of a tensor in a file of type Q4_K_M (llama_tensor_get_type of llama.cpp)."""
    if name.endswith("norm.weight"):
        return "F32"
    if name == "lm_head.weight":
        return "Q6_K"
    if "down_proj" in name or "v_proj" in name:
        layers, layer = sizes.num_hidden_layers, int(name.split(".")[2])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return "Q6_K" if more else "Q4_K"
    return "Q4_K"


def _facts(sizes: Sizes) -> dict[str, object]:
    """The metadata that a converter writes, with a vocabulary of the right size."""
    from nestpatch.formats.gguf import quants

    tokens = [f"token{n}" for n in range(sizes.vocab_size)]
    return {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "sparse",
        "general.file_type": quants.code("Q4_K_M"),
        "general.quantization_version": 2,
        "llama.block_count": sizes.num_hidden_layers,
        "llama.context_length": 131072,
        "llama.embedding_length": sizes.hidden_size,
        "llama.feed_forward_length": sizes.intermediate_size,
        "llama.attention.head_count": sizes.num_attention_heads,
        "llama.attention.head_count_kv": sizes.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": sizes.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.merges": [f"left{n % 500} right{n}" for n in range(_MERGES * len(tokens) // 128256)],
    }


def write_next(model: Path, first: Path, second: Path) -> None:
    """Writes the pack's next version, other deltas on the same rows, without reading the whole tensors again."""
    import numpy as np

    from nestpatch.formats import nest
    from nestpatch.formats.checkpoint import float_rows
    from nestpatch.formats.opening import open_checkpoint
    from nestpatch.rows import digest, merge

    pack, checkpoint, random = nest.read(first), open_checkpoint(model), np.random.default_rng(2)
    deltas, results = [], {}
    for delta in pack:
        change = (DELTA_STD * random.standard_normal(delta.delta.shape)).astype(delta.delta.dtype)
        deltas.append(replace(delta, delta=change))
        rows = float_rows(checkpoint, delta.name, delta.rows).astype(delta.delta.dtype)
        results[delta.name] = digest([merge(rows, deltas[-1].dense())])
    manifest = replace(pack.manifest, version=VERSIONS[1], result=results)
    nest.write(replace(pack, manifest=manifest, deltas=tuple(deltas)), second, overwrite=True)


def _write_hole(file: Path, head: bytes, nbytes: int) -> None:
    with open(file, "wb") as handle:
        handle.write(head)
        handle.truncate(len(head) + nbytes)


def digest_data(files: Iterable[Path]) -> str:
    """SHA-256 of what files hold: their sizes, and every page that is not zero with its place. Holes are not read."""
    state = sha256()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            state.update(f"{path.name} {size}\n".encode())
            for place, page in _pages(file.fileno(), size):
                state.update(place.to_bytes(8, "little") + page)
    return state.hexdigest()


def _pages(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(offset, content) of the pages that are not zero."""
    zero, at = bytes(_PAGE), 0
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA) // _PAGE * _PAGE
        except OSError:  # only a hole is left
            return
        end = os.lseek(descriptor, at, os.SEEK_HOLE)
        while at < end:
            block = os.pread(descriptor, min(1 << 20, size - at), at)
            for start in range(0, len(block), _PAGE):
                if (page := block[start : start + _PAGE]) != zero[: len(page)]:
                    yield at + start, page
            at += len(block)


def weight_files(folder: Path) -> list[Path]:
    """The files with weights of a model made by `make_sparse`."""
    return [*sorted((folder / "base").glob("*.safetensors")), folder / GGUF]


def make_sparse(folder: Path, sizes: Sizes, limit: int = SHARD, *, gguf: bool = True) -> None:
    """Makes base/, the GGUF file and the packs of a model, and base.sha256 last.

    Args:
        folder: Where; what is there is removed.
        sizes: Of the model.
        limit: Most bytes of a shard.
        gguf: Whether to make the GGUF file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    base, rows = folder / "base", rows_of(sizes)
    base.mkdir(parents=True)
    write_shards(base, sizes, limit)
    fill_rows(base, rows)
    first, second = (folder / f"{version}.nest" for version in VERSIONS)
    write_pack(base, rows, first, version=VERSIONS[0])
    write_next(base, first, second)
    if gguf:
        write_gguf(folder / GGUF, base, sizes, rows)
    (folder / "base.sha256").write_text(digest_data(path for path in weight_files(folder) if path.is_file()))


def cached_sparse(size: str) -> Path:
    """The folder of a sparse model, made where it is missing or damaged."""
    folder = place_of(MODELS[size])
    card = folder / "base.sha256"
    if not card.is_file() or card.read_text() != digest_data(weight_files(folder)):
        make_sparse(folder, MODELS[size])
    for model in (folder / "base", folder / GGUF):
        forget(model)
    return folder
