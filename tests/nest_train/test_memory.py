"""Micro-batches, activation checkpointing and the choice between them; attention; bases in few bits."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nestpatch.errors import MissingExtraError, OutOfMemoryError
from nestpatch.nest_train import _free, _memory
from nestpatch.nest_train._free import free_memory
from nestpatch.nest_train._memory import fit_memory, longest_batch
from nestpatch.nest_train._run import Run, choose_attention
from nestpatch.nest_train._targets import Examples
from nestpatch.nest_train._tune import batch_loss, micro_batches
from nestpatch.nest_train.recipe import Recipe
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.apply import apply
from nestpatch.patcher.verify import verify
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.quantized import float_weight, resembles
from tests.gguf_files import write_gguf
from tests.nest_train.conftest import CONFIGS, LLAMA, SIZES
from tests.nest_train.quick import QUICK
from tests.nest_train.test_trunk import Tuned, near, pairs
from tests.nest_train.test_tune import Tuning, some

BATCH = Recipe(harmful_batch=3, benign_batch=2, lookalike_batch=2, benign_weight=0.5, kl_weight=2.0, first_token_weight=5.0)
LENGTHS = (3, 9, 5, 14, 4)


@pytest.fixture
def tuning(models: Any, tmp_path: Path) -> Tuning:
    """All kinds, of many lengths."""
    data = Examples(*(some(kind, 24, LENGTHS, (9, 11, 2)) for kind in ("harmful", "benign", "lookalike")))
    tuning = Tuning(models("llama"), tmp_path, data)
    torch.manual_seed(3)
    tuning.deltas.restore([0.2 * torch.randn_like(delta) for delta in tuning.deltas.snapshot()])
    return tuning


def of_each(data: Examples, *counts: int) -> Examples:
    kinds = (data.harmful, data.benign, data.lookalike)
    return Examples(*(kind[:count] for kind, count in zip(kinds, counts, strict=True)))


def gradients(tuning: Tuning, recipe: Recipe, batch: Examples) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(loss, gradient of each delta) of a batch, as a step computes them."""
    for module in tuning.deltas.modules:
        module.delta.grad = None
    with tuning.deltas.attached():
        loss = batch_loss(tuning.trunk, recipe, batch, torch.Tensor.backward)
    assert not loss.requires_grad
    return loss, [module.delta.grad.clone() for module in tuning.deltas.modules]


# Micro-batches


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 99])
@pytest.mark.parametrize("counts", [(3, 2, 2), (5, 0, 1), (1, 6, 0)])
def test_micro_batches_give_the_gradient_of_the_whole_batch(tuning: Tuning, size: int, counts: tuple[int, int, int]) -> None:
    batch = of_each(tuning.data, *counts)
    loss, whole = gradients(tuning, BATCH, batch)
    found, parts = gradients(tuning, dataclasses.replace(BATCH, micro_batch=size), batch)
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    for one, other in zip(parts, whole, strict=True):
        assert float(other.abs().max()) > 0
        assert near(one, other, 1e-5)


def test_micro_batches_are_the_batch_in_parts() -> None:
    batch = Examples(*(some(kind, 5, LENGTHS) for kind in ("harmful", "benign", "lookalike")))
    assert micro_batches(batch, 0) == micro_batches(batch, 15) == micro_batches(batch, 99) == [batch]
    for size in (1, 2, 4, 14):
        parts = micro_batches(batch, size)
        assert [len(part.harmful + part.harmless) for part in parts[:-1]] == [size] * (len(parts) - 1)
        for kind in ("harmful", "benign", "lookalike"):
            assert Counter(one for part in parts for one in getattr(part, kind)) == Counter(getattr(batch, kind))
        lengths = [[one.length for one in part.harmful + part.harmless] for part in parts]
        assert all(min(one) >= max(other) for one, other in pairwise(lengths)), "the longest first"


def test_a_model_computes_no_more_examples_at_once(tuning: Tuning) -> None:
    rows: list[int] = []
    tuning.model.model.layers[1].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    recipe = dataclasses.replace(
        QUICK, harmful_batch=4, benign_batch=3, lookalike_batch=3, steps=2, check_every=1, micro_batch=3
    )
    tuning.run(recipe)
    assert max(rows) == 3, "neither in steps nor when the held-out prompts are looked at"


def test_a_training_in_micro_batches_is_the_same_training(models: Any, tmp_path: Path) -> None:
    data = Examples(*(some(kind, 24, LENGTHS) for kind in ("harmful", "benign", "lookalike")))
    recipe = dataclasses.replace(QUICK, harmful_batch=4, benign_batch=3, lookalike_batch=3, steps=4, check_every=2)
    found = []
    for size in (0, 3):
        folder = tmp_path / str(size)
        folder.mkdir()
        tuning = Tuning(models("llama"), folder, data)
        result = tuning.run(dataclasses.replace(recipe, micro_batch=size))
        found.append(([look.loss for look in result.looks], tuning.flat()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    assert near(found[1][1], found[0][1], 1e-3)
    assert found[0][1].any()


def test_examples_are_remembered_in_the_batches_that_fit(tuning: Tuning, tmp_path: Path) -> None:
    rows: list[int] = []
    tuning.model.model.layers[1].mlp.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    every = [e.tokens for e in tuning.data.harmful + tuning.data.harmless]
    tuning.trunk.remember(every, every[24:], tmp_path, batch=5)
    assert max(rows) == 5


# Checkpointing


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_checkpointed_layers_give_the_same_numbers(models: Any, tmp_path: Path, family: str, first: int) -> None:
    """In evaluation mode, so that the families that drop activations out do not."""
    made = Tuned(models(family), tmp_path, first)
    examples = pairs(12)
    made.remember(examples, examples[6:])
    found = []
    with made.deltas.attached():
        for made.trunk.checkpointing in (False, True):
            logits, labels, base = made.trunk.logits(examples, examples[6:])
            found.append((logits, base, *made.gradients(logits, labels)))
    assert all(near(one, other, 1e-6) for one, other in zip(*found, strict=True))
    assert not any(type(layer).__name__ == "_Checkpointed" for layer in made.model.modules())


@pytest.mark.parametrize(("first", "runs"), [(0, {0: 2, 1: 2}), (1, {0: 0, 1: 2})])
def test_checkpointed_layers_are_computed_again_and_skipped_ones_never(
    models: Any, tmp_path: Path, first: int, runs: dict[int, int]
) -> None:
    made = Tuned(models("llama"), tmp_path, first)
    examples = pairs(12)
    made.remember(examples, examples[6:])
    seen = Counter({0: 0, 1: 0})
    for number, layer in enumerate(made.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: seen.update([number]))
    made.trunk.checkpointing = True
    with made.deltas.attached():
        with torch.no_grad():
            made.trunk.logits(examples)
        assert seen == {number: count // 2 for number, count in runs.items()}
        seen.subtract(dict(seen))
        made.gradients(*made.trunk.logits(examples)[:2])
    assert seen == runs


def test_checkpointing_keeps_less(tuning: Tuning) -> None:
    run = a_run(tuning, BATCH)
    batch = of_each(tuning.data, 3, 2, 2)
    with tuning.deltas.attached():
        whole = _memory._kept_bytes(run, tuning.trunk, batch)
        tuning.trunk.checkpointing = True
        assert _memory._kept_bytes(run, tuning.trunk, batch) < 0.7 * whole


# The choice


def a_run(tuning: Tuning, recipe: Recipe) -> Run:
    return Run(None, None, tuning.model, None, recipe, lambda _: None)  # type: ignore[arg-type]


def fit(tuning: Tuning, recipe: Recipe, place: Path) -> tuple[int, Run]:
    run = a_run(tuning, recipe)
    return fit_memory(run, tuning.trunk, tuning.deltas, tuning.data, place), run


def test_the_largest_batch_has_the_longest_examples() -> None:
    data = Examples(some("harmful", 20, LENGTHS), some("benign", 20, LENGTHS))
    batch = longest_batch(data, BATCH)
    assert [len(batch.harmful), len(batch.benign), len(batch.lookalike)] == [3, 4, 0]
    assert {one.length for one in batch.harmful + batch.benign} == {17}
    few = longest_batch(Examples(data.harmful[:2], data.benign[:1]), BATCH)
    assert [len(few.harmful), len(set(few.harmful)), len(few.benign), len(set(few.benign))] == [3, 2, 4, 1]


def test_on_a_cpu_with_memory_the_whole_batch_is_computed_at_once(tuning: Tuning, tmp_path: Path) -> None:
    before = tuning.flat()
    size, run = fit(tuning, BATCH, tmp_path)
    assert size == 7
    assert run.decisions == {
        "micro-batch": "7 of 7 examples (the whole batch fits into memory)",
        "checkpointing": "off (activations fit into memory)",
    }
    assert not tuning.trunk.checkpointing
    assert torch.equal(tuning.flat(), before)


def test_on_a_cpu_with_little_memory_a_part_is(tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tuning, BATCH)
    one = _memory._bytes_of_one(run, tuning.trunk, tuning.deltas, longest_batch(tuning.data, BATCH), tmp_path)
    assert one > 4 * 320 * 3, "at least the logits of the answers"
    for free, wanted in ((3.9, "2 of 7 examples"), (1.1, "1 of 7 examples"), (4.1, "4 of 7 examples")):
        monkeypatch.setattr(_free, "free_memory", lambda free=free: int(free * one * _memory._PEAK))
        size, run = fit(tuning, BATCH, tmp_path)
        assert run.decisions["micro-batch"] == f"{wanted} (more do not fit into memory)"
        assert size == int(wanted[0])


def test_on_a_cpu_where_one_example_does_not_fit(tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = lambda _, trunk, *__: 100 if trunk.checkpointing else 300  # noqa: E731
    monkeypatch.setattr(_memory, "_bytes_of_one", need)
    monkeypatch.setattr(_free, "free_memory", lambda: int(200 * _memory._PEAK))
    size, run = fit(tuning, BATCH, tmp_path)
    assert (size, tuning.trunk.checkpointing) == (2, True)
    assert run.decisions["checkpointing"] == "on (not one example fits into memory otherwise)"
    says = "one example of 17 tokens does not fit into the memory of the device cpu"
    with pytest.raises(OutOfMemoryError, match=says) as caught:
        fit(tuning, dataclasses.replace(BATCH, checkpointing="off"), tmp_path)
    assert "load_in=4bit" in caught.value.advice
    monkeypatch.setattr(_free, "free_memory", lambda: 99)
    with pytest.raises(OutOfMemoryError, match=says):
        fit(tuning, BATCH, tmp_path)


@contextmanager
def an_accelerator(tuning: Tuning, rows: int, checkpointed_rows: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Raises PyTorch's error as a GPU does, in the backward pass of a step with more rows than fit."""
    monkeypatch.setattr(_memory, "_survives", lambda _: True)

    def look(_: Any, args: Any, out: Any) -> None:
        fits = checkpointed_rows if tuning.trunk.checkpointing else rows
        if out.requires_grad and len(args[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = tuning.model.model.layers[1].mlp.register_forward_hook(look)
    yield
    handle.remove()


@pytest.mark.parametrize(
    ("rows", "checkpointed", "wanted", "on"),
    [(7, 9, 7, False), (6, 9, 4, False), (3, 9, 2, False), (1, 9, 1, False), (0, 5, 4, True)],
)
def test_an_accelerator_halves_until_a_step_fits(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, checkpointed: int, wanted: int, on: bool
) -> None:
    before = tuning.flat()
    with an_accelerator(tuning, rows, checkpointed, monkeypatch):
        size, run = fit(tuning, BATCH, tmp_path)
        assert (size, tuning.trunk.checkpointing) == (wanted, on)
        assert run.decisions["micro-batch"].startswith(f"{wanted} of 7 examples")
        every = tuning.data.harmful + tuning.data.harmless
        tuning.trunk.remember([e.tokens for e in every], [e.tokens for e in tuning.data.harmless], tmp_path, batch=size)
        assert torch.equal(tuning.flat(), before)
        result = tuning.run(dataclasses.replace(QUICK, harmful_batch=3, benign_batch=2, lookalike_batch=2, micro_batch=size))
    assert result.steps == QUICK.steps


def test_an_attempt_that_failed_leaves_nothing(tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(QUICK, harmful_batch=3, benign_batch=2, lookalike_batch=2)
    start = tuning.deltas.snapshot()
    tuning.run(dataclasses.replace(recipe, micro_batch=2))
    wanted = tuning.flat()
    tuning.deltas.restore(start)
    with an_accelerator(tuning, 3, 3, monkeypatch):
        fit(tuning, BATCH, tmp_path)
    assert any(module.delta.grad is not None for module in tuning.deltas.modules)
    every = tuning.data.harmful + tuning.data.harmless
    tuning.trunk.remember([e.tokens for e in every], [e.tokens for e in tuning.data.harmless], tmp_path)
    tuning.run(dataclasses.replace(recipe, micro_batch=2))
    assert torch.equal(tuning.flat(), wanted)


def test_where_nothing_fits_an_accelerator_says_so(tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with an_accelerator(tuning, 0, 0, monkeypatch), pytest.raises(OutOfMemoryError, match="one example of 17 tokens"):
        fit(tuning, BATCH, tmp_path)
    with an_accelerator(tuning, 0, 9, monkeypatch), pytest.raises(OutOfMemoryError):
        fit(tuning, dataclasses.replace(BATCH, checkpointing="off"), tmp_path)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_memory, "_survives", lambda _: True)
    monkeypatch.setattr(tuning.trunk, "remember", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        fit(tuning, BATCH, tmp_path)


def test_a_lack_of_memory_does_not_mean_that_layers_cannot_be_skipped(
    models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = Tuned(models("llama"), tmp_path)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(tuned.trunk, "_gap", fail)
    with pytest.raises(torch.OutOfMemoryError):
        tuned.remember(pairs(8), [])


def test_what_the_recipe_asks_for_is_taken(tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.trunk, "remember", lambda *_, **__: pytest.fail("nothing is to be tried"))
    for mode in ("on", "off"):
        size, run = fit(tuning, dataclasses.replace(BATCH, micro_batch=3, checkpointing=mode), tmp_path)
        assert (size, tuning.trunk.checkpointing) == (3, mode == "on")
        assert run.decisions == {"micro-batch": "3 of 7 examples (asked for)", "checkpointing": f"{mode} (asked for)"}
    assert fit(tuning, dataclasses.replace(BATCH, micro_batch=50, checkpointing="off"), tmp_path)[0] == 7


def test_without_a_list_of_layers_nothing_is_checkpointed(tuning: Tuning, tmp_path: Path) -> None:
    tuning.trunk._layers, tuning.trunk._start = torch.nn.ModuleList(), 0
    size, run = fit(tuning, dataclasses.replace(BATCH, checkpointing="on"), tmp_path)
    assert (size, tuning.trunk.checkpointing) == (7, False)
    assert run.decisions["checkpointing"] == "off (this architecture has no list of layers)"


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    free = free_memory(tmp_path / "none")
    assert 1 << 20 < free < 1 << 50
    (tmp_path / "memory.stat").write_text("anon 1000000\nfile 900000000\n")
    for limit, wanted in (("5000000\n", 4_000_000), ("500\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert free_memory(tmp_path) == wanted
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1 << 20


# A whole training


def test_a_training_in_little_memory(models: Any, data: Any) -> None:
    """One example at a time, with checkpoints: the same pack but for rounding, and it says how it was made."""
    packs = []
    for settings in ({}, {"micro_batch": 1, "checkpointing": "on"}):
        recipe = dataclasses.replace(QUICK, first_layer=1, dtype="float32", **settings)
        packs.append(train(models("llama"), data, Label("x"), recipe=recipe).pack)
    whole, parts = packs
    assert whole.manifest.method["decisions"]["micro-batch"] == "4 of 4 examples (the whole batch fits into memory)"
    assert parts.manifest.method["decisions"]["micro-batch"] == "1 of 4 examples (asked for)"
    assert parts.manifest.method["decisions"]["checkpointing"] == "on (asked for)"
    assert parts.manifest.method["recipe"]["micro_batch"] == 1
    for one, other in zip(parts, whole, strict=True):
        assert np.array_equal(one.rows, other.rows)
        gap = one.dense().astype(np.float32) - other.dense().astype(np.float32)
        assert np.abs(gap).max() < 0.05 * np.abs(other.dense().astype(np.float32)).max()


# Attention


def test_accelerators_use_fused_attention_and_cpus_do_not() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert choose_attention(model) == ("sdpa", "PyTorch's fused attention")
    model = transformers.LlamaForCausalLM(config)
    assert choose_attention(model)[0] == model.config._attn_implementation == "eager"


# Few bits


def test_a_missing_package_is_named_before_the_model_is_loaded(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda: False)
    monkeypatch.setattr("nestpatch.runtimes.loading._load_directory", lambda *_: pytest.fail("loaded"))
    with pytest.raises(MissingExtraError, match="load_in=4bit") as caught:
        load_model(models("llama"), "cpu", "float32", "4bit")
    assert "nestpatch[quantize]" in caught.value.advice


@pytest.fixture
def wide(tmp_path: Path, tokenizer: Any) -> Path:
    """A model of matrices that are not smaller than the blocks of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    sizes = SIZES | LLAMA | {"hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | {"initializer_range": 0.1}))
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


FEW_BITS = pytest.mark.parametrize(("load_in", "kind", "error"), [("4bit", "Linear4bit", 0.13), ("8bit", "Linear8bitLt", 0.02)])


@FEW_BITS
def test_a_base_in_few_bits(wide: Path, load_in: str, kind: str, error: float) -> None:
    model, _ = load_model(wide, "cpu", "float32", load_in)
    whole, _ = load_model(wide, "cpu", "float32")
    assert model.num_parameters() == whole.num_parameters()
    exact = whole.model.layers[1].mlp.up_proj.weight.detach()
    for _ in range(2):  # before and after the model is used
        linear = model.model.layers[1].mlp.up_proj
        assert type(linear).__name__ == kind
        weight = float_weight(linear)
        assert weight.shape == exact.shape
        assert 1e-4 < float((weight - exact).norm() / exact.norm()) < error
        assert resembles(exact.numpy(), weight)
        assert not resembles(whole.model.layers[0].mlp.up_proj.weight.detach().numpy(), weight)
        model(torch.tensor([[5, 6, 7]]))
    assert torch.equal(float_weight(whole.model.layers[1].mlp.up_proj), exact)


@FEW_BITS
def test_gradients_pass_a_base_in_few_bits(wide: Path, tmp_path: Path, load_in: str, kind: str, error: float) -> None:
    """As they pass a model of the weights with which it computes; after it was used for answers, as in a training."""
    del kind, error
    few = Tuned(wide, tmp_path, 0, load_in=load_in)
    (tmp_path / "float").mkdir()
    same = Tuned(wide, tmp_path / "float", 0)
    examples = pairs(8)
    for made in (few, same):
        made.remember(examples, examples[4:])
    with torch.no_grad():
        for name, module in few.model.named_modules():
            if "layers" in name and isinstance(module, torch.nn.Linear):
                same.model.get_submodule(name).weight.copy_(float_weight(module))
    found = []
    for made in (few, same):
        with made.deltas.attached():
            logits, labels, _ = made.trunk.logits(examples)
            found.append((logits, *made.gradients(logits, labels)))
    assert all(gradient.any() for gradient in found[0][1:])
    assert all(near(one, other, 2e-2) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_pack_from_a_base_in_few_bits_is_for_the_base_on_disk(wide: Path, data: Any, tmp_path: Path, load_in: str) -> None:
    recipe = dataclasses.replace(QUICK, first_layer=1, load_in=load_in)
    pack = train(wide, data, Label("x", license="MIT"), recipe=recipe, output=tmp_path / "x.nest").pack
    decisions = pack.manifest.method["decisions"]
    assert decisions["load_in"].startswith(f"{load_in} (asked for")
    assert decisions["step"].startswith("from layer 1")
    apply(wide, tmp_path / "x.nest", tmp_path / "patched")
    assert verify(tmp_path / "patched", tmp_path / "x.nest").verdict.value == "patched"


@FEW_BITS
def test_a_quantized_file_in_few_bits(wide: Path, tmp_path: Path, load_in: str, kind: str, error: float) -> None:
    file = write_gguf(wide, tmp_path / "m.gguf", "Q8_0")
    model, _ = load_model(file, "cpu", "float32", load_in)
    whole, _ = load_model(file, "cpu", "float32")
    exact, linear = (one.model.layers[1].mlp.up_proj for one in (whole, model))
    assert type(linear).__name__ == kind
    assert float((float_weight(linear) - exact.weight).norm() / exact.weight.norm()) < error
