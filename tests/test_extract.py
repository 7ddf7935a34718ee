"""Extraction: the difference of two checkpoints as a pack that makes exactly that difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.compare import extract as extraction
from nestpatch.compare.extract import Extracted, Groups, delta_bounds, extract_to, floats, places
from nestpatch.errors import DataError, ExtractionError, OutputError
from nestpatch.formats import nest
from nestpatch.pack import Label, Pack
from nestpatch.patcher.apply import apply
from nestpatch.rows import merge
from tests.helpers import DTYPES, FLOATS, PROPERTY, load_tensors, tiny_checkpoint, tiny_pack, write_checkpoint
from tests.pairs import F32, GATE, NORM, UP, compared, models, small_blocks, tensors_of

# --- extraction: the arithmetic


def same_bits(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    bits = f"u{want.dtype.itemsize}"
    return np.asarray(got.view(bits) == want.view(bits))


@pytest.mark.parametrize("dtype", FLOATS)
@PROPERTY
@given(data=st.data())
def test_bounds_are_the_last_deltas_that_give_the_value(dtype: str, data: st.DataObject) -> None:
    kind = DTYPES[dtype]
    patterns = st.integers(0, (1 << (8 * kind.itemsize)) - 1)
    raw = data.draw(st.lists(st.tuples(patterns, patterns), min_size=1, max_size=40))
    before, after = (np.array(column, f"u{kind.itemsize}").view(kind)[None] for column in zip(*raw, strict=True))
    low, high = delta_bounds(before, after)
    some = low <= high
    finite = np.isfinite(before.astype(F32)) & np.isfinite(after.astype(F32))
    assert not (some & ~finite).any()

    def gives(place: np.ndarray) -> np.ndarray:
        delta = floats(place, F32)
        with np.errstate(over="ignore", invalid="ignore"):
            return same_bits((before.astype(F32) + delta).astype(kind), after) & np.isfinite(delta)

    assert gives(low)[some].all()
    assert gives(high)[some].all()
    assert not gives(low - 1)[some].any()
    assert not gives(high + 1)[some].any()
    with np.errstate(over="ignore", invalid="ignore"):
        plain = places(after.astype(F32) - before.astype(F32))
    for step in (-1, 0, 1):
        assert not (gives(plain + step) & finite & ~some).any()


@pytest.mark.parametrize(
    ("dtype", "before", "after", "possible"),
    [
        ("F32", 1.0, 1e-10, False),  # every float32 sum of 1 and something is a multiple of 2**-24 there
        ("BF16", 1.0, 1e-10, False),
        ("F32", 1.0, 0.0, True),
        ("F32", 1.0, -0.0, False),  # x - x is +0
        ("F32", -0.0, 0.0, True),
        ("F32", 0.0, -0.0, False),
        ("BF16", 0.0, -0.0, True),  # by a delta below the smallest number
        ("F16", 0.0, -0.0, True),
        ("F16", 65504.0, -65504.0, True),
        ("F32", 1.0, 1.0, True),
        ("F32", 1.0, float("inf"), False),
        ("BF16", float("nan"), 1.0, False),
    ],
)
def test_what_a_delta_can_do(dtype: str, before: float, after: float, possible: bool) -> None:
    low, high = delta_bounds(np.array([[before]], DTYPES[dtype]), np.array([[after]], DTYPES[dtype]))
    assert bool(low[0, 0] <= high[0, 0]) is possible


def test_places_order_all_floats() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    order = places(every)
    assert same_bits(floats(order, every.dtype), every).all()
    finite = np.sort(order[np.isfinite(every)])
    values = floats(finite, every.dtype)
    assert (values[1:] >= values[:-1]).all()
    assert places(np.array([0.0, -0.0], F32)).tolist() == [0, -1]


def test_groups_are_first_fit_and_meet_in_every_element() -> None:
    groups = Groups(2)
    bounds = [([10, 10], [20, 20]), ([21, 10], [30, 20]), ([15, 15], [40, 40]), ([20, 20], [21, 21]), ([21, 30], [21, 30])]
    assert [groups.place(*(np.array(end, np.int32) for end in pair)) for pair in bounds] == [0, 1, 0, 0, 2]
    many = Groups(40)
    rows = [np.full(40, number * 10, np.int32) for number in range(100)]
    assert [many.place(row, row + 1) for row in rows] == list(range(100))
    assert [many.place(row + 1, row + 1) for row in rows] == list(range(100))


# --- extraction: packs


def extracted(tmp_path: Path, a: Path, b: Path, **facts: Any) -> tuple[Pack, Extracted]:
    done = extract_to(a, b, tmp_path / "x.nest", Label("x", **facts))
    pack = nest.read(tmp_path / "x.nest")
    assert nest.pack_id(pack) == done.pack_id
    return pack, done


def assert_makes(tmp_path: Path, a: Path, b: Path) -> None:
    """Applying x.nest to A gives the tensors of B, byte for byte."""
    apply(a, tmp_path / "x.nest", tmp_path / "again")
    assert compared(tmp_path / "again", b).identical
    want = load_tensors(b)
    assert {n: t.tobytes() for n, t in load_tensors(tmp_path / "again").items()} == {n: t.tobytes() for n, t in want.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("delta_dtype", ["BF16", "F32"])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_applied_pack_comes_back(tmp_path: Path, dtype: str, delta_dtype: str, sharded: bool) -> None:
    a = tiny_checkpoint(tmp_path / "a", dtype=dtype, sharded=sharded)
    pack = tiny_pack(a, clusters=3, delta_dtype=delta_dtype, neurons=20)
    nest.write(pack, tmp_path / "real.nest")
    apply(a, tmp_path / "real.nest", tmp_path / "b")
    back, done = extracted(tmp_path, a, tmp_path / "b")
    assert [delta.name for delta in back] == [delta.name for delta in pack]
    for ours, theirs in zip(back, pack, strict=True):
        assert ours.rows.tolist() == theirs.rows.tolist()
        assert ours.clusters == theirs.clusters
        # The same rows together, whatever the numbers of the clusters.
        assert len(set(zip(ours.cluster.tolist(), theirs.cluster.tolist(), strict=True))) == 3
        assert np.abs(ours.dense() - theirs.dense()).max() < 2e-3
    assert back.manifest.base.tensors == pack.manifest.base.tensors
    assert back.manifest.result == pack.manifest.result
    assert (done.rows, done.clusters) == (80, 12)
    assert_makes(tmp_path, a, tmp_path / "b")


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_of_their_own_and_every_kind_of_element(tmp_path: Path, dtype: str) -> None:
    after = tensors_of(dtype)
    random = np.random.default_rng(1)
    after[GATE][::5] = (random.standard_normal((5, 16)) * 3).astype(DTYPES[dtype])
    after["model.embed_tokens.weight"][31] = 0
    after[UP][7] *= -1
    a, b = models(tmp_path, after, dtype=dtype)
    if dtype == "F32":
        # Most float32 values are out of reach from others: take those that one addition gives.
        before = tensors_of(dtype)
        after[GATE] = before[GATE] + (after[GATE] - before[GATE])
        b = write_checkpoint(tmp_path / "b2", after)
    back, _ = extracted(tmp_path, a, b)
    assert {delta.name: delta.rows.tolist() for delta in back} == {
        "model.embed_tokens.weight": [31],
        UP: [7],
        GATE: [0, 5, 10, 15, 20],
    }
    assert_makes(tmp_path, a, b)


@pytest.mark.parametrize("dtype", FLOATS)
def test_unchanged_elements_have_a_delta_of_zero(tmp_path: Path, dtype: str) -> None:
    before, after = tensors_of(dtype), tensors_of(dtype)
    before[GATE][1, 0] = after[GATE][1, 0] = -0.0
    after[GATE][1, 3] += DTYPES[dtype].type(0.5)
    a, b = write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after)
    back, _ = extracted(tmp_path, a, b)
    (delta,) = back
    assert np.flatnonzero(delta.delta).tolist() == [3]
    assert delta.delta[0, 3] == pytest.approx(0.5, rel=0.01)
    assert_makes(tmp_path, a, b)


def test_stacked_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before = {name: np.random.default_rng(0).standard_normal((3, 8, 16)).astype(ml_dtypes.bfloat16)}
    after = {name: before[name].copy()}
    after[name][1, 2] += 1
    after[name][2, 7] += 1
    a, b = write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after)
    back, _ = extracted(tmp_path, a, b)
    assert (back.deltas[0].rows.tolist(), back.deltas[0].clusters) == ([10, 23], 1)
    assert_makes(tmp_path, a, b)


def test_more_than_256_clusters(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    before = {"w": random.standard_normal((300, 8)).astype(np.float16)}
    after = {"w": merge(before["w"], random.standard_normal((300, 8)).astype(np.float32))}
    a, b = write_checkpoint(tmp_path / "a", before), write_checkpoint(tmp_path / "b", after)
    back, done = extracted(tmp_path, a, b)
    assert done.clusters == 300
    assert back.deltas[0].cluster.dtype == np.uint16
    assert_makes(tmp_path, a, b)


def test_the_blocks_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tiny_checkpoint(tmp_path / "a")
    nest.write(tiny_pack(a), tmp_path / "real.nest")
    apply(a, tmp_path / "real.nest", tmp_path / "b")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    label = Label("x")
    whole = extract_to(a, tmp_path / "b", tmp_path / "whole.nest", label)
    small_blocks(monkeypatch, 100)
    parts = extract_to(a, tmp_path / "b", tmp_path / "parts.nest", label)
    assert whole.pack_id == parts.pack_id


def test_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = tensors_of()
    after[GATE][3:5] += 1
    a, b = models(tmp_path, after)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    pack, _ = extracted(tmp_path, a, b, version="2.1.0", description="says no", license="MIT")
    manifest = pack.manifest
    assert (manifest.name, manifest.version, manifest.description, manifest.license) == ("x", "2.1.0", "says no", "MIT")
    assert manifest.created == "2023-11-14T22:13:20Z"
    base = manifest.base
    assert (base.model_id, base.revision, base.architecture, base.dtype) == ("a", "", "LlamaForCausalLM", "BF16")
    facts = {key: manifest.method[key] for key in ("name", "tuned", "tensors", "rows", "clusters")}
    assert facts == {"name": "extracted", "tuned": "b", "tensors": 1, "rows": 2, "clusters": pack.deltas[0].clusters}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: None, "hold the same weights"),
        (lambda t: t.pop(GATE), rf"1 tensors are not alike: {GATE}: only in A \[24, 16\]"),
        (lambda t: t.update(extra=t[GATE]), r"extra: only in B \[24, 16\]"),
        (lambda t: t.update({GATE: t[GATE][:9]}), rf"{GATE}: shape \[24, 16\] and \[9, 16\]"),
        (lambda t: t.update({GATE: t[GATE].astype(np.float32)}), f"{GATE}: dtype BF16 and F32"),
        (lambda t: t.update({NORM: t[NORM] * 2}), r"model.norm.weight \(BF16 \[16\]\)"),
        (lambda t: t[GATE].__setitem__((5, 2), np.nan), f"{GATE}, row 5, element 2: no float32 delta takes .* to nan exactly"),
        (lambda t: t[GATE].__setitem__((5, 2), 1e-30), f"{GATE}, row 5, element 2: no float32 delta"),
    ],
)
def test_what_is_no_pack_is_refused_by_name(tmp_path: Path, change: Any, reason: str) -> None:
    after = tensors_of()
    change(after)
    a, b = models(tmp_path, after)
    with pytest.raises(ExtractionError, match=reason) as caught:
        extract_to(a, b, tmp_path / "x.nest", Label("x"))
    assert caught.value.advice
    assert not (tmp_path / "x.nest").exists()


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("MAX_CLUSTERS", 4, f"{GATE} needs more than 4 clusters"), ("MAX_BYTES", 100, "take more than 100 bytes")],
)
def test_a_pack_stays_small(tmp_path: Path, limit: str, value: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after = tensors_of()
    after[GATE][:5] += np.arange(1, 6)[:, None].astype(ml_dtypes.bfloat16)
    a, b = models(tmp_path, after)
    monkeypatch.setattr(extraction, limit, value)
    with pytest.raises(ExtractionError, match=reason):
        extract_to(a, b, tmp_path / "x.nest", Label("x"))


def test_tensor_names_that_no_pack_can_hold(tmp_path: Path) -> None:
    a = write_checkpoint(tmp_path / "a", {"a b": np.zeros((2, 2), np.float32)})
    b = write_checkpoint(tmp_path / "b", {"a b": np.ones((2, 2), np.float32)})
    with pytest.raises(ExtractionError, match="'a b' is no tensor name"):
        extract_to(a, b, tmp_path / "x.nest", Label("x"))


def test_the_label_and_the_place_are_checked_before_the_models(tmp_path: Path) -> None:
    nowhere = tmp_path / "a", tmp_path / "b"
    with pytest.raises(DataError, match="no pack name"):
        extract_to(*nowhere, tmp_path / "x.nest", Label("a/b"))
    with pytest.raises(DataError, match="not semver"):
        extract_to(*nowhere, tmp_path / "x.nest", Label("x", "1"))
    with pytest.raises(OutputError, match="or its directory does not"):
        extract_to(*nowhere, tmp_path / "no" / "x.nest", Label("x"))
    (tmp_path / "x.nest").touch()
    with pytest.raises(OutputError, match="exists already"):
        extract_to(*nowhere, tmp_path / "x.nest", Label("x"))
    with pytest.raises(DataError, match="is a pack"):
        extract_to(tmp_path / "x.nest", tmp_path / "b", tmp_path / "y.nest", Label("x"))


def test_a_broken_clock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(DataError, match="SOURCE_DATE_EPOCH"):
        extract_to(tmp_path / "a", tmp_path / "b", tmp_path / "x.nest", Label("x"))
