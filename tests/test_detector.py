"""The detector of a pack: its value, its place in the file, and that nothing else of the pack depends on it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from nestpatch.detector import Detector, DetectorFacts
from nestpatch.errors import PackContentError
from nestpatch.formats import nest
from nestpatch.formats.manifest import manifest_json
from nestpatch.pack import Pack
from nestpatch.patcher.apply import apply
from tests.attacks.tools import DETECTOR
from tests.helpers import tiny_checkpoint, tiny_pack, tree_digest, write_checkpoint

WEIGHT = np.linspace(-1, 1, 16, dtype=np.float32)


def with_detector(pack: Pack, weight: np.ndarray = WEIGHT, **fields: Any) -> Pack:
    """The pack with a detector."""
    facts = DetectorFacts(**{**DETECTOR, **fields})
    return dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, detector=facts), detector_weight=weight)


def test_a_detector_survives_the_file(tmp_path: Path) -> None:
    plain = tiny_pack(tiny_checkpoint(tmp_path / "base"))
    pack = with_detector(plain)
    nest.write(pack, tmp_path / "x.nest")
    found = nest.read(tmp_path / "x.nest").detector
    assert found is not None
    assert found.facts == DetectorFacts(**DETECTOR)
    assert found.weight.tobytes() == WEIGHT.tobytes()
    with safe_open(tmp_path / "x.nest", "np") as file:
        assert file.get_tensor("detector:weight").tobytes() == WEIGHT.tobytes()
    assert (plain.format, pack.format) == ("nest/1", "nest/2")
    assert "detector" not in manifest_json(plain)


def test_a_matrix_may_be_named_detector(tmp_path: Path) -> None:
    """Its tensors are detector:delta and so on; the detector's is detector:weight."""
    values = np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32)
    base = write_checkpoint(tmp_path / "base", {"detector": values})
    both = with_detector(tiny_pack(base, tensors=["detector"]))
    read = nest.decode(nest.encode(both))
    assert [delta.name for delta in read] == ["detector"]
    assert read.detector is not None
    alone = nest.decode(nest.encode(tiny_pack(base, tensors=["detector"])))
    assert alone.detector is None


def test_applying_ignores_the_detector(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base")
    plain = tiny_pack(base)
    weights = []
    for name, pack in (("plain", plain), ("detecting", with_detector(plain))):
        nest.write(pack, tmp_path / f"{name}.nest")
        apply(base, tmp_path / f"{name}.nest", tmp_path / name)
        weights.append(tree_digest(tmp_path / name)["model.safetensors"])
    assert weights[0] == weights[1]


def test_scores_are_the_product_and_the_bias() -> None:
    facts = DetectorFacts(**{**DETECTOR, "bias": 0.5})
    found = Detector(facts, np.array([1, -2], np.float32)).scores(np.array([[3, 1], [0, 1]], np.float16))
    assert found.tolist() == [1.5, -1.5]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"bias": float("inf")}, "bias is not finite"),
        ({"threshold": float("nan")}, "threshold is not finite"),
        ({"auc": float("nan")}, "auc is nan"),
        ({"harmful": -1}, "harmful is out of range"),
    ],
)
def test_impossible_facts_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(PackContentError, match=reason):
        DetectorFacts(**{**DETECTOR, **fields})
