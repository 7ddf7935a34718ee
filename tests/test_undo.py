"""Undo records give back every bit."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestpatch.errors import UndoError
from nestpatch.patcher._undo import MAGIC, TensorPacker, UndoBlock, UndoReader, checksums, residual, restored
from nestpatch.rows import DTYPES, merge


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 2**32 - 1),
    st.floats(0.01, 1.5),
    st.sampled_from([1e-6, 0.01, 0.3, 30.0]),
)
def test_any_rows_come_back_bit_for_bit(dtype, seed, strength, scale):
    rng = np.random.default_rng(seed)
    original = (rng.normal(size=(5, 33)) * 0.02).astype(DTYPES[dtype])
    original[0, :4] = [0.0, -0.0, 1e-7, -1e-7]
    delta = (rng.normal(size=(5, 33)) * scale).astype(np.float32)
    merged = merge(original, delta, strength)
    lacking = residual(original, merged, delta, strength)
    assert restored(merged, lacking, delta, strength).tobytes() == original.tobytes()


def test_subtracting_alone_does_not_do_it():
    """The reason for the record: if this fails, a simpler design would do."""
    rng = np.random.default_rng(0)
    original = (rng.normal(size=(64, 256)) * 0.02).astype(ml_dtypes.bfloat16)
    delta = (rng.normal(size=(64, 256)) * 0.005).astype(np.float32)
    lacking = residual(original, merge(original, delta), delta, 1.0)
    assert 0.005 < np.count_nonzero(lacking) / lacking.size < 0.4


def records(folder, tensors, block=3):
    """Writes a record of random tensors {name: rows}; returns what went in."""
    rng = np.random.default_rng(0)
    content = {}
    with open(folder / "x.undo", "wb") as file:
        file.write(MAGIC)
        for name, rows in tensors.items():
            lacking = rng.integers(0, 3, size=(rows, 10)).astype(np.uint16)
            before, after = (rng.integers(0, 2**63, size=rows).astype(np.uint64) for _ in range(2))
            parts = [slice(i, min(i + block, rows)) for i in range(0, rows, block)]
            packer = TensorPacker()
            for p in parts:
                packer.add(UndoBlock(lacking[p], before[p], after[p]))
            packer.write(file)
            content[name] = (lacking, before, after)
    return content


@pytest.mark.parametrize("cut", [[200], [20, 60, 120], [1, 199]])
def test_a_record_reads_back_in_any_blocks(tmp_path, cut):
    content = records(tmp_path, {"a": 4, "b": 10, "c": 1})
    reader = UndoReader(tmp_path / "x.undo", ["a", "b", "c"])
    assert b"".join(reader.residuals("b", iter(cut))) == content["b"][0].tobytes()
    for name, (_, before, after) in content.items():
        assert np.array_equal(reader.checksums(name, len(before))[0], before)
        assert np.array_equal(reader.checksums(name, len(before))[1], after)


def test_broken_records_are_named(tmp_path):
    records(tmp_path, {"a": 4, "b": 10})
    path = tmp_path / "x.undo"
    whole = path.read_bytes()
    for damaged, tensors in [
        (whole[:-1], ["a", "b"]),
        (whole + b"x", ["a", "b"]),
        (whole, ["a"]),
        (whole[:30], ["a", "b"]),
        (b"something else" + whole, ["a", "b"]),
        (b"", ["a", "b"]),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UndoError):
            UndoReader(path, tensors)
    with pytest.raises(UndoError, match="cannot be read"):
        UndoReader(tmp_path / "none.undo", ["a"])
    path.write_bytes(whole)
    with pytest.raises(UndoError, match="damaged"):
        list(UndoReader(path, ["a", "b"]).residuals("a", iter([1000])))
    start, length = UndoReader(path, ["a", "b"]).parts["a"].residual
    path.write_bytes(whole[:start] + bytes(length) + whole[start + length :])
    with pytest.raises(UndoError, match="damaged"):
        list(UndoReader(path, ["a", "b"]).residuals("a", iter([80])))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_a_checksum_changes_with_any_bit(seed, width):
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, size=(4, width)).astype(np.uint8)
    sums = checksums(rows)
    changed = rows.copy()
    changed[2, int(rng.integers(width))] ^= np.uint8(1 << int(rng.integers(8)))
    assert (checksums(changed) != sums).tolist() == [False, False, True, False]


def test_a_checksum_sees_the_order_of_words():
    rows = np.arange(16, dtype=np.uint8).reshape(1, 16)
    rotations = [checksums(np.roll(rows, shift, axis=1)).item() for shift in (0, 4, 8, 12)]
    assert all(a != b for a, b in pairwise(rotations))
