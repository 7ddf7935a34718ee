"""Experts: the loop computes what transformers computes, neurons are seen on their own tokens, and the busy ones take part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._neurons import Clusters, collect, routed
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.experts import busiest, computed_by, each_expert
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.weights import MlpBlock, find_mlps
from tests.nest_train.conftest import MIXTURES

PROMPTS = [[5, 9, 12, 200, 7], [33, 4], [8, 250, 61], [100, 101, 102, 103, 104, 105]]
RECIPE = Recipe(probe_batch=3)


def mixtures(model: Any) -> list[MlpBlock]:
    return [block for block in find_mlps(model) if block.mixture]


def loaded(folder: Path) -> Any:
    return load_model(folder, "cpu", "float32")[0]


def inputs(model: Any, block: MlpBlock, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the experts of a block get for a prompt alone."""
    seen: list[Any] = []
    hook = block.output.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    hook.remove()
    return seen[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("family", list(MIXTURES))
def test_the_loop_computes_what_transformers_computes(models: Any, family: str, implementation: str) -> None:
    model = loaded(models(family))
    model.set_experts_implementation(implementation)
    for block in mixtures(model):
        args = inputs(model, block, PROMPTS[0])
        wanted = block.output(*args)
        assert torch.allclose(each_expert(block.output, *args), wanted, atol=1e-5 * float(wanted.abs().max()))


def test_blocks_of_a_mixture(models: Any) -> None:
    """The shared expert is a block of its own in the same layer; a layer without experts is an ordinary one."""
    found = [(block.layer, block.name, block.neurons, block.mixture) for block in find_mlps(loaded(models("qwen2-moe")))]
    assert found == [
        (layer, f"model.layers.{layer}.mlp.{part}", neurons, part == "experts")
        for layer in (0, 1)
        for part, neurons in (("experts", 4 * 48), ("shared_expert", 40))
    ]
    found = [(block.layer, block.name, block.neurons, block.mixture) for block in find_mlps(loaded(models("deepseek-v3")))]
    assert found == [
        (0, "model.layers.0.mlp", 64, False),
        (1, "model.layers.1.mlp.experts", 4 * 48, True),
        (1, "model.layers.1.mlp.shared_experts", 48, False),
    ]


def test_a_neuron_of_an_expert_has_two_rows(models: Any) -> None:
    """Experts flattened; in each, all gate rows, then all up rows."""
    (block, _) = mixtures(loaded(models("qwen3-moe")))
    (projection,) = block.of_experts((1, 3)).projections
    assert projection.rows(np.asarray([0, 47, 48]), 0).tolist() == [96, 96 + 47, 3 * 96]
    assert projection.rows(np.asarray([0, 47, 48]), 1).tolist() == [96 + 48, 96 + 95, 3 * 96 + 48]


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_neurons_are_seen_on_the_tokens_of_their_expert(models: Any, tmp_path: Path, family: str) -> None:
    """The largest activation over the prompt's own tokens that are routed to the expert, padding aside; 0 without any."""
    model = loaded(models(family))
    blocks = [block.of_experts((0, 2, 3)) if block.mixture else block for block in find_mlps(model)]
    acts = collect(model, blocks, PROMPTS, tmp_path, RECIPE, 0)
    silent = 0
    for block, found in zip(blocks, acts, strict=True):
        if not block.mixture:
            continue
        for prompt, row in zip(PROMPTS, found.reshape(len(PROMPTS), 3, -1), strict=True):
            hidden, index, _ = inputs(model, block, prompt)
            for expert, values in zip((0, 2, 3), row, strict=True):
                tokens = hidden[(index == expert).any(-1)]
                gate, up = (tokens @ block.output.gate_up_proj[expert].T).chunk(2, -1)
                wanted = torch.nn.functional.silu(gate) * up
                silent += not len(tokens)
                assert np.allclose(values, wanted.amax(0).numpy() if len(tokens) else 0, atol=1e-4)
    assert silent, "some expert sees nothing of some prompt"
    assert type(model.model.layers[0].mlp.experts).__name__.endswith("Experts"), "the model is as before"


def test_the_experts_of_harmful_prompts_take_part(models: Any) -> None:
    model = loaded(models("mixtral"))
    whole = find_mlps(model)
    found = routed(model, whole, PROMPTS, RECIPE, 0)
    for block, before in zip(found, whole, strict=True):
        indices = torch.cat([inputs(model, before, prompt)[1].flatten() for prompt in PROMPTS])
        assert block.experts == busiest(torch.bincount(indices, minlength=4).unsqueeze(0).expand(2, -1))
        assert block.neurons == 64 * len(block.experts)
    dense = find_mlps(loaded(models("llama")))
    assert routed(loaded(models("llama")), dense, PROMPTS, RECIPE, 0) == dense


def test_three_times_as_many_experts_as_a_token_has() -> None:
    first, second = [5, 0, 1, 9, 0, 2, 0, 3, 0, 0], [0, 4, 0, 0, 2, 0, 0, 0, 0, 6]
    assert busiest(torch.tensor([first])) == (0, 3, 7)
    assert busiest(torch.tensor([first, second])) == (0, 1, 3, 4, 7, 9)
    assert busiest(torch.tensor([[0, 1, 0], [0, 3, 0]])) == (1,), "an expert that no token is routed to is left out"


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_deltas_change_the_rows_of_their_experts(models: Any, family: str) -> None:
    """The same as the changed weights, in value; and each delta gets the gradient of the rows that share it."""
    model = loaded(models(family))
    block = mixtures(model)[-1].of_experts((1, 2))
    neurons = np.arange(0, block.neurons, 3)
    group = Clusters(block.layer, neurons, np.arange(len(neurons)) % 2, 2, None, "")
    deltas = DeltaSet([block], [group])
    (delta,) = deltas.modules
    torch.manual_seed(1)
    deltas.restore([0.3 * torch.randn_like(one) for one in deltas.snapshot()])
    args = inputs(model, mixtures(model)[-1], PROMPTS[0] + PROMPTS[3])
    stack = block.output.gate_up_proj
    merged = stack.detach().clone()
    merged.view(-1, stack.shape[-1])[delta.rows] += delta.delta.detach()[delta.cluster]
    merged.requires_grad_()
    found = delta(*args)
    assert not torch.allclose(found, block.output(*args), atol=1e-2)
    (gradient,) = torch.autograd.grad(found.square().sum(), delta.delta)
    block.output.gate_up_proj = torch.nn.Parameter(merged)
    wanted = block.output(*args)
    (whole,) = torch.autograd.grad(wanted.square().sum(), block.output.gate_up_proj)
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.detach().abs().max()))
    rows = whole.view(-1, whole.shape[-1])[delta.rows]
    sums = torch.zeros_like(gradient).index_add(0, delta.cluster, rows)
    assert float(sums.abs().max()) > 0
    assert torch.allclose(gradient, sums, atol=1e-4 * float(sums.abs().max()))
    delta.enabled = False
    assert torch.equal(delta(*args), block.output(*args))


def test_the_experts_come_back_after_an_exception(models: Any) -> None:
    block = mixtures(loaded(models("mixtral")))[0]
    with pytest.raises(MemoryError), computed_by(block, lambda *_: block.output.missing):
        raise MemoryError
    assert block.projections[0].linear is block.output
