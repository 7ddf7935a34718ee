"""The tensors of a GGUF file: planned from those of the checkpoint, then written a few megabytes of rows at a time.

Rows are converted by all threads that may compute, while the rows before them are written. Each row is converted by itself, so
the file does not depend on their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from nestpatch.errors import CheckpointFormatError, QuantizationError, UnsupportedModelError
from nestpatch.export._gguf_families import Family
from nestpatch.export._model_config import OTHER_CONVERTER, ModelConfig
from nestpatch.export._stored import append_blocks, append_tensor
from nestpatch.files.hashing import Data, Sink
from nestpatch.files.threads import in_parts, limited
from nestpatch.formats.checkpoint import Checkpoint, row_blocks
from nestpatch.formats.gguf import quants
from nestpatch.formats.gguf.names import gguf_name, gguf_spans, is_reordered
from nestpatch.formats.gguf.quants import AUTO, FileType
from nestpatch.rows import DTYPES, FloatArray, Rows

HEAD = "lm_head.weight"
SKIPPED = re.compile(r".+\.(?:rotary_emb\.inv_freq|attention\.masked_bias|attention\.bias)")
"""Buffers in old checkpoints that are computed from config.json."""
_WORTHWHILE = 1 << 16
"""Numbers from which converting takes longer than starting a thread."""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True)
class TensorPiece:
    """Consecutive rows of a tensor in the checkpoint; of a vector, consecutive elements."""

    tensor: str
    start: int
    rows: int


@dataclass(frozen=True, eq=False)
class Target:
    """One tensor of the GGUF file."""

    name: str
    dtype: str
    """As it will be stored: "BF16", "Q8_0"."""
    shape: tuple[int, ...]
    """Outermost dimension first."""
    pieces: tuple[TensorPiece, ...] = ()
    """Its rows, in order."""
    head: int = 0
    """Rows of a head whose two halves are interleaved; 0: none."""
    shift: float = 0.0
    """Added to every value."""
    values: FloatArray | None = None
    """The content, where it is not read from the checkpoint."""

    @property
    def nbytes(self) -> int:
        rows = 1
        for n in self.shape[:-1]:
            rows *= n
        return rows * quants.row_bytes(self.dtype, self.shape[-1])


def plan_tensors(checkpoint: Checkpoint, config: ModelConfig, family: Family, kind: FileType) -> list[Target]:
    """Plans the tensors of a GGUF file.

    Args:
        checkpoint: The model.
        config: Its configuration, with the family's defaults.
        family: Its family.
        kind: The file type.

    Returns:
        All tensors of the file, in its order.

    Raises:
        UnsupportedModelError: The architecture has no counterpart of a tensor.
        CheckpointFormatError: A tensor is missing, or is not stored as plain numbers.
    """
    targets = [Target(name, "F32", values.shape, values=values) for name, values in family.tensors(config).items()]
    stacks: dict[str, list[tuple[int, TensorPiece]]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for name in sorted(_stored(checkpoint, config, family), key=_natural):
        info = checkpoint.info(name)
        if info.dtype not in DTYPES or info.nbytes == 0 or not info.shape:
            raise CheckpointFormatError(
                f"tensor {name} is stored as {info.dtype} {list(info.shape)}; only {', '.join(DTYPES)} can be exported",
                advice="Export the float model that it was made from.",
            )
        if len(info.shape) < 2 or is_reordered(name, family.gguf):
            targets.append(_whole(name, info.shape, config, family))
            continue
        start = 0
        for span in gguf_spans(name, info.shape, family.gguf, config.layers):
            stacks.setdefault(span.tensor, []).append((span.start, TensorPiece(name, start, span.rows)))
            sizes[span.tensor] = info.shape
            start += span.rows
    targets += [_stack(name, found, sizes[name], config) for name, found in stacks.items()]
    targets = [replace(target, dtype=_dtype(target, checkpoint, kind)) for target in targets]
    _check_layers(targets, config)
    return sorted(targets, key=lambda target: _natural(target.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key: layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _stored(checkpoint: Checkpoint, config: ModelConfig, family: Family) -> list[str]:
    """The tensors of the checkpoint that the file needs. Raises CheckpointFormatError without an output matrix."""
    names = [name for name in checkpoint.tensors() if not SKIPPED.fullmatch(name)]
    tied = family.traits.always_tied or bool(config.get("tie_word_embeddings", default=False))
    if not tied and not any(gguf_name(name, family.gguf, config.layers) == "output.weight" for name in names):
        raise CheckpointFormatError(f"{checkpoint.path} has no {HEAD}, and config.json does not tie it to the embeddings")
    return [name for name in names if not (tied and name == HEAD)]


def _whole(name: str, shape: tuple[int, ...], config: ModelConfig, family: Family) -> Target:
    """A vector, or a matrix whose rows are reordered."""
    place = gguf_name(name, family.gguf, config.layers)
    if place is None:
        raise UnsupportedModelError(
            f"GGUF files of architecture {family.gguf} have no place for the tensor {name}", advice=OTHER_CONVERTER
        )
    target = Target(place, "", shape, (TensorPiece(name, 0, shape[0]),))
    if not is_reordered(name, family.gguf):
        return replace(target, shift=family.traits.norm_shift if name.endswith("norm.weight") else 0.0)
    size = config.head_dim
    if shape[0] % ((3 if family.traits.fused_by_head else 1) * size):
        raise CheckpointFormatError(f"tensor {name} has {shape[0]} rows: not a whole number of heads of {size}")
    if not family.traits.fused_by_head:
        return replace(target, head=size)
    # Query, key and value of each head -> all queries, all keys, all values.
    heads = shape[0] // 3 // size
    parts = (TensorPiece(name, (3 * head + part) * size, size) for part in range(3) for head in range(heads))
    return replace(target, pieces=tuple(parts))


def _stack(name: str, found: list[tuple[int, TensorPiece]], shape: tuple[int, ...], config: ModelConfig) -> Target:
    """A matrix, or the experts of a layer stacked."""
    found = sorted(found, key=lambda entry: entry[0])
    rows = 0
    for start, piece in found:
        if start != rows:
            raise CheckpointFormatError(f"the experts of {name} are not complete: rows {rows} to {start} are missing")
        rows += piece.rows
    if not name.endswith("_exps.weight"):
        return Target(name, "", (rows, shape[-1]), tuple(piece for _, piece in found))
    experts = int(config.get("num_local_experts", "num_experts", default=1))
    if rows % experts:
        raise CheckpointFormatError(f"{name} has {rows} rows for {experts} experts")
    return Target(name, "", (experts, rows // experts, shape[-1]), tuple(piece for _, piece in found))


def _dtype(target: Target, checkpoint: Checkpoint, kind: FileType) -> str:
    """As in llama.cpp: vectors, norms and routers are stored as F32, and so is everything that is not a weight."""
    small = len(target.shape) < 2 or target.name.endswith("_norm.weight") or "ffn_gate_inp" in target.name
    if target.values is not None or small or not target.name.endswith(".weight"):
        return "F32"
    if kind.name == AUTO or not kind.direct:
        # llama.cpp quantizes a file that has lost nothing.
        dtypes = {checkpoint.info(piece.tensor).dtype for piece in target.pieces}
        return dtypes.pop() if len(dtypes) == 1 else "F32"
    if kind.name not in DTYPES and target.shape[-1] % quants.block(kind.name)[0]:
        return "F16"
    return kind.name


def _check_layers(targets: list[Target], config: ModelConfig) -> None:
    """All layers have the same tensors, of the sizes in config.json; llama.cpp would fail only when it loads the file."""
    layers: dict[int, set[str]] = {number: set() for number in range(config.layers)}
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows = {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads, "ffn_down": config.number("hidden_size")}
    for target in targets:
        if found := _BLOCK.fullmatch(target.name):
            layers[int(found[1])].add(found[2])
            want = rows.get(found[2].partition(".")[0], target.shape[0])
            if target.shape[0] != want:
                raise CheckpointFormatError(f"{target.name} has {target.shape[0]} rows; by config.json it should have {want}")
    most = set().union(*layers.values())
    for number, parts in layers.items():
        if parts != most:
            raise CheckpointFormatError(f"layer {number} of {config.layers} lacks {', '.join(sorted(most - parts))}")


def write_tensor(target: Target, checkpoint: Checkpoint, sink: Sink) -> None:
    """Appends the bytes of a tensor.

    Args:
        target: The tensor of the file.
        checkpoint: The model that it is made from.
        sink: The file.

    Raises:
        QuantizationError: Values leave the range of its type.
    """
    if target.values is not None:
        sink.write(target.values.tobytes())
    for piece in target.pieces:
        info = checkpoint.info(piece.tensor)
        whole = piece.rows == (info.rows if len(info.shape) > 1 else info.shape[0])
        if not whole or info.dtype != target.dtype or target.head or target.shift:
            append_blocks((_converted(rows, target) for rows in _read(piece, target, checkpoint)), sink)
        else:
            append_tensor(piece.tensor, checkpoint, sink)


def _read(piece: TensorPiece, target: Target, checkpoint: Checkpoint) -> Iterator[Rows]:
    """The rows of a piece, in whole heads where these are interleaved; a vector is one row."""
    info = checkpoint.info(piece.tensor)
    if len(info.shape) < 2:
        values = np.frombuffer(b"".join(checkpoint.read_all(piece.tensor)), DTYPES[info.dtype])
        vector = values[piece.start : piece.start + piece.rows]
        yield _interleave(vector[:, None], target.head).reshape(1, -1) if target.head else vector[None]
        return
    unit = target.head or 1
    for part in row_blocks(piece.rows // unit, info.row_bytes * unit):
        wanted = np.arange(piece.start + part.start * unit, piece.start + part.stop * unit, dtype=np.int64)
        rows = checkpoint.read_rows(piece.tensor, wanted)
        yield _interleave(rows, target.head) if target.head else rows


def _interleave(rows: Rows, head: int) -> Rows:
    """Alternates the two halves of each head's rows: 0, half, 1, half + 1, ..."""
    return rows.reshape(-1, 2, head // 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def _converted(rows: Rows, target: Target) -> Data:
    if rows.dtype == DTYPES.get(target.dtype) and not target.shift:
        return np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data
    out = np.empty((len(rows), quants.row_bytes(target.dtype, rows.shape[1])), np.uint8)

    def convert(part: slice) -> None:
        with limited(1):  # the codec would divide the part once more
            out[part] = _encoded(rows[part], target)

    in_parts(convert, len(rows), _WORTHWHILE // rows.shape[1])
    return out.reshape(-1).data


def _encoded(rows: Rows, target: Target) -> Rows:
    """The rows in the target's type, as bytes. Raises QuantizationError for numbers outside its range."""
    wide = rows.astype(np.float32)
    if target.shift:
        wide = wide + np.float32(target.shift)
    stored = quants.codec(target.dtype).encode(wide)
    if target.dtype in DTYPES and np.isfinite(wide).all():
        arrived = stored.view(DTYPES[target.dtype]).astype(np.float32, copy=False)
        if not np.isfinite(arrived).all():
            reason = f"{target.name} has values outside the range of {target.dtype}"
            raise QuantizationError(reason, advice="Export with --type bf16 or f32.")
    return stored
