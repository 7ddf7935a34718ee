"""Which deltas give an element exactly its new value, and which rows can share one delta.

For every element of a changed row, the float32 deltas that give exactly the tuned value under the merge rule are an interval:
both the addition and the rounding to the stored dtype are monotone. Rows whose intervals meet in every element share a delta.
Floats are handled by their places in the total order -inf < .. < -0 < +0 < .. < inf, so that intervals are pairs of integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nestpatch.formats.checkpoint import IntArray, row_blocks
from nestpatch.rows import FloatArray, Rows

_PROBES = 16
"""Elements of a row that are compared with all groups first; only the groups that fit them are compared in full."""
_TOP = int(np.finfo(np.float32).max.view(np.int32))
"""Place of the largest finite float32; that of the lowest is -1 - _TOP."""


class Groups:
    """Rows in groups that can share a delta: each row goes to the first group that it fits.

    Args:
        width: Elements per row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        # [width, groups]: one element of all groups is contiguous, because the search reads it that way.
        self._low = np.empty((width, 16), np.int32)
        self._high = np.empty((width, 16), np.int32)

    def place(self, low: npt.NDArray[np.int32], high: npt.NDArray[np.int32]) -> int:
        """Adds a row to the first group that it fits, or to a new one.

        Args:
            low: The places of the row's lowest deltas, [width].
            high: The places of its highest deltas, [width].

        Returns:
            The number of the group.
        """
        group = self._fitting(low, high)
        if group is not None:
            self._low[:, group] = np.maximum(self._low[:, group], low)
            self._high[:, group] = np.minimum(self._high[:, group], high)
            return group
        if self.count == self._low.shape[1]:
            self._low, self._high = (np.concatenate([old, np.empty_like(old)], axis=1) for old in (self._low, self._high))
        self._low[:, self.count], self._high[:, self.count] = low, high
        self.count += 1
        return self.count - 1

    def _fitting(self, low: npt.NDArray[np.int32], high: npt.NDArray[np.int32]) -> int | None:
        # The narrowest intervals exclude the most groups; an interval around zero contains a quarter of all floats.
        spans = high.astype(np.int64) - low
        probes = np.argpartition(spans, _PROBES)[:_PROBES] if len(spans) > _PROBES else np.arange(len(spans))
        live = np.arange(self.count)
        for probe in probes:
            live = live[(self._low[probe, live] <= high[probe]) & (self._high[probe, live] >= low[probe])]
        for start in range(0, len(live), 64):
            part = live[start : start + 64]
            fits = ((self._low[:, part] <= high[:, None]) & (self._high[:, part] >= low[:, None])).all(axis=0)
            if fits.any():
                return int(part[fits.argmax()])
        return None

    def deltas(self) -> FloatArray:
        """One delta per group, float32 [groups, width]: zero where zero fits, else the middle of the interval."""
        out = np.empty((self.count, self.width), np.float32)
        for part in row_blocks(self.count, 32 * self.width):
            low, high = self._low[:, part].T.astype(np.int64), self._high[:, part].T.astype(np.int64)
            ends = [floats(place, out.dtype).astype(np.float64) for place in (low, high)]
            middle = places(((ends[0] + ends[1]) / 2).astype(np.float32))
            # Places 0 and -1 are +0 and -0: they differ for a row that contains -0.
            zero = np.where((low <= 0) & (high >= 0), 0, -1)
            out[part] = floats(np.where((low <= zero) & (high >= zero), zero, middle), out.dtype)
        return out


def places(values: Rows) -> IntArray:
    """The places of floats in their total order: 0 is +0, -1 is -0.

    Args:
        values: Floats of 16 or 32 bits, of any shape.

    Returns:
        int64, the same shape.
    """
    bits = values.view(f"i{values.dtype.itemsize}").astype(np.int64)
    ordered: IntArray = np.where(bits >= 0, bits, -1 - (bits & np.iinfo(f"i{values.dtype.itemsize}").max))
    return ordered


def floats(ordered: IntArray, dtype: np.dtype[Any]) -> Rows:
    """The floats at these places: the inverse of `places`.

    Args:
        ordered: Places, int64 of any shape.
        dtype: The dtype of the floats.

    Returns:
        The floats, the same shape.
    """
    sign = 1 << (8 * dtype.itemsize - 1)
    return np.where(ordered >= 0, ordered, (-1 - ordered) | sign).astype(f"u{dtype.itemsize}").view(dtype)


def delta_bounds(before: Rows, after: Rows) -> tuple[IntArray, IntArray]:
    """The places of the lowest and highest float32 delta that gives each element exactly its new bits.

    Args:
        before: The base's rows, [rows, in_features], in one of DTYPES.
        after: The tuned rows, the same shape and dtype.

    Returns:
        (lowest, highest), int64 [rows, in_features]. The lowest is above the highest where no delta gives the new bits, or
        where a value is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        wide = before.astype(np.float32)
        sums = _rounding_bounds(after)
        low, high = _least(wide, sums[0]), _least(wide, sums[1] + 1) - 1
        usable = np.isfinite(wide) & np.isfinite(after.astype(np.float32))
    return np.where(usable, low, 1), np.where(usable, high, 0)


def _rounding_bounds(after: Rows) -> tuple[IntArray, IntArray]:
    """The places of the lowest and highest float32 that round to these values."""
    if after.dtype == np.float32:
        return places(after), places(after)
    place = places(after)
    value, below, above = (floats(place + step, after.dtype).astype(np.float64) for step in (0, -1, 1))
    # Beyond the largest number, where the neighbour is infinite, rounding behaves as if there were one more number.
    below, above = np.where(np.isinf(below), 2 * value - above, below), np.where(np.isinf(above), 2 * value - below, above)
    low, high = (places(((value + other) / 2).astype(np.float32)) for other in (below, above))
    # Ties go to the even neighbour.
    odd = after.view(np.int16) & 1
    # Half-way between -0 and +0 is +0, which rounds to itself.
    return low + odd, np.where(place == -1, -1, high - odd)


def _least(wide: FloatArray, target: IntArray) -> IntArray:
    """The place of the lowest finite float32 that, added to `wide`, gives one at `target` or above; _TOP + 1 for none."""
    ends = [floats(target - step, wide.dtype).astype(np.float64) for step in (0, 1)]
    guess = places(((ends[0] + ends[1]) / 2 - wide).astype(np.float32))
    # The guess is nearly always right to a place or two; where it is not, as next to infinity, all floats are searched.
    low, high = np.clip(guess - 2, -1 - _TOP, _TOP), np.clip(guess + 2, -1 - _TOP, _TOP)
    low = np.where(places(wide + floats(low, wide.dtype)) >= target, -2 - _TOP, low)
    high = np.where(places(wide + floats(high, wide.dtype)) >= target, high, _TOP + 1)
    while (unsure := high - low > 1).any():
        middle = low[unsure] + (high[unsure] - low[unsure]) // 2
        enough = places(wide[unsure] + floats(middle, wide.dtype)) >= target[unsure]
        low[unsure], high[unsure] = np.where(enough, low[unsure], middle), np.where(enough, middle, high[unsure])
    return high
