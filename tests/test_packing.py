"""The one place that builds packs, against the packs that the tests make without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nestpatch import packing
from nestpatch.errors import CheckpointFormatError, PackContentError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.pack import Label
from nestpatch.packing import build_pack, pack_tensor
from nestpatch.rows import DTYPES, merge
from tests.helpers import FLOATS, load_tensors, tiny_checkpoint, tiny_pack, write_checkpoint


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_pack_is_the_one_that_was_made_by_hand(
    tmp_path: Path, dtype: str, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795435200")
    model = tiny_checkpoint(tmp_path / "model", dtype=dtype, sharded=sharded)
    want, checkpoint = tiny_pack(model, neurons=20, clusters=3), open_checkpoint(model)
    tensors = [
        pack_tensor(checkpoint, d.name, d.rows.astype(np.int64), d.delta, cluster=d.cluster) for d in reversed(want.deltas)
    ]
    facts = want.manifest
    label = Label(facts.name, facts.version, facts.description, facts.license, facts.tags)
    base = {"model_id": facts.base.model_id, "revision": facts.base.revision, "architecture": facts.base.architecture}
    built = build_pack(tensors, label, **base, method=facts.method)
    assert built.manifest.result == facts.result
    assert built.manifest.base.tensors == facts.base.tensors
    if dtype == "BF16":  # what the hand-made pack states, whatever the model
        assert built.manifest.created == facts.created
        assert nest.encode(built) == nest.encode(want)


def test_small_blocks_give_the_same_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (delta, *_), checkpoint = tiny_pack(model).deltas, open_checkpoint(model)
    arguments = checkpoint, delta.name, delta.rows.astype(np.int64), delta.delta
    whole = pack_tensor(*arguments, cluster=delta.cluster)
    monkeypatch.setattr(packing, "row_blocks", lambda rows, _: (slice(n, n + 1) for n in range(rows)))
    parts = pack_tensor(*arguments, cluster=delta.cluster)
    assert (parts.identity, parts.result) == (whole.identity, whole.result)
    assert np.array_equal(parts.delta.sketch, whole.delta.sketch)


@pytest.mark.parametrize(("clusters", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_the_smallest_index_types_that_fit(tmp_path: Path, clusters: int, kind: type) -> None:
    weights = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "model", {"w": weights}))
    rows, delta = np.arange(300), np.ones((clusters, 8), DTYPES["BF16"])
    packed = pack_tensor(checkpoint, "w", rows, delta, cluster=rows % clusters)
    assert (packed.delta.cluster.dtype, packed.delta.rows.dtype) == (kind, np.int32)


def test_what_cannot_be_packed_is_named(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", dtype="F16")
    checkpoint, name = open_checkpoint(model), "model.layers.0.mlp.gate_proj.weight"
    rows, one = np.array([3]), np.ones((1, 16), np.float32)
    assert merge(load_tensors(model)[name][rows], one).dtype == np.float16
    with pytest.raises(CheckpointFormatError, match=r"no\.such"):
        pack_tensor(checkpoint, "no.such", rows, one, cluster=np.array([0]))
    with pytest.raises(PackContentError, match="leave the range of F16"):
        pack_tensor(checkpoint, name, rows, 1e6 * one, cluster=np.array([0]))
    packed = pack_tensor(checkpoint, name, rows, one, cluster=np.array([0]))
    with pytest.raises(PackContentError, match="not a pack name"):
        build_pack([packed], Label("a/b"), model_id="x")
    with pytest.raises(PackContentError, match="unique"):
        build_pack([packed, packed], Label("x"), model_id="x")
    with pytest.raises(PackContentError, match="changes nothing"):
        build_pack([], Label("x"), model_id="x")
