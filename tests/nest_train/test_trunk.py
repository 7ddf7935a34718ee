"""The frozen lower layers, computed once: the same numbers and gradients as a forward pass of the whole model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._trunk import Trunk
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.text import TokenPair, collate
from nestpatch.runtimes.transformers import answer_logits
from nestpatch.runtimes.weights import find_mlps
from tests.nest_train.conftest import CONFIGS
from tests.nest_train.test_stages import groups_of


def pairs(count: int, seed: int = 0) -> list[TokenPair]:
    """Examples of many lengths."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 300) for _ in range(rng.randint(low, high)))

    return [TokenPair(ids(2, 12), ids(1, 6)) for _ in range(count)]


class Tuned:
    """A tiny model with deltas in its upper layer, and its trunk."""

    def __init__(
        self, folder: Path, place: Path, first: int = 1, attention: str = "", load_in: str = "none", device: str = "cpu"
    ) -> None:
        self.model, tokenizer = load_model(folder, device, "float32", load_in)
        if attention:
            self.model.set_attn_implementation(attention)
        self.pad = int(tokenizer.pad_token_id)
        blocks = find_mlps(self.model)
        self.deltas = DeltaSet(blocks, groups_of(blocks, first))
        torch.manual_seed(1)
        self.deltas.restore([0.3 * torch.randn(delta.shape) for delta in self.deltas.snapshot()])
        self.trunk = Trunk(self.model, blocks, self.deltas.first_layer, self.pad)
        self.place = place

    def remember(self, examples: list[TokenPair], harmless: list[TokenPair]) -> tuple[str, str]:
        return self.trunk.remember(examples, harmless, self.place)

    def plain(self, batch: list[TokenPair]) -> tuple[torch.Tensor, torch.Tensor]:
        """By the whole model as it is now."""
        logits, labels = answer_logits(self.model, collate(batch, self.pad, self.model.device))
        return logits, labels

    def gradients(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return torch.autograd.grad(loss, [module.delta for module in self.deltas.modules])


def near(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Equal to rounding, by the scale of all values."""
    one, other = one.detach(), other.detach()
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * max(1.0, float(other.abs().max()))


@pytest.fixture
def tuned(models: Any, tmp_path: Path) -> Tuned:
    return Tuned(models("llama"), tmp_path)


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["", "eager"])
@pytest.mark.parametrize("family", [*CONFIGS, "mixtral", "deepseek-v3", "qwen2-vl", "gemma3-vl"])
def test_stored_hidden_states_give_the_whole_models_numbers(
    models: Any, tmp_path: Path, family: str, attention: str, device: str
) -> None:
    made = Tuned(models(family), tmp_path, attention=attention, device=device)
    examples = pairs(50)
    harmful, harmless = examples[:3], examples[3:7]
    where, why = made.remember(examples, examples[3:])
    assert where == "from layer 1", why
    base, _ = made.plain(harmless)
    with made.deltas.attached():
        logits, labels, remembered = made.trunk.logits(harmful + harmless, harmless)
        wanted, wanted_labels = made.plain(harmful + harmless)
        assert torch.equal(labels, wanted_labels)
        assert near(logits, wanted)
        assert near(remembered, base)
        assert not near(logits[-len(base) :], base, 1e-2), "the deltas change the predictions"
        for one, other in zip(made.gradients(logits, labels), made.gradients(wanted, wanted_labels), strict=True):
            assert float(other.abs().max()) > 0
            assert near(one, other)
    assert not remembered.requires_grad


def test_frozen_layers_are_not_computed_again(tuned: Tuned) -> None:
    runs = {0: 0, 1: 0}

    def count(layer: int) -> Any:
        def hook(*_: Any) -> None:
            runs[layer] += 1

        return hook

    for number, layer in enumerate(tuned.model.model.layers):
        layer.mlp.register_forward_hook(count(number))
    examples = pairs(40)
    tuned.remember(examples, examples)
    runs.update({0: 0, 1: 0})
    with tuned.deltas.attached():
        tuned.trunk.logits(examples[:5], examples[2:5])
    assert runs == {0: 0, 1: 1}


def test_no_base_predictions_unless_they_are_asked_for(tuned: Tuned) -> None:
    examples = pairs(6)
    tuned.remember(examples, examples[3:])
    logits, labels, base = tuned.trunk.logits(examples[:4])
    assert (len(logits), len(base)) == (len(labels), 0)


def test_where_the_first_layer_is_patched_all_are_computed(models: Any, tmp_path: Path) -> None:
    made = Tuned(models("llama"), tmp_path, first=0)
    examples = pairs(6)
    assert made.remember(examples, examples[3:]) == ("all layers", "the first one is patched")
    base, _ = made.plain(examples[3:])
    with made.deltas.attached():
        logits, _, remembered = made.trunk.logits(examples, examples[3:])
        assert near(logits, made.plain(examples)[0])
    assert near(remembered, base)


def test_layers_are_restored_after_an_exception(tuned: Tuned) -> None:
    examples = pairs(8)
    tuned.remember(examples, examples[4:])
    layers = list(tuned.model.model.layers)
    before = tuned.plain(examples)[0]

    def fail(*_: Any) -> None:
        raise MemoryError("no memory left")

    handle = layers[1].self_attn.register_forward_pre_hook(fail)
    with tuned.deltas.attached(), pytest.raises(MemoryError):
        tuned.trunk.logits(examples, examples[4:])
    handle.remove()
    assert all(one is other for one, other in zip(tuned.model.model.layers, layers, strict=True))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    assert torch.equal(tuned.plain(examples)[0], before), "no hook of the trunk is left, neither at the layers nor at the head"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (lambda inside: inside[:1, :1], "skipping frozen layers changes the answers of this architecture by"),
        (lambda inside: inside, "frozen layers of this architecture cannot be skipped: RuntimeError: "),
    ],
    ids=["other numbers", "an error"],
)
def test_layers_that_cannot_be_skipped_are_computed(tuned: Tuned, extra: Any, says: str) -> None:
    """An architecture whose upper layer reads inside a lower one too, as some do: hidden states alone do not suffice."""
    inside: list[torch.Tensor] = []
    tuned.model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: inside.append(out))
    tuned.model.model.layers[1].register_forward_hook(lambda _, __, out: out + 3 * extra(inside[-1]))
    examples = pairs(40)
    where, why = tuned.remember(examples, examples[20:])
    assert where == "all layers"
    assert why.startswith(says)
    layers = [type(layer).__name__ for layer in tuned.model.model.layers]
    assert layers == ["LlamaDecoderLayer"] * 2
    with tuned.deltas.attached():
        logits, _, _ = tuned.trunk.logits(examples[18:24], examples[20:24])
        assert near(logits, tuned.plain(examples[18:24])[0])


def test_the_longest_examples_are_compared_too(tuned: Tuned) -> None:
    """A difference that short texts do not show must be found."""

    def long_ones(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        return out + 5.0 if out.shape[1] > 15 and not lower else out

    lower: list[int] = []
    tuned.model.model.layers[0].mlp.register_forward_hook(lambda *_: lower.append(1))
    tuned.model.model.layers[1].mlp.register_forward_hook(long_ones)
    tuned.model.register_forward_hook(lambda *_: lower.clear())
    examples = [*pairs(20), TokenPair(tuple(range(3, 20)), (9, 8))]
    assert tuned.remember(examples, examples)[0] == "all layers"
