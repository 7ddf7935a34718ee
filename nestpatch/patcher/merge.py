"""What rows must hold after a merge, in whatever type a file stores them.

Rows of plain numbers follow the merge rule (docs/nest-format.md). A quantized row cannot: adding a small delta to the values of
its blocks and rounding again mostly gives the same blocks. So it is made from the float base where that is available ("exact":
the bytes are those of merging first and quantizing the whole model then), else from the blocks, and the share of the delta that
survives rounding is measured.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.delta import TensorDelta
from nestpatch.errors import PackContentError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, TensorInfo
from nestpatch.formats.opening import open_checkpoint
from nestpatch.patcher.touched import rows_of, untouched
from nestpatch.rows import DTYPES, FloatArray, Rows, inner, merge, scaled
from nestpatch.values import dataclass

FROM_ROWS = "from the quantized rows"
"""Source of quantized rows as ledgers name it, where there was no float base."""
_FROM_BASE = "from the float base"
LEAST_RETENTION = 0.9
"""Share of a delta that must survive rounding in every tensor."""


@dataclass(frozen=True, eq=False)
class QuantizedMerge:
    """How a merge computes quantized rows."""

    base: Checkpoint | None = None
    """The float model that the file was made from: the rows are then exact."""
    dither: bool = False
    """Noise of one step before rounding: small deltas survive on average, for noisier rows."""

    @property
    def source(self) -> str:
        """What quantized rows are made from, as ledgers name it."""
        source = _FROM_BASE if self.base is not None else FROM_ROWS
        return f"{source}, dithered" if self.dither else source


def quantized_merge(base: str | Path | Checkpoint | None, *, dither: bool = False) -> QuantizedMerge:
    """Opens the float base where it is a path.

    Args:
        base: The float model, or its path; None for none.
        dither: Whether noise is added before rounding.

    Returns:
        The value that merges take.

    Raises:
        CheckpointError: The base cannot be opened.
    """
    return QuantizedMerge(open_checkpoint(base) if isinstance(base, (str, Path)) else base, dither)


@dataclass(frozen=True)
class Retention:
    """How much of a delta survived rounding: sums of products over elements, so that parts add up."""

    delivered: float = 0.0
    requested: float = 0.0

    def __add__(self, other: Retention) -> Retention:
        return Retention(self.delivered + other.delivered, self.requested + other.requested)

    @property
    def share(self) -> float:
        """1: all of it; 0: nothing."""
        return self.delivered / self.requested if self.requested else 1.0


def fitted(checkpoint: Checkpoint, delta: TensorDelta, base: Checkpoint | None) -> TensorInfo:
    """The facts of a tensor, with the codec of the quantizer that made its rows.

    Where quantizers differ, rows that the pack leaves alone show which one was used.

    Args:
        checkpoint: The model.
        delta: The pack's change of the tensor.
        base: The float model; without it the codec stays as it is.

    Returns:
        The tensor's info.

    Raises:
        QuantizationError: No known quantizer makes these rows from the base.
    """
    info = checkpoint.info(delta.name)
    if base is None or info.codec is None or not info.codec.witnesses:
        return info
    spared = untouched(delta, info.rows)
    rows = spared[:: max(1, len(spared) // info.codec.witnesses)][: info.codec.witnesses]
    if not len(rows):
        return info
    origin = base.read_rows(delta.name, rows).astype(np.float32)
    return replace(info, codec=info.codec.fitted(origin, checkpoint.read_rows(delta.name, rows).view(np.uint8)))


@dataclass(frozen=True, eq=False)
class TouchedBlock:
    """Some touched rows of a tensor, and what merging needs beside them."""

    info: TensorInfo
    """The tensor, as `fitted` gives it."""
    delta: TensorDelta
    part: slice
    """Which of the delta's rows these are."""
    stored: Rows
    """What they hold: [rows, in_features] in the stored dtype, or uint8 [rows, row_bytes]."""
    plain: bool
    """Whether the merge rule applies: all other rows are made anew."""
    origin: Rows | None
    """The rows of the float base from which they are made; None: from `stored`."""


def touched_block(
    info: TensorInfo, delta: TensorDelta, dtype: str, part: slice, stored: Rows, base: Checkpoint | None
) -> TouchedBlock:
    """Reads what merging needs beside the touched rows.

    Args:
        info: The tensor, as `fitted` gives it.
        delta: The pack's change of it.
        dtype: The dtype of the tensor in the pack's base.
        part: Which of the delta's rows these are.
        stored: What they hold.
        base: The float model, for rounded rows.

    Returns:
        The block.

    Raises:
        CheckpointError: Rows of the base cannot be read.
    """
    # Quantized rows, and with a base also those of another dtype, are made anew; all others follow the merge rule. Where the
    # pack's base is quantized, float rows have lost nothing that a float base could give back.
    plain = info.plain and (base is None or info.dtype == dtype or dtype not in DTYPES)
    origin = None if plain or base is None else base.read_rows(delta.name, rows_of(delta, part))
    return TouchedBlock(info, delta, part, stored, plain, origin)


def merged_rows(block: TouchedBlock, change: FloatArray, strength: float, *, dither: bool) -> tuple[Rows, Retention]:
    """What some touched rows must hold after a merge, from what they hold now.

    Args:
        block: The rows.
        change: float32 [rows, in_features], the delta of these rows written out.
        strength: Multiplies the delta.
        dither: Whether noise is added before rounding.

    Returns:
        (rows in the form of `block.stored`, how much of the delta they hold).

    Raises:
        PackContentError: A sum leaves the range of the dtype.
        QuantizationError: Rows of this type cannot be quantized here.
    """
    info, stored = block.info, block.stored
    if block.plain:
        return merge(stored, change, strength), Retention()
    requested = scaled(change, strength)
    if block.origin is not None:
        start, wanted = block.origin.astype(np.float32), merge(block.origin, change, strength).astype(np.float32)
    else:
        start = info.coding.decode(stored.view(np.uint8))
        wanted = start + requested
    noisy = wanted + _noise(info, block.delta, block.part, wanted) if dither else wanted
    blocks = info.coding.encode(noisy)
    arrived = info.coding.decode(blocks)
    if not np.isfinite(arrived).all():
        raise PackContentError(f"the merged weights of {block.delta.name} leave the range of {info.dtype}")
    retention = Retention(inner(arrived - start, requested), inner(requested, requested))
    return blocks.view(stored.dtype), retention


def _noise(info: TensorInfo, delta: TensorDelta, part: slice, rows: FloatArray) -> FloatArray:
    """Uniform over one quantization step of each element's neighbours, float32 like `rows`; the same at every run.

    Each row has a seed of its own, so that the noise does not depend on how rows are cut into blocks.
    """
    width, span = rows.shape[1], info.coding.span
    padded = np.pad(np.abs(rows), ((0, 0), (0, -width % span))).reshape(len(rows), -1, span)
    step = np.repeat(2 * padded.max(axis=2) / info.coding.steps, span, axis=1)[:, :width]
    uniform = np.stack([_generator(delta.name, row).random(width, np.float32) for row in delta.rows[part].tolist()])
    scaled: FloatArray = (uniform - np.float32(0.5)) * step
    return scaled


def _generator(tensor: str, row: int) -> np.random.Generator:
    """The random numbers of one row."""
    return np.random.default_rng(np.frombuffer(sha256(f"{tensor} {row}".encode()).digest(), np.uint64))


def require_retention(retentions: dict[str, Retention], label: str) -> None:
    """Checks that enough of a pack survives rounding in every tensor.

    Args:
        retentions: Tensor name -> how much of its delta survives.
        label: Name and version of the pack.

    Raises:
        QuantizationError: Less than LEAST_RETENTION in some tensor. The message names the three ways out.
    """
    weak = {
        name: retention.share
        for name, retention in retentions.items()
        if retention.requested and retention.share < LEAST_RETENTION
    }
    if not weak:
        return
    worst = sorted(weak, key=lambda name: weak[name])
    lines = [f"  {name}: {weak[name]:.0%} of the change would be left" for name in worst[:3]]
    lines += [f"  and {len(weak) - 3} more"] if len(weak) > 3 else []
    raise QuantizationError(
        f"rounding to quantized rows would lose {label} in {len(weak)} of {len(retentions)} tensors "
        f"(limit {LEAST_RETENTION:.0%}):\n" + "\n".join(lines),
        advice="Give the float model, so that rows are made exactly: --base DIR or a Hub id. "
        "Or load the pack beside the model: nestpatch export PACK --to gguf-lora, or onnx-adapter. "
        "Or accept noisier rows: --dither.",
    )
