"""What an accelerator does otherwise than a CPU. CI has none: these tests are skipped there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from nestpatch.nest_train._trunk import _Store
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.runtimes.text import IGNORED, TokenPair, collate
from nestpatch.runtimes.transformers import TransformersRuntime
from tests.nest_train.quick import QUICK

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = [f"How do I paint fence {number}?" for number in range(40)]


def trained_on(device: str, base: Path, data: TrainingData) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps one device for the life of a process
    recipe = Recipe(**{**QUICK.as_json(), "device": device, "dtype": "float32"})
    return train(base, data, Label("test"), recipe=recipe).pack


def test_a_training_gives_a_pack_like_that_of_the_cpu(models: Any, data: TrainingData) -> None:
    """Sums are rounded otherwise: a neuron at the threshold may be on its other side, and k-means may end elsewhere."""
    there, here = (trained_on(device, models("llama"), data) for device in ("cuda", "cpu"))
    assert [delta.name for delta in there] == [delta.name for delta in here]
    for one, other in zip(there, here, strict=True):
        assert len(np.intersect1d(one.rows, other.rows)) >= 0.7 * len(np.union1d(one.rows, other.rows))
        assert np.isfinite(one.delta).all()


def test_answers_are_those_of_the_cpu(models: Any) -> None:
    runtimes = [TransformersRuntime.load(models("llama"), device=d, dtype="float32") for d in ("cuda", "cpu")]
    assert runtimes[0].together > runtimes[1].together
    assert runtimes[0].generate(PROMPTS) == runtimes[1].generate(PROMPTS)


def test_the_width_of_a_batch_is_aligned() -> None:
    ids, mask, labels = collate([TokenPair((5, 6, 7), (8, 9)), TokenPair((5,), (8,))], 0, "cuda")
    assert ids.shape == mask.shape == labels.shape == (2, 8)
    assert mask.sum(1).tolist() == [5, 2]
    assert (labels != IGNORED).sum(1).tolist() == [2, 1]


def test_states_are_stored_where_there_is_room(tmp_path: Path) -> None:
    pair, rows = TokenPair((1,), (2,)), torch.ones(2, 16, device="cuda")
    store = _Store(tmp_path / "states", 2, rows)
    store.put(pair, rows)
    assert store.get(pair).device.type == "cuda"
    assert not (tmp_path / "states").exists()
    huge = torch.cuda.mem_get_info()[1] // (16 * 4)
    assert _Store(tmp_path / "more", huge, rows)._rows.device.type == "cpu"  # a file with holes
