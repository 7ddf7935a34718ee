"""The setting `round_to`: deltas of a float base are trained for the rows of a quantized file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestpatch.errors import QuantizationError, RecipeError
from nestpatch.events import Event
from nestpatch.export.onnx._quantize import quantize_matrix
from nestpatch.formats.checkpoint import float_rows
from nestpatch.formats.gguf.quants import codec
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train import train as module
from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.inplace import apply_in_place
from nestpatch.runtimes.stored import StoredWeights
from tests.gguf_files import write_gguf
from tests.nest_train.quick import QUICK
from tests.nest_train.test_quantized_base import attachable, effective

ROUNDED = dataclasses.replace(QUICK, round_to="q4_0")


def int4(rows: np.ndarray) -> np.ndarray:
    """Rows as the export to ONNX quantizes them, by onnxruntime's own function."""
    pytest.importorskip("onnxruntime")
    packed, scales = quantize_matrix(np.ascontiguousarray(rows.T), 4)
    numbers = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, -1).astype(np.float32)
    return ((numbers - 8) * scales[..., None]).reshape(len(rows), -1)


def gguf_type(name: str) -> Any:
    return lambda rows: codec(name).decode(codec(name).encode(rows))


@pytest.mark.parametrize(("kind", "rounded"), [("q8_0", gguf_type("Q8_0")), ("q4_0", gguf_type("Q4_0")), ("int4", int4)])
def test_rows_of_a_float_base_are_rounded(models: Any, kind: str, rounded: Any) -> None:
    base = models("llama")
    model, deltas = attachable(base)
    checkpoint = open_checkpoint(base)
    assert deltas.quantize(StoredWeights(model, checkpoint), kind) == [kind.upper()]
    for projection, delta in deltas.places:
        rows = delta.rows.numpy()
        sums = float_rows(checkpoint, projection.weight_name, rows) + delta.delta.detach().numpy()[delta.cluster.numpy()]
        wanted = rounded(sums)
        assert np.allclose(effective(delta)[rows].numpy(), wanted, atol=1e-5)
        assert not np.allclose(wanted, sums, atol=1e-3), "the rounding changes these rows"


def test_a_named_type_goes_before_that_of_the_file(models: Any, tmp_path: Path) -> None:
    file = write_gguf(models("llama"), tmp_path / "m.gguf", "Q4_1")
    model, deltas = attachable(file)
    stored = StoredWeights(model, open_checkpoint(file))
    assert deltas.quantize(stored, "auto") == ["Q4_1"]
    own = effective(deltas.modules[0])
    assert deltas.quantize(stored, "q8_0") == ["Q8_0"]
    assert not torch.equal(effective(deltas.modules[0]), own)
    assert deltas.quantize(stored, "none") == []
    assert all(delta.residual is None for delta in deltas.modules)


def test_a_quantized_file_gets_the_rows_that_were_trained(
    models: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the float base at hand, `apply` to a Q4_0 file writes what the training measured."""
    live: dict[str, torch.Tensor] = {}
    original = module._pack_tensors

    def look(run: Any, deltas: DeltaSet) -> Any:
        live.update({place.weight_name: effective(delta) for place, delta in deltas.places})
        return original(run, deltas)

    monkeypatch.setattr(module, "_pack_tensors", look)
    pack = train(models("llama"), data, Label("test"), recipe=ROUNDED).pack
    assert pack.manifest.format == "nest/1"
    assert "rounding to Q4_0 (asked for)" in pack.manifest.method["decisions"]["rounding"]
    file = write_gguf(models("llama"), tmp_path / "m.gguf", "Q4_0")
    apply_in_place(file, pack, base=models("llama"))
    patched = open_checkpoint(file)
    for delta in pack:
        rows = delta.rows.astype(np.int64)
        assert np.allclose(float_rows(patched, delta.name, rows), live[delta.name][rows].numpy(), atol=1e-5), delta.name


def test_blocks_that_do_not_fit_are_refused_before_any_work(models: Any, data: TrainingData) -> None:
    events: list[Event] = []
    with pytest.raises(QuantizationError, match="have 32 numbers, which do not fit into blocks of 256") as caught:
        train(
            models("llama"),
            data,
            Label("test"),
            recipe=dataclasses.replace(QUICK, round_to="q4_k"),
            on_event=events.append,
        )
    assert "q5_0" in caught.value.advice
    assert {event.stage for event in events} == {"load", "note"}
    with pytest.raises(RecipeError, match="round_to must be one of auto, none, q8_0"):
        Recipe(round_to="q4_k_m")


def test_another_type_in_the_same_run_directory(
    models: Any, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deltas of another type are not reused; the selection is."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    fresh = train(models("llama"), data, Label("test"), recipe=ROUNDED)
    train(models("llama"), data, Label("test"), recipe=QUICK, run_dir=tmp_path / "run")
    events: list[Event] = []
    again = train(models("llama"), data, Label("test"), recipe=ROUNDED, run_dir=tmp_path / "run", on_event=events.append)
    assert again.pack_id == fresh.pack_id
    notes = [event.note for event in events if event.stage == "note"]
    assert any("not reused: another round_to" in note for note in notes)
    assert any("clusters of 2 blocks" in note for note in notes)
