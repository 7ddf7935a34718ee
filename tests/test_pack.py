"""Every constructor of pack.py refuses what makes no sense, and says why."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.delta import MAX_RANK, TensorDelta
from nestpatch.errors import PackContentError
from nestpatch.pack import Pack, TensorIdentity, name_problem, version_problem
from tests.helpers import PROPERTY, tiny_checkpoint, tiny_pack

A, B = "a" * 64, "b" * 64
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return tiny_pack(tiny_checkpoint(tmp_path_factory.mktemp("models") / "base"))


def refuses(says: str) -> Any:
    """The error of a constructor that says exactly this, somewhere."""
    return pytest.raises(PackContentError, match=re.escape(says))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "I8"}, "a base tensor has dtype 'I8'; known are F32, BF16, F16"),
        ({"dtype": ""}, "a base tensor has dtype ''"),
        ({"shape": (24,)}, "impossible shape [24]"),
        ({"shape": ()}, "impossible shape []"),
        ({"shape": (2, 3, 4, 5)}, "impossible shape [2, 3, 4, 5]"),
        ({"shape": (0, 16)}, "impossible shape [0, 16]"),
        ({"shape": (24, -16)}, "impossible shape [24, -16]"),
        ({"sha256": "a" * 63}, "a tensor's sha256 is not a SHA-256"),
        ({"sha256": "A" * 64}, "a tensor's sha256 is not a SHA-256"),
        ({"sha256": "a" * 64 + "\n"}, "a tensor's sha256 is not a SHA-256"),
        ({"rows_sha256": "g" * 64}, "a tensor's rows_sha256 is not a SHA-256"),
        ({"rows_sha256": ""}, "a tensor's rows_sha256 is not a SHA-256"),
    ],
)
def test_identity_refuses(fields: dict[str, Any], says: str) -> None:
    with refuses(says):
        replace(TensorIdentity((24, 16), "BF16", A, B), **fields)


def test_identity_flattens_experts() -> None:
    assert TensorIdentity((24, 16), "BF16", A, B).matrix == (24, 16)
    assert TensorIdentity((3, 24, 16), "F32", A, B).matrix == (72, 16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "'' is not a pack name"),
        ({"name": "a/b"}, "'a/b' is not a pack name"),
        ({"name": "a\\b"}, "is not a pack name"),
        ({"name": ".hidden"}, "'.hidden' is not a pack name"),
        ({"name": "n" * 97}, "is not a pack name"),
        ({"version": "1.0"}, "version '1.0' is not semver (1.2.3)"),
        ({"version": "v1.0.0"}, "version 'v1.0.0' is not semver"),
        ({"created": "2026-11-23T12:00:00"}, "created is not a UTC time"),
        ({"created": "2026-11-23 12:00:00Z"}, "created is not a UTC time"),
        ({"created": "2026-13-01T12:00:00Z"}, "created is not a UTC time"),
        ({"created": "0000-01-01T12:00:00Z"}, "created is not a UTC time"),
        ({"created": "2026-11-23T12:00:60Z"}, "created is not a UTC time"),
        ({"supersedes": ("latest",)}, "an entry of supersedes or requires is not a SHA-256"),
        ({"requires": (A, "b" * 65)}, "an entry of supersedes or requires is not a SHA-256"),
        ({"result": {GATE: "0"}}, f"the result digest of {GATE} is not a SHA-256"),
    ],
)
def test_manifest_refuses(pack: Pack, fields: dict[str, Any], says: str) -> None:
    with refuses(says):
        replace(pack.manifest, **fields)


@pytest.mark.parametrize("name", ["a", "7", "no-weapons", "A.b_c-9", "n" * 96, "con"])
def test_good_names(name: str) -> None:
    assert name_problem(name) is None


@PROPERTY
@given(st.text(max_size=100))
def test_no_name_leaves_its_directory(name: str) -> None:
    if name_problem(name) is None:
        assert Path("/x", name).resolve() == Path("/x") / name
        assert not set(name) - set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


@pytest.mark.parametrize(
    "version",
    ["0.0.4", "1.2.3", "10.20.30", "1.1.2-prerelease+meta", "1.0.0-alpha.beta.1", "1.0.0-0A.is.legal", "2.0.0+build.1848",
     "1.2.3----RC-SNAPSHOT.12.9.1--.12", "99999999999999999999999.999999999999999999.99999999999999999"],
)  # fmt: skip
def test_good_versions(version: str) -> None:
    """From the list at semver.org."""
    assert version_problem(version) is None


@pytest.mark.parametrize(
    "version",
    ["", "1", "1.2", "1.2.3-0123", "1.2.3-0123.0123", "1.1.2+.123", "+invalid", "-invalid", "1.0.0-alpha_beta", "1.0.0-alpha..",
     "01.1.1", "1.01.1", "1.1.01", "1.2.3.DEV", "1.2-SNAPSHOT", "1.0.0-", "1.0.0+", "1.0.0\n", " 1.0.0",
     "\u0661.0.0", "1.0.0/.."],
)  # fmt: skip
def test_bad_versions(version: str) -> None:
    """From the list at semver.org, and what Python's regular expressions let through."""
    assert version_problem(version) == f"version {version!r} is not semver (1.2.3)"


def delta(**fields: Any) -> TensorDelta:
    """Three rows in two clusters, with other fields."""
    values = {
        "name": GATE,
        "delta": np.ones((2, 4), np.float32),
        "rows": np.array([0, 2, 7], np.int32),
        "cluster": np.array([0, 1, 0], np.uint8),
        "sketch": np.zeros((3, 4), np.float16),
    }
    return TensorDelta(**(values | fields))


def rows(*numbers: int, dtype: type = np.int32) -> dict[str, Any]:
    return {"rows": np.array(numbers, dtype)}


def poisoned(value: float, dtype: type = np.float32) -> np.ndarray:
    return np.array([[0, 0, 0, 0], [0, 0, 0, value]], dtype)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": ""}, "'' is not a tensor name"),
        ({"name": "../model"}, "'../model' is not a tensor name"),
        ({"name": "model..weight"}, "is not a tensor name"),
        ({"name": "model.weight."}, "is not a tensor name"),
        ({"name": "model:delta"}, "is not a tensor name"),
        ({"name": "n" * 257}, "is not a tensor name"),
        ({"delta": np.ones((2, 4))}, ":delta has dtype float64"),
        ({"delta": np.ones((2, 4), ">f4")}, ":delta has dtype >f4"),
        ({"delta": np.ones(4, np.float32)}, ":delta has shape [4]"),
        ({"delta": np.ones((0, 4), np.float32)}, ":delta has shape [0, 4]"),
        ({"delta": np.ones((2, 0), np.float32)}, ":delta has shape [2, 0]"),
        ({"delta": np.ones((1, 2, 4), np.float32)}, ":delta has shape [1, 2, 4]"),
        ({"delta": poisoned(np.nan)}, ":delta holds NaN or infinity"),
        ({"delta": poisoned(-np.inf, np.float16)}, ":delta holds NaN or infinity"),
        (rows(0, 2, 7, dtype=np.uint32), ":rows has dtype uint32"),
        (rows(0, 2, 7, dtype=np.float32), ":rows has dtype float32"),
        ({"rows": np.array([[0, 2, 7]], np.int32)}, ":rows has shape [1, 3]"),
        (rows(), ":rows has shape [0]"),
        (rows(-1, 2, 7), "row -1 is out of range"),
        (rows(2, 0, 7), "rows are unsorted or repeated"),
        (rows(0, 2, 2), "rows are unsorted or repeated"),
        (rows(0, 2, -(2**31)), "rows are unsorted or repeated"),
        (rows(0, 2, -(2**63), dtype=np.int64), "rows are unsorted or repeated"),
        ({"cluster": np.array([0, 1, 0], np.int32)}, ":cluster has dtype int32"),
        ({"cluster": np.array([0, 1], np.uint8)}, "rows and cluster differ in length"),
        ({"cluster": np.array([0, 1, 2], np.uint8)}, "cluster 2 has no delta; there are 2"),
        ({"cluster": np.array([0, 1, 65535], np.uint16)}, "cluster 65535 has no delta; there are 2"),
        ({"cluster": np.array([1, 1, 1], np.uint8)}, "1 of 2 deltas have no row"),
        ({"cluster": None}, "has neither clusters nor factors"),
        ({"factors": np.ones((3, 2), np.float32)}, "has both clusters and factors"),
        ({"sketch": np.zeros((3, 4), np.float32)}, ":sketch has dtype float32"),
        ({"sketch": np.zeros((3, 5), np.float16)}, ":sketch has shape [3, 5]"),
        ({"sketch": np.zeros((2, 4), np.float16)}, ":sketch has shape [2, 4]"),
        ({"sketch": np.full((3, 4), np.inf, np.float16)}, ":sketch holds NaN or infinity"),
    ],
)
def test_delta_refuses(fields: dict[str, Any], says: str) -> None:
    with refuses(says):
        delta(**fields)


def low_rank(*factors: list[float], dtype: type = np.float32, **fields: Any) -> TensorDelta:
    """The same rows with factors."""
    return delta(cluster=None, factors=np.array(factors, dtype), **fields)


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        (np.ones((3, 2)), ":factors has dtype float64"),
        (np.ones((3, 2), np.int32), ":factors has dtype int32"),
        (np.ones((3, 1), np.float32), ":factors has shape [3, 1]; rows and delta need [3, 2]"),
        (np.ones((2, 2), np.float32), ":factors has shape [2, 2]; rows and delta need [3, 2]"),
        (np.ones(6, np.float32), ":factors has shape [6]; rows and delta need [3, 2]"),
        (np.array([[1, 1], [1, np.nan], [1, 1]], np.float16), ":factors holds NaN or infinity"),
        (np.array([[1, 1], [1, -np.inf], [1, 1]], np.float32), ":factors holds NaN or infinity"),
        (np.array([[1, 0], [2, -0.0], [3, 0]], np.float32), "1 of 2 deltas have no row: their factors are zero"),
        (np.array([[1, 1], [0, -0.0], [3, 0]], np.float32), "row 2 does not change: its factors are zero"),
        (np.array([[1, 2e38], [2e38, 1], [3, 0]], np.float32), "may leave the range of float32"),
    ],
)
def test_factors_refuse(factors: np.ndarray, says: str) -> None:
    with refuses(says):
        delta(cluster=None, factors=factors)


def test_the_rank_has_a_limit() -> None:
    for rank, fits in ((MAX_RANK, True), (MAX_RANK + 1, False)):
        fields = {"delta": np.ones((rank, 4), np.float32), "cluster": None, "factors": np.ones((3, rank), np.float32)}
        if fits:
            assert delta(**fields).rank == 256
        else:
            with refuses("has rank 257; 256 is allowed"):
                delta(**fields)


def test_low_rank_delta_answers() -> None:
    made = low_rank([1, 2], [0, -1], [0.5, 0], delta=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float16))
    assert (made.rank, made.clusters, made.neurons) == (2, 0, 3)
    assert made.dense().dtype == np.float32
    assert made.dense().tolist() == [[11, 14, 17, 20], [-5, -6, -7, -8], [0.5, 1, 1.5, 2]]
    assert made.dense(1, 2).tolist() == [[-5, -6, -7, -8]]
    assert made.dense_at(np.array([2, 0])).tolist() == [[0.5, 1, 1.5, 2], [11, 14, 17, 20]]
    assert made.used(slice(1, 2)).tolist() == [1]
    assert made.used(slice(2, 3)).tolist() == [0]
    assert made.shares(slice(0, 2), np.array([1])).tolist() == [[2], [-1]]
    assert made.squared_norm() == pytest.approx(float(np.square(made.dense().astype(float)).sum()))


def test_delta_answers() -> None:
    made = delta(delta=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float16))
    assert (made.clusters, made.neurons) == (2, 3)
    assert made.dense().dtype == np.float32
    assert made.dense().tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 4]]
    assert made.dense(1, 2).tolist() == [[5, 6, 7, 8]]
    assert made.used(slice(1, 3)).tolist() == [0, 1]
    assert made.shares(slice(0, 2), np.array([1, 0])).tolist() == [[0, 1], [1, 0]]
    assert made.squared_norm() == 30 + 174 + 30


def without_first(mapping: Any) -> dict[str, Any]:
    return dict(list(mapping.items())[1:])


def with_identity(pack: Pack, **fields: Any) -> Pack:
    """The pack with another identity of its first tensor."""
    base = pack.manifest.base
    tensors = {**base.tensors, GATE: replace(base.tensors[GATE], **fields)}
    return replace(pack, manifest=replace(pack.manifest, base=replace(base, tensors=tensors)))


PACK_CHANGES: list[tuple[Callable[[Pack], Pack], str]] = [
    (lambda p: replace(p, deltas=()), "the pack changes nothing"),
    (lambda p: replace(p, deltas=p.deltas[::-1]), "must be unique and in the order of their names"),
    (lambda p: replace(p, deltas=(p.deltas[0], *p.deltas)), "must be unique and in the order of their names"),
    (lambda p: replace(p, deltas=p.deltas[1:]), f"base.tensors and the arrays disagree about {GATE}"),
    (
        lambda p: replace(p, manifest=replace(p.manifest, result=without_first(p.manifest.result))),
        f"result.tensors and the arrays disagree about {GATE}",
    ),
    (lambda p: with_identity(p, shape=(1, 16)), "is out of range; the matrix has 1"),
    (lambda p: with_identity(p, shape=(24, 17)), "deltas are 16 wide, the matrix 17"),
    (lambda p: with_identity(p, shape=(16, 24)), "is out of range; the matrix has 16"),
]


@pytest.mark.parametrize(("change", "says"), PACK_CHANGES)
def test_pack_refuses(pack: Pack, change: Callable[[Pack], Pack], says: str) -> None:
    with refuses(says):
        change(pack)


def test_the_last_row_of_a_matrix_is_in_range(pack: Pack) -> None:
    last = int(pack.deltas[0].rows[-1])
    assert with_identity(pack, shape=(last + 1, 16))
    with refuses(f"row {last} is out of range; the matrix has {last}"):
        with_identity(pack, shape=(last, 16))


def test_pack_answers(pack: Pack) -> None:
    assert pack.label == "no-harm 1.0.0"
    assert [d.name for d in pack] == sorted(pack.manifest.result)
    assert pack.parameters == 4 * 2 * 16
    assert pack.delta_dtypes == ("BF16",)


def test_values_are_frozen(pack: Pack) -> None:
    for value, field in ((pack, "manifest"), (pack.manifest, "name"), (pack.deltas[0], "rows"), (pack.manifest.base, "dtype")):
        with pytest.raises(FrozenInstanceError):
            setattr(value, field, None)
