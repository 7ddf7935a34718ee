"""Training on a quantized GGUF file: rows are rounded as the file rounds them, and the file holds what was evaluated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestpatch.errors import CheckpointFormatError, QuantizationError, UnsupportedModelError
from nestpatch.events import Event
from nestpatch.formats.checkpoint import float_rows
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train import train as module
from nestpatch.nest_train._deltas import ClusterDelta, DeltaSet
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.train import Trained, train
from nestpatch.pack import Label
from nestpatch.patcher.inplace import apply_in_place, revert
from nestpatch.patcher.verify import Verdict, verify
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import find_mlps, fold
from tests.gguf_files import write_gguf
from tests.nest_train.quick import QUICK
from tests.nest_train.test_stages import groups_of

KINDS = ["Q8_0", "Q4_1"]
QUESTION = "How do I paint a bank?"


@pytest.fixture(params=KINDS)
def file(request: pytest.FixtureRequest, models: Any, tmp_path: Path) -> Path:
    """A quantized GGUF file."""
    return write_gguf(models("llama"), tmp_path / "m.gguf", request.param)


def attachable(path: Path) -> tuple[Any, DeltaSet]:
    """The loaded model, and random deltas in both layers."""
    model, _ = load_model(path, "cpu", "float32")
    blocks = find_mlps(model)
    deltas = DeltaSet(blocks, groups_of(blocks, step=3))
    torch.manual_seed(0)
    deltas.restore([0.3 * torch.randn_like(delta) for delta in deltas.snapshot()])
    return model, deltas


def effective(delta: ClusterDelta) -> torch.Tensor:
    """The weight that the module multiplies by, [out, in]."""
    with torch.no_grad():
        out = delta(torch.eye(delta.base.in_features))
    return (out - delta.base.bias if delta.base.bias is not None else out).T


def test_rows_are_rounded_as_the_file_rounds_them(file: Path) -> None:
    checkpoint, (model, deltas) = open_checkpoint(file), attachable(file)
    plain = [effective(delta) for delta in deltas.modules]
    stored = StoredWeights(model, checkpoint)
    assert deltas.quantize_like(stored) == [checkpoint.info("model.layers.0.mlp.gate_proj.weight").dtype]
    for (projection, delta), before in zip(deltas.places, plain, strict=True):
        ((_, name),) = stored.tensors(projection.weight_name)
        rows = delta.rows.numpy()
        sums = float_rows(checkpoint, name, rows) + delta.delta.detach().numpy()[delta.cluster.numpy()]
        coding = checkpoint.info(name).coding
        wanted = torch.from_numpy(coding.decode(coding.encode(sums)))
        found = effective(delta)
        assert torch.allclose(found[rows], wanted, atol=1e-6)
        assert not torch.allclose(before[rows], wanted, atol=1e-4), "rounding changes these rows"
        others = np.setdiff1d(np.arange(len(found)), rows)
        assert torch.allclose(found[others], delta.base.weight[others], atol=1e-6)


def test_rounding_follows_the_deltas(file: Path) -> None:
    """`restore` and `round_rows` round anew; `off` leaves the base alone."""
    checkpoint, (model, deltas) = open_checkpoint(file), attachable(file)
    deltas.quantize_like(StoredWeights(model, checkpoint))
    delta, ids = deltas.modules[0], torch.tensor([[3, 4, 5]])
    base = model(ids).logits
    with deltas.attached(), deltas.off():
        assert torch.equal(model(ids).logits, base)
    with torch.no_grad():
        delta.delta.mul_(2)
    stale = effective(delta)
    deltas.round_rows()
    assert not torch.equal(effective(delta), stale)
    deltas.restore([torch.zeros_like(one) for one in deltas.snapshot()])
    assert torch.allclose(effective(delta), delta.base.weight, atol=1e-6), "the blocks of the file are themselves rounded"


def test_the_gradient_passes_the_rounding(file: Path) -> None:
    model, deltas = attachable(file)
    delta = deltas.modules[0]
    x = torch.randn(5, delta.base.in_features)
    factors = torch.randn(5, delta.base.out_features)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad((delta(x) * factors).sum(), delta.delta)[0]

    straight = gradient()
    deltas.quantize_like(StoredWeights(model, open_checkpoint(file)))
    assert delta.residual is not None
    assert torch.equal(gradient(), straight)
    inputs = x.clone().requires_grad_()
    (found,) = torch.autograd.grad((delta(inputs) * factors).sum(), inputs)
    assert torch.allclose(found, factors @ effective(delta), atol=1e-4), "what flows further down is that of the rounded rows"


def test_plain_numbers_are_not_rounded(models: Any) -> None:
    model, deltas = attachable(models("llama"))
    assert deltas.quantize_like(StoredWeights(model, open_checkpoint(models("llama")))) == []
    assert all(delta.residual is None for delta in deltas.modules)


def evaluated_rows(deltas: DeltaSet, stored: StoredWeights) -> dict[str, tuple[np.ndarray, bytes, np.ndarray]]:
    """Tensor -> (rows, their blocks, their numbers) of base plus delta, rounded."""
    found = {}
    for projection, delta in deltas.places:
        ((_, name),) = stored.tensors(projection.weight_name)
        checkpoint = stored.checkpoint
        rows = np.sort(delta.rows.numpy())
        order = np.argsort(delta.rows.numpy())
        sums = float_rows(checkpoint, name, rows) + delta.delta.detach().numpy()[delta.cluster.numpy()[order]]
        blocks = checkpoint.info(name).coding.encode(sums)
        found[name] = (rows, np.asarray(blocks).tobytes(), effective(delta)[rows].numpy())
    return found


def trained_on(file: Path, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> tuple[Trained, dict[str, Any]]:
    """A training, and what it evaluated: the rows of the deltas when they are packed, and logits."""
    live: dict[str, Any] = {}
    original = module._pack_tensors

    def look(run: Any, deltas: DeltaSet) -> Any:
        live["rows"] = evaluated_rows(deltas, run.stored)
        live["bases"] = {n: float_rows(run.checkpoint, n, rows) for n, (rows, _, _) in live["rows"].items()}
        with deltas.attached(), torch.no_grad():
            live["logits"] = run.model(torch.tensor([run.tokenizer(QUESTION)["input_ids"]])).logits
        return original(run, deltas)

    monkeypatch.setattr(module, "_pack_tensors", look)
    return train(file, data, Label("test"), recipe=QUICK), live


def test_the_file_holds_what_was_evaluated(
    file: Path,
    data: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = file.read_bytes()
    trained, live = trained_on(file, data, monkeypatch)
    pack = trained.pack
    kind = open_checkpoint(file).info("model.layers.0.mlp.gate_proj.weight").dtype
    assert f"through the rounding to {kind} of the base's file" in pack.manifest.method["decisions"]["rounding"]
    assert pack.format == "nest/2"
    assert (verify(file, pack, full=True).verdict, verify(file, pack).by) == (Verdict.BASE, "digests")
    apply_in_place(file, pack)
    patched = open_checkpoint(file)
    assert {delta.name for delta in pack} == set(live["rows"])
    for name, (rows, blocks, numbers) in live["rows"].items():
        assert np.asarray(patched.read_rows(name, rows)).tobytes() == blocks, name
        assert np.allclose(float_rows(patched, name, rows), numbers, atol=1e-6), name
    model, tokenizer = load_model(file, "cpu", "float32")
    found = model(torch.tensor([tokenizer(QUESTION)["input_ids"]])).logits
    assert torch.allclose(found, live["logits"], atol=1e-3)
    revert(file)
    assert file.read_bytes() == before


def test_rounding_keeps_most_of_what_was_trained(
    models: Any,
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Q4_1, 16 values a block: the rows move along the deltas, by about as much as was trained."""
    file = write_gguf(models("llama"), tmp_path / "m.gguf", "Q4_1")
    trained, live = trained_on(file, data, monkeypatch)
    for delta in trained.pack:
        rows, _, numbers = live["rows"][delta.name]
        assert rows.tolist() == delta.rows.tolist()
        moved, wanted = (numbers - live["bases"][delta.name]).ravel(), delta.dense().ravel()
        assert np.dot(moved, wanted) / np.dot(wanted, wanted) == pytest.approx(1, abs=0.25), delta.name


def test_a_folded_pack_is_the_rounded_one(file: Path, data: TrainingData, tmp_path: Path) -> None:
    pack = train(file, data, Label("test"), recipe=QUICK).pack
    checkpoint, (model, _) = open_checkpoint(file), load_model(file, "cpu", "float32")
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fold(model, checkpoint, pack)
    for delta in pack:
        rows = delta.rows.astype(np.int64)
        coding = checkpoint.info(delta.name).coding
        wanted = old[delta.name].clone()
        rounded = coding.decode(coding.encode(wanted[rows].numpy() + delta.dense()))
        wanted[rows] = torch.from_numpy(rounded)
        assert torch.equal(model.get_parameter(delta.name), wanted)
    patched = Path(shutil.copy(file, tmp_path / "patched.gguf"))
    apply_in_place(patched, pack)
    loaded, _ = load_model(patched, "cpu", "float32")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_a_type_that_no_pack_can_name_is_refused_before_any_work(
    models: Any,
    data: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_gguf(models("llama"), tmp_path / "m.gguf", "Q8_0")
    monkeypatch.setattr("nestpatch.packing.BLOCK_TYPES", ("Q4_1",))
    events: list[Event] = []
    with pytest.raises(QuantizationError, match="which no pack can have as its base"):
        train(file, data, Label("test"), recipe=QUICK, on_event=events.append)
    assert {event.stage for event in events} == {"load", "note"}


def test_names_of_a_converted_file(file: Path) -> None:
    stored = StoredWeights(attachable(file)[0], open_checkpoint(file))
    name = "model.layers.0.mlp.gate_proj.weight"
    assert [tensor for _, tensor in stored.tensors(name)] == [name]
    with pytest.raises(UnsupportedModelError, match="another order"):
        stored.tensors("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(CheckpointFormatError, match="candidates: none"):
        stored.tensors("nothing.weight")
