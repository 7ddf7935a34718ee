"""A pack as a LoRA adapter for llama.cpp: one GGUF file that is loaded beside the base model, whatever the base's types are.

For each matrix `<tensor>.lora_a` [rank, in_features] and `<tensor>.lora_b` [rows, rank], F32, experts stacked before them.
`adapter.lora.alpha` is 0, which llama.cpp reads as scale 1; it would divide any other alpha by the rank of each matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import UnsupportedModelError
from nestpatch.files.scratch import new_output
from nestpatch.formats.gguf.names import RowSpan, expert_of, gguf_architecture, gguf_spans
from nestpatch.formats.lora.factors import Matrix, Part, Written, check_shape, require_experts, size_of, sync_size
from nestpatch.formats.provenance import PACKS, packs_json
from nestpatch.pack import Pack

MAX_LAYERS = 4096
"""More than any model has: the table of names grows with the number."""
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def matrices(pack: Pack, experts: int | None = None) -> list[Matrix]:
    """The matrices of a pack by their names in the GGUF file of its base.

    Args:
        pack: The pack.
        experts: Experts per layer; needed where the pack changes experts that the base stores one by one.

    Returns:
        The matrices, sorted by name.

    Raises:
        UnsupportedModelError: A GGUF adapter cannot change the architecture, or one of the tensors.
    """
    base = pack.manifest.base
    architecture = gguf_architecture(base.architecture)
    layers = 1 + max((int(match[1]) for delta in pack if (match := _LAYER.search(delta.name))), default=0)
    if layers > MAX_LAYERS:
        raise UnsupportedModelError(f"the pack names layer {layers - 1}", advice="Is this the pack's base?")
    found: dict[str, list[Matrix]] = {}
    for delta in pack:
        shape = base.tensors[delta.name].shape
        check_shape(delta, shape)
        spans = gguf_spans(delta.name, shape, architecture, layers)
        for matrix in _pieces(delta, shape, spans, experts):
            found.setdefault(matrix.name, []).append(matrix)
    joined = []
    for name, pieces in sorted(found.items()):
        rows, width, count = pieces[0].rows, pieces[0].width, pieces[0].experts
        if any((piece.rows, piece.width, piece.experts) != (rows, width, count) for piece in pieces):
            raise UnsupportedModelError(f"the pack's tensors for {name} have different shapes")
        joined.append(Matrix(name, rows, width, tuple(part for piece in pieces for part in piece.parts), count))
    return joined


def _pieces(delta: TensorDelta, shape: tuple[int, ...], spans: tuple[RowSpan, ...], experts: int | None) -> Iterator[Matrix]:
    """The matrices that a tensor of the pack changes."""
    width = shape[-1]
    if len(shape) == 2:
        (span,) = spans
        number = expert_of(delta.name)
        if number is None:
            yield Matrix(span.tensor, span.rows, width, (Part(delta, 0, span.rows),))
            return
        count = require_experts(experts, delta, number[1])
        yield Matrix(span.tensor, span.rows, width, (Part(delta, 0, span.rows, number[1]),), count)
        return
    # A stack of experts, or the two stacks that it becomes, gate rows before up rows.
    names = list(dict.fromkeys(span.tensor for span in spans))
    experts, rows = shape[0], shape[1] // len(names)
    # Blocks of `rows` rows: those of expert 0 for each name, then those of expert 1.
    blocks = np.unique(delta.rows.astype(np.int64) // rows).tolist()
    for place, name in enumerate(names):
        mine = [block for block in blocks if block % len(names) == place]
        parts = tuple(Part(delta, block * rows, rows, block // len(names)) for block in mine)
        if parts:
            yield Matrix(name, rows, width, parts, experts)


def write(pack: Pack, output: Path, strength: float = 1.0, experts: int | None = None, *, dry_run: bool = False) -> Written:
    """Writes the adapter; equal packs give equal bytes. When it raises, nothing was written.

    Args:
        pack: The pack.
        output: The new .gguf file.
        strength: How much of the deltas the adapter adds.
        experts: Experts per layer, as in `matrices`.
        dry_run: Whether to compute the size only.

    Returns:
        The size of the adapter.

    Raises:
        UnsupportedModelError: A GGUF adapter cannot change the architecture, or one of the tensors.
        PackContentError: A delta times the strength is beyond float32.
        OutputError: The path exists already, cannot be written, or a factor is too large.
    """
    found = [(matrix, matrix.rank) for matrix in matrices(pack, experts)]
    size = size_of(found)
    if dry_run:
        return size
    from gguf import GGUFWriter

    with new_output(output) as sibling:
        with closing(GGUFWriter(sibling, gguf_architecture(pack.manifest.base.architecture))) as writer:
            writer.add_type("adapter")
            writer.add_string("adapter.type", "lora")
            writer.add_float32("adapter.lora.alpha", 0.0)
            writer.add_name(pack.label)
            writer.add_version(pack.manifest.version)
            writer.add_description(pack.manifest.description)
            writer.add_license(pack.manifest.license)
            writer.add_string(PACKS, packs_json(pack, strength))
            for matrix, rank in found:
                for suffix, shape in zip("ab", matrix.shapes(rank), strict=True):
                    nbytes = 4 * int(np.prod(shape, dtype=np.int64))
                    writer.add_tensor_info(f"{matrix.name}.lora_{suffix}", shape, np.dtype(np.float32), nbytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            # One matrix in memory at a time: `b` is as tall as the matrix.
            for matrix, rank in found:
                for factor in matrix.factors(rank, strength):
                    writer.write_tensor_data(factor)
        nbytes = sync_size(sibling)
    return Written(size.matrices, size.rank, nbytes)
