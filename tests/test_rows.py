"""The arithmetic of rows against exact rational numbers, golden values and hashlib."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch import rows as library
from nestpatch.errors import PackContentError
from tests.helpers import DTYPES, FLOATS, PROPERTY


@dataclass(frozen=True)
class Float:
    """A binary floating-point format: fraction bits and bias, read and written bit by bit."""

    bits: int
    fraction: int
    bias: int

    def read(self, pattern: int) -> tuple[int, Fraction] | None:
        """(sign 0 or 1, magnitude), or None for infinity and NaN."""
        exponent = (pattern >> self.fraction) & ((1 << (self.bits - 1 - self.fraction)) - 1)
        mantissa = pattern & ((1 << self.fraction) - 1)
        if exponent == 2 * self.bias + 1:
            return None
        if exponent:
            mantissa += 1 << self.fraction
        return pattern >> (self.bits - 1), mantissa * Fraction(2) ** (max(exponent, 1) - self.bias - self.fraction)

    def write(self, sign: int, magnitude: Fraction) -> int | None:
        """The pattern of the nearest number, ties to the even one; None when it would be infinite."""
        exponent = 1
        while magnitude >= Fraction(2) ** (exponent + 1 - self.bias):
            exponent += 1
        # round() of a Fraction goes to the even neighbour on ties. A carry runs into the exponent by itself.
        steps = round(magnitude / Fraction(2) ** (exponent - self.bias - self.fraction))
        pattern = steps if steps < 1 << self.fraction else ((exponent - 1) << self.fraction) + steps
        return None if pattern >> self.fraction > 2 * self.bias else (sign << (self.bits - 1)) + pattern


FORMATS = {"F32": Float(32, 23, 127), "BF16": Float(16, 7, 127), "F16": Float(16, 10, 15)}
F32 = FORMATS["F32"]


def slow_merge(row: tuple[int, Fraction], delta: tuple[int, Fraction], strength: Fraction, dtype: str) -> int | None:
    """The merge rule on one element, by exact rational numbers and one rounding after each float32 operation."""
    product = F32.write(delta[0], strength * delta[1])
    assert product is not None
    sign, magnitude = F32.read(product) or (0, Fraction(0))
    total = (-row[1] if row[0] else row[1]) + (-magnitude if sign else magnitude)
    total_sign = int(total < 0) if total else row[0] & sign
    wide = F32.write(total_sign, abs(total))
    value = None if wide is None else F32.read(wide)
    return None if value is None else FORMATS[dtype].write(*value)


def from_bits(patterns: list[int], dtype: str) -> np.ndarray:
    return np.array([patterns], dtype=f"u{DTYPES[dtype].itemsize}").view(DTYPES[dtype])


def to_bits(values: np.ndarray) -> list[int]:
    return [int(pattern) for pattern in values.view(f"u{values.dtype.itemsize}").ravel()]


def finite(dtype: str) -> st.SearchStrategy[int]:
    """Patterns of finite numbers, with all exponents equally likely: subnormals and the largest are not rare."""
    number = FORMATS[dtype]
    exponents = st.integers(0, 2 * number.bias)
    parts = st.tuples(st.integers(0, 1), exponents, st.integers(0, (1 << number.fraction) - 1))
    return parts.map(lambda p: (p[0] << (number.bits - 1)) + (p[1] << number.fraction) + p[2])


PAIRS = [(rows, delta) for rows in FLOATS for delta in FLOATS]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_reference_reads_as_python_does(dtype: str) -> None:
    """The slow reference is checked itself, against struct where struct knows the format."""
    for pattern in (0, 1, 0x7F, 0x80, 0x3F80, 0x8001, 0x4049):
        if dtype == "F16":
            value = struct.unpack("<e", struct.pack("<H", pattern))[0]
        else:
            wide = pattern if dtype == "F32" else pattern << 16
            value = struct.unpack("<f", struct.pack("<I", wide))[0]
        sign, magnitude = FORMATS[dtype].read(pattern)
        assert (-magnitude if sign else magnitude) == Fraction(value)
        assert FORMATS[dtype].write(sign, magnitude) == pattern


@pytest.mark.parametrize(("dtype", "delta_dtype"), PAIRS)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_merge_equals_the_exact_reference(dtype: str, delta_dtype: str, strength: float) -> None:
    used = Fraction(float(np.float32(strength)))

    # Elements that overflow are tried one by one: they would hide the others.
    @PROPERTY
    @given(st.lists(st.tuples(finite(dtype), finite(delta_dtype)), min_size=1, max_size=24))
    def check(pairs: list[tuple[int, int]]) -> None:
        expected = [slow_merge(FORMATS[dtype].read(a), FORMATS[delta_dtype].read(b), used, dtype) for a, b in pairs]
        kept = [(a, b, want) for (a, b), want in zip(pairs, expected, strict=True) if want is not None]
        if kept:
            rows, deltas = from_bits([a for a, _, _ in kept], dtype), from_bits([b for _, b, _ in kept], delta_dtype)
            merged = library.merge(rows, deltas, strength)
            assert merged.dtype == DTYPES[dtype]
            assert to_bits(merged) == [want for _, _, want in kept]
        for (a, b), want in zip(pairs, expected, strict=True):
            if want is None:
                with pytest.raises(PackContentError):
                    library.merge(from_bits([a], dtype), from_bits([b], delta_dtype), strength)

    check()


@pytest.mark.parametrize(
    ("dtype", "row", "delta", "want"),
    [
        # bf16 steps near 1 are 2**-7: half a step is a tie.
        ("BF16", 1.0, 2**-8, 1.0),
        ("BF16", 1.0 + 2**-7, 2**-8, 1.0 + 2**-6),
        ("BF16", 1.0, 2**-8 + 2**-20, 1.0 + 2**-7),
        ("BF16", -1.0, -(2**-8), -1.0),
        ("BF16", 2**-133, 2**-134, 2**-132),  # subnormal, tie to even
        ("BF16", 2**-133, -(2**-133), 0.0),
        ("F16", 1.0, 2**-11, 1.0),
        ("F16", 1.0 + 2**-10, 2**-11, 1.0 + 2**-9),
        ("F16", 2**-24, 2**-25, 2**-23),  # subnormal, tie to even
        ("F16", 2**-24, -(2**-25), 0.0),
        ("F16", 65504.0, 15.996, 65504.0),  # below half a step beyond the largest
        ("F32", 1.0, 2**-24, 1.0),
        ("F32", 1.0 + 2**-23, 2**-24, 1.0 + 2**-22),
        ("F32", 2**-149, 2**-149, 2**-148),
    ],
)
def test_ties_go_to_even(dtype: str, row: float, delta: float, want: float) -> None:
    merged = library.merge(np.array([[row]], DTYPES[dtype]), np.array([[delta]], np.float32))
    assert float(merged[0, 0]) == want


@pytest.mark.parametrize(
    ("dtype", "row", "delta"), [("F16", 65504.0, 16.0), ("BF16", 3.3895314e38, 1e36), ("F32", 3.4e38, 3.4e38)]
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_is_an_error(dtype: str, row: float, delta: float, sign: int) -> None:
    rows = np.array([[0, sign * row]], DTYPES[dtype])
    with pytest.raises(PackContentError, match=f"the merged weights leave the range of {dtype}"):
        library.merge(rows, np.array([[0, sign * delta]], np.float32))


def test_merge_leaves_its_inputs_alone() -> None:
    rows, delta = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert library.merge(rows, delta).tolist() == [[2, 2, 2], [2, 2, 2]]
    assert rows.tolist() == delta.tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cuts", [[], [1], [3, 4], [0, 7]])
def test_digest_is_the_sha256_of_the_bytes_however_they_are_cut(dtype: str, cuts: list[int]) -> None:
    rows = np.arange(7 * 5).reshape(7, 5).astype(DTYPES[dtype])
    assert library.digest(np.split(rows, cuts)) == sha256(rows.tobytes()).hexdigest()


def test_digest_of_rows_that_are_not_contiguous() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert library.digest([rows.T]) == sha256(rows.T.tobytes()).hexdigest()
    assert library.digest([rows[::2]]) == sha256(rows[::2].tobytes()).hexdigest()


def test_golden_signs() -> None:
    """Bits of SHAKE-256("nest/1 sketch 8") = cb 5e .., least significant first."""
    signs = library.sketch_signs(8)
    assert signs.shape == (4, 8)
    assert signs.ravel()[:16].tolist() == [-1, -1, 1, -1, 1, 1, -1, -1, 1, -1, -1, -1, -1, 1, -1, 1]
    assert signs[3].tolist() == [-1, -1, 1, 1, -1, -1, 1, 1]


@pytest.mark.parametrize("in_features", [1, 7, 16, 4097])
def test_signs_have_a_row_for_each_projection(in_features: int) -> None:
    signs = library.sketch_signs(in_features)
    assert signs.shape == (4, in_features)
    assert set(np.unique(signs).tolist()) <= {-1, 1}


@pytest.mark.parametrize("dtype", FLOATS)
def test_golden_sketch(dtype: str) -> None:
    row = np.array([[1, -2, 3, 0.5, -0.25, 4, -1.5, 2]], DTYPES[dtype])
    for scale in (1, 4, 0.25):
        assert to_bits(library.sketch(row * DTYPES[dtype].type(scale))) == [0x3C77, 0x3CCC, 0xBAF2, 0x329D]


def test_sketch_of_a_zero_row_is_zero() -> None:
    rows = np.array([[0, 0, 0], [0, 2, 0]], np.float32)
    found = library.sketch(rows)
    assert found.dtype == np.float16
    assert found[0].tolist() == [0, 0, 0, 0]
    assert np.abs(found[1]).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_sketch_of_a_damaged_row_does_not_warn(value: float) -> None:
    """Weights with infinities exist; saying that they are not the base must not stumble over them."""
    rows = np.array([[1, value, 2]], np.float32)
    assert library.sketch(rows).shape == (1, 4)


def quantized(rows: np.ndarray, bits: int) -> np.ndarray:
    """Rounds blocks of 32 weights to a few bits and back, as GGUF quantization does."""
    block = rows.reshape(-1, 32)
    scale = np.abs(block).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    return (np.round(block / scale) * scale).reshape(rows.shape).astype(np.float32)


def test_sketches_survive_quantization_and_tell_models_apart() -> None:
    random = np.random.default_rng(5)
    base, other = random.standard_normal((2, 64, 128)).astype(np.float32)
    ours = library.sketch(base)
    assert library.sketch_correlation(ours, ours) == pytest.approx(1, abs=1e-12)
    assert library.sketch_correlation(ours, library.sketch(quantized(base, 4))) > 0.98
    assert library.sketch_correlation(ours, library.sketch(quantized(base, 8))) > 0.9999
    assert abs(library.sketch_correlation(ours, library.sketch(other))) < 0.25
    assert abs(library.sketch_correlation(ours, library.sketch(base[::-1]))) < 0.25
    assert library.sketch_correlation(ours, library.sketch(-base)) == pytest.approx(-1, abs=1e-12)


def test_correlation_with_nothing() -> None:
    zeros, ones = np.zeros((2, 4), np.float16), np.ones((2, 4), np.float16)
    assert library.sketch_correlation(zeros, zeros) == 1
    assert library.sketch_correlation(zeros, ones) == 0


@pytest.mark.parametrize("name", FLOATS)
def test_dtype_names(name: str) -> None:
    assert library.dtype_name(DTYPES[name]) == name
    assert library.DTYPES[name] == DTYPES[name]


def test_rows_beyond_two_gibibytes(tmp_path):
    """Row numbers of 32 bits, places of more: as in any model of some size."""
    from nestpatch.formats._rowio import read_rows_at, write_rows_at
    from nestpatch.formats.checkpoint import TensorInfo

    path, start, width = tmp_path / "sparse", (1 << 31) + 64, 4096
    with open(path, "wb") as file:
        file.truncate(start + width * 600_000)
    info = TensorInfo("a", "F32", (600_000, width // 4), path, start, width * 600_000)
    rows = np.array([0, 7, 8, 599_999], np.int32)
    values = np.arange(4 * width // 4, dtype=np.float32).reshape(4, -1)
    write_rows_at(info, rows, values)
    assert np.array_equal(read_rows_at(info, rows, np.dtype(np.float32)), values)
    with open(path, "rb") as file:
        file.seek(start + 599_999 * width)
        assert file.read() == values[3].tobytes()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no hints")
@pytest.mark.parametrize("refused", [False, True])
def test_the_disk_is_told_which_rows_come(tmp_path, monkeypatch, refused):
    """Runs of rows that are not in memory, before the first is read; a file system that takes no hints is no error."""
    from nestpatch.formats import _rowio
    from nestpatch.formats._rowio import read_rows_at
    from nestpatch.formats.checkpoint import TensorInfo

    monkeypatch.setattr(_rowio, "_CACHED_ONLY", 0)  # as on a system that cannot tell what is in memory

    values, told = np.arange(40, dtype=np.float32).reshape(10, 4), []
    (tmp_path / "a").write_bytes(bytes(64) + values.tobytes())

    def advise(_: int, offset: int, length: int, advice: int) -> None:
        told.append((offset, length, advice))
        if refused:
            raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    info = TensorInfo("a", "F32", (10, 4), tmp_path / "a", 64, values.nbytes)
    rows = np.array([1, 2, 7])
    assert np.array_equal(read_rows_at(info, rows, np.dtype(np.float32)), values[rows])
    spans = [(64 + 16, 32, os.POSIX_FADV_WILLNEED), (64 + 7 * 16, 16, os.POSIX_FADV_WILLNEED)]
    assert told == spans[: 1 if refused else 2]


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="nothing can be evicted from memory")
def test_rows_are_the_same_from_memory_and_from_the_disk(tmp_path):
    """Of three runs the second is evicted from memory, in pages of its own."""
    from nestpatch.formats._rowio import read_rows_at
    from nestpatch.formats.checkpoint import TensorInfo

    values = np.arange(300 * 4096, dtype=np.float32).reshape(300, 4096)
    (tmp_path / "a").write_bytes(bytes(64) + values.tobytes())
    info = TensorInfo("a", "F32", values.shape, tmp_path / "a", 64, values.nbytes)
    rows = np.array([0, 1, 150, 151, 299])
    for offset, length in ((64 + 140 * info.row_bytes, 20 * info.row_bytes), (0, 0)):
        with open(tmp_path / "a", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)
        assert np.array_equal(read_rows_at(info, rows, np.dtype(np.float32)), values[rows])


def slow_sum(factors: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """The low-rank rule on one element, by exact rational numbers and one rounding after each float64 addition."""
    wide = Float(64, 52, 1023)

    def added(total: float, term: Fraction) -> float:
        exact = Fraction(total) + term
        pattern = wide.write(int(exact < 0), abs(exact))
        return struct.unpack("<d", struct.pack("<Q", pattern))[0]

    total = 0.0
    for factor, vector in zip(factors.tolist(), basis.tolist(), strict=True):
        total = added(total, Fraction(factor) * Fraction(vector))
    return F32.write(int(total < 0), abs(Fraction(total)))


@PROPERTY
@given(st.data())
def test_low_rank_changes_are_sums_in_order(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 6))
    number = st.floats(-(2.0**20), 2.0**20, width=32, allow_subnormal=False)
    columns = [np.array(data.draw(st.lists(number, min_size=rank, max_size=rank)), np.float32) for _ in range(2)]
    got = library.low_rank(columns[0][None], columns[1][:, None])
    assert (got.dtype, got.shape) == (np.float32, (1, 1))
    want = slow_sum(*columns)
    assert int(got.view(np.uint32)[0, 0]) & 0x7FFFFFFF == want & 0x7FFFFFFF
    assert float(got[0, 0]) == 0 or int(got.view(np.uint32)[0, 0]) == want


def test_the_order_of_a_low_rank_sum_matters() -> None:
    """1 is lost beside 2^60, and is not where the large terms cancel first."""
    large = 2.0**60
    factors, basis = np.array([[1, 1, -1]], np.float32), np.array([[large], [1], [large]], np.float32)
    assert library.low_rank(factors, basis).tolist() == [[0]]
    assert library.low_rank(factors[:, [0, 2, 1]], basis[[0, 2, 1]]).tolist() == [[1]]


def test_a_low_rank_sum_begins_at_plus_zero() -> None:
    zero = library.low_rank(np.array([[-1.0]], np.float32), np.zeros((1, 2), np.float32))
    assert zero.view(np.uint32).tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_blocks_of_a_low_rank_sum_make_no_difference(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    factors, basis = (random.standard_normal(shape).astype(DTYPES[dtype]) for shape in ((37, 5), (5, 24)))
    whole = library.low_rank(factors, basis)
    wanted = factors.astype(np.float64) @ basis.astype(np.float64)
    assert np.abs(whole - wanted).max() < 1e-6 * np.abs(wanted).max()
    monkeypatch.setattr(library, "_SUM_BYTES", 8 * 24 * 4)
    assert library.low_rank(factors, basis).tobytes() == whole.tobytes()
    assert library.low_rank(factors[5:9], basis).tobytes() == whole[5:9].tobytes()


@PROPERTY
@given(st.lists(st.lists(st.integers(0, 2**40), max_size=8), min_size=1, max_size=4))
def test_united_rows_are_those_of_any(parts: list[list[int]]) -> None:
    found = library.united([np.array(part, np.int32 if max(part, default=0) < 2**31 else np.int64) for part in parts])
    assert found.dtype == np.int64
    assert found.tolist() == sorted({row for part in parts for row in part})
