"""What rows must hold after a merge, in whatever type a file stores them.

Rows of plain numbers follow the merge rule (docs/nest-format.md). A quantized row cannot: adding a small delta to what its
blocks say and rounding again mostly gives the same blocks. So it is made from the float base where that is at hand ("exact":
the bytes are those of merging first and quantizing then), else from the blocks, and how much of the delta arrives is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from nestpatch.errors import PackContentError, QuantizationError
from nestpatch.formats.checkpoint import Checkpoint, IntArray, TensorInfo
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import TensorDelta
from nestpatch.rows import FloatArray, Rows, merge

FROM_BASE, FROM_ROWS = "from the float base", "from the quantized rows"
"""What quantized rows are made of, as ledgers have it."""
LEAST_GAIN = 0.9
"""Share of a delta that has to arrive in the rows of every tensor."""


@dataclass(frozen=True, eq=False)
class QuantizedMerge:
    """What a merge into rounded rows may use."""

    base: Checkpoint | None = None
    """The float model that the file was made of: the rows are then exact."""
    dither: bool = False
    """Noise of one step before rounding: small deltas arrive on average, for noisier rows."""

    @property
    def told(self) -> str:
        """For people: what quantized rows are made of."""
        source = FROM_BASE if self.base is not None else FROM_ROWS
        return f"{source}, dithered" if self.dither else source


def quantized_merge(base: str | Path | Checkpoint | None, *, dither: bool = False) -> QuantizedMerge:
    """Opens the float base where it is a path. Raises CheckpointFormatError."""
    return QuantizedMerge(open_checkpoint(base) if isinstance(base, (str, Path)) else base, dither)


@dataclass(frozen=True)
class Retention:
    """How much of a delta arrived: a sum of products over elements, so that parts add up."""

    delivered: float = 0.0
    asked: float = 0.0

    def __add__(self, other: Retention) -> Retention:
        return Retention(self.delivered + other.delivered, self.asked + other.asked)

    @property
    def share(self) -> float:
        """1: all of it; 0: nothing."""
        return self.delivered / self.asked if self.asked else 1.0


def is_rounded(info: TensorInfo, dtype: str, quantized: QuantizedMerge) -> bool:
    """Whether rows are made anew instead of by the merge rule: quantized ones, and with a base those of another dtype."""
    return not info.plain or (quantized.base is not None and info.dtype != dtype)


def fitted(checkpoint: Checkpoint, delta: TensorDelta, base: Checkpoint | None) -> TensorInfo:
    """The tensor, stored as its own quantizer stored it: told, where that matters, from rows that the pack leaves alone.

    Raises QuantizationError when no known quantizer makes them of the base's rows.
    """
    info = checkpoint.info(delta.name)
    if base is None or info.codec is None or not info.codec.witnesses:
        return info
    spared = np.setdiff1d(np.arange(info.rows), delta.rows)
    rows = spared[:: max(1, len(spared) // info.codec.witnesses)][: info.codec.witnesses]
    if not len(rows):
        return info
    origin = base.read_rows(delta.name, rows).astype(np.float32)
    return replace(info, codec=info.codec.fitted(origin, checkpoint.read_rows(delta.name, rows).view(np.uint8)))


def merged_rows(
    info: TensorInfo, delta: TensorDelta, dtype: str, part: slice, stored: Rows, strength: float, quantized: QuantizedMerge
) -> tuple[Rows, Retention]:
    """What some touched rows must hold, from what they hold: (rows in the form of `stored`, the retention).

    `dtype` is that of the pack's base, `part` the slice of the delta's rows that `stored` holds.

    Raises PackContentError when a sum leaves the range of the dtype, QuantizationError when rows cannot be quantized here.
    """
    change = delta.dense(part.start, part.stop)
    if not is_rounded(info, dtype, quantized):
        return merge(stored, change, strength), Retention()
    asked = np.float32(strength) * change
    if quantized.base is not None:
        exact = quantized.base.read_rows(delta.name, delta.rows[part].astype(np.int64))
        start, wanted = exact.astype(np.float32), merge(exact, change, strength).astype(np.float32)
    else:
        start = info.coding.decode(stored.view(np.uint8))
        wanted = start + asked
    noisy = wanted + noise(info, delta, part, wanted) if quantized.dither else wanted
    blocks = info.coding.encode(noisy)
    arrived = info.coding.decode(blocks)
    if not np.isfinite(arrived).all():
        raise PackContentError(f"the merged weights of {delta.name} leave the range of {info.dtype}")
    return blocks.view(stored.dtype), retention_of(arrived - start, asked)


def retention_of(arrived: FloatArray, asked: FloatArray) -> Retention:
    """How much of `asked` is in `arrived`, both float32 [rows, in_features]."""
    wide = asked.astype(np.float64)
    return Retention(float(np.vdot(arrived.astype(np.float64), wide)), float(np.vdot(wide, wide)))


def noise(info: TensorInfo, delta: TensorDelta, part: slice, rows: FloatArray) -> FloatArray:
    """Uniform over one quantization step of each element's neighbours, float32 like `rows`; the same at every run."""
    seed = sha256(f"{delta.name} {part.start}".encode() + delta.rows[part].tobytes()).digest()
    random = np.random.default_rng(np.frombuffer(seed, np.uint64))
    width, span = rows.shape[1], info.coding.span
    padded = np.pad(np.abs(rows), ((0, 0), (0, -width % span))).reshape(len(rows), -1, span)
    step = np.repeat(2 * padded.max(axis=2) / info.coding.steps, span, axis=1)[:, :width]
    scaled: FloatArray = (random.random(rows.shape, np.float32) - np.float32(0.5)) * step
    return scaled


def require_retention(retentions: dict[str, Retention], label: str) -> None:
    """Raises QuantizationError, with the three ways out, when a tensor would not get what its pack adds."""
    weak = {name: retention.share for name, retention in retentions.items() if retention.asked and retention.share < LEAST_GAIN}
    if not weak:
        return
    worst = sorted(weak, key=lambda name: weak[name])
    lines = [f"  {name}: {weak[name]:.0%} of the patch would arrive" for name in worst[:3]]
    lines += [f"  and {len(weak) - 3} more"] if len(weak) > 3 else []
    raise QuantizationError(
        f"rounding to quantized rows would lose {label} in {len(weak)} of {len(retentions)} tensors:\n" + "\n".join(lines),
        advice="Give the float model, so that rows are made exactly: --base DIR or a Hub id. "
        "Or load the patch beside the model: nestpatch export PATCH --to gguf-lora, or onnx-adapter. "
        "Or accept noisier rows: --dither.",
    )


def rows_of(delta: TensorDelta, part: slice) -> IntArray:
    """The row numbers of a slice, int64."""
    return delta.rows[part].astype(np.int64)


def working_bytes(info: TensorInfo) -> int:
    """Bytes that a row takes while it is worked on: quantized ones become float32."""
    return info.row_bytes if info.plain else 4 * info.shape[-1]
