"""Probe, selection, clusters, deltas and tuning, each on data where the right answer is known."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from nestpatch.errors import TrainingError, UnsupportedModelError
from nestpatch.nest_train._neurons import Selection, cluster, collect, require_neurons, select, standardise
from nestpatch.nest_train._targets import Halves
from nestpatch.nest_train._tune import ClusterDelta, DeltaSet, tune
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.text import TokenPair, pad_left
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import find_mlps


@pytest.fixture
def llama(models):
    return load_model(models("llama"), "cpu", "float32")


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_activations_are_the_maximum_over_the_prompts_own_tokens(llama, tmp_path, batch):
    model, tokenizer = llama
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 300) for _ in range(n)] for n in (5, 2, 9, 1, 7)]
    blocks = find_mlps(model)
    got = collect(model, blocks, prompts, tmp_path, Recipe(probe_batch=batch), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        hidden = model.model(torch.tensor([prompt]), output_hidden_states=True)
        mlp = model.model.layers[0].mlp
        # The first layer's block reads the normed sum of the embedding and the attention.
        layer = model.model.layers[0]
        x = hidden.hidden_states[0]
        positions = torch.arange(len(prompt))[None]
        attended, _ = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=model.model.rotary_emb(x, positions), attention_mask=None
        )
        y = layer.post_attention_layernorm(x + attended)
        acts = mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)
        if len(prompt) == 1:  # without a mask, attention over several tokens is not causal here
            assert np.allclose(got[0][row], acts.amax(1)[0].detach().numpy(), atol=1e-5)
    # Whatever the batch, so whatever the padding, the result is the same.
    alone = collect(model, blocks, prompts, tmp_path, Recipe(probe_batch=1), tokenizer.pad_token_id)
    for one, other in zip(got, alone, strict=True):
        assert np.allclose(one, other, atol=1e-5)
    assert [a.shape for a in got] == [(5, 64), (5, 64)]


def planted(prompts=300, neurons=120, seed=0):
    """Activations in which neurons 10, 11, 12 respond to harm, 40 and 41 to its absence, and the others to nothing."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(prompts) < prompts // 3
    acts = rng.normal(size=(prompts, neurons)).astype(np.float32)
    acts[:, [10, 11, 12]] += 2.5 * harmful[:, None]
    acts[:, [40, 41]] -= 2.5 * harmful[:, None]
    return acts, harmful


def test_selection_finds_the_planted_neurons_and_nothing_else():
    acts, harmful = planted()
    found = select(3, acts, harmful, Recipe(threshold=3.0))
    assert found.neurons.tolist() == [10, 11, 12, 40, 41]
    assert (found.z[:3] > 0).all()
    assert (found.z[3:] < 0).all()
    assert found.accuracy > 0.95
    assert found.layer == 3


def test_a_layer_that_knows_nothing_is_skipped():
    acts, harmful = planted()
    shuffled = np.random.default_rng(1).permutation(harmful)
    found = select(0, acts, shuffled, Recipe())
    assert len(found.neurons) == 0
    assert found.reason.startswith("skipped")
    with pytest.raises(TrainingError, match="layer 0: skipped"):
        require_neurons([found])


def test_standardising_leaves_constants_at_zero():
    acts = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, 4.0]], np.float32)
    assert standardise(acts).tolist() == [[-1, 0, -1], [1, 0, 1]]


def profiles(groups, seed=0, prompts=64, noise=0.05):
    """Activations of neurons that follow `groups` different courses over the prompts."""
    rng = np.random.default_rng(seed)
    courses = rng.normal(size=(max(groups) + 1, prompts))
    return np.stack([courses[g] * rng.uniform(0.5, 3) + noise * rng.normal(size=prompts) for g in groups], 1).astype(np.float32)


def chosen(neurons):
    return Selection(0, 1.0, 0.5, np.array(neurons, np.int64), np.ones(len(neurons), np.float32), "")


def test_clusters_are_the_planted_groups_whatever_their_scale():
    groups = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 3, 3]
    acts = profiles(groups)
    found = cluster(chosen(range(12)), acts, Recipe(k_min=2))
    assert found.k == 4
    assert found.labels.tolist() == groups
    assert found.silhouette > 0.9


def test_k_stays_within_its_bounds():
    acts = profiles([0, 1, 2, 3, 4, 5] * 4)
    assert cluster(chosen(range(24)), acts, Recipe(k_min=2, k_max=3)).k <= 3
    assert cluster(chosen(range(24)), acts, Recipe(k_min=7, k_max=7)).k == 7
    assert cluster(chosen(range(24)), acts, Recipe(k_min=1, k_max=1)).k == 1


@pytest.mark.parametrize("neurons", [[], [4], [4, 7]])
def test_few_neurons_make_one_cluster_or_none(neurons):
    found = cluster(chosen(neurons), profiles([0] * 10), Recipe())
    assert found.k == min(1, len(neurons))
    assert found.labels.tolist() == [0] * len(neurons)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_delta_is_the_dense_change_of_its_rows(parts):
    torch.manual_seed(0)
    base = nn.Linear(6, 8 * parts)
    rows = torch.tensor([1, 3, 4, 6])
    module = ClusterDelta(base, rows, torch.tensor([0, 1, 0, 1]), 2)
    x = torch.randn(2, 5, 6)
    assert torch.equal(module(x), base(x))
    with torch.no_grad():
        module.delta.normal_()
    dense = base.weight.detach().clone()
    for row, group in zip([1, 3, 4, 6], [0, 1, 0, 1], strict=True):
        dense[row] += module.delta[group].detach()
    assert torch.allclose(module(x), nn.functional.linear(x, dense, base.bias), atol=1e-5)
    module.enabled = False
    assert torch.equal(module(x), base(x))


def test_the_model_is_as_before_when_the_deltas_come_off(llama):
    model, _ = llama
    blocks = find_mlps(model)
    groups = [cluster(chosen([1, 2, 3, 5, 8]), profiles([0, 1] * 32), Recipe()) for _ in blocks]
    deltas = DeltaSet(blocks, groups)
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    names = [name for name, _ in model.named_modules()]
    with deltas.attached():
        deltas.restore([torch.ones_like(d) for d in deltas.snapshot()])
        assert not torch.allclose(model(ids).logits, before)
        with deltas.off():
            assert torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_modules()] == names


def trainable(model, recipe):
    blocks = find_mlps(model)
    groups = [cluster(chosen(range(0, 64, 2)), profiles([0, 1, 2, 3] * 16), recipe) for _ in blocks]
    return DeltaSet(blocks, groups)


def halves(tokenizer, count=24):
    end = tokenizer.eos_token_id
    harmful = [TokenPair((5, 6, 7, 20 + i), (9, 9, end)) for i in range(count)]
    benign = [TokenPair((5, 8, 7, 20 + i), (11, 12, 13, end)) for i in range(count)]
    return Halves(harmful, benign)


def test_tuning_lowers_the_held_out_loss_and_moves_nothing_but_deltas(llama):
    model, tokenizer = llama
    recipe = Recipe(steps=60, batch=8, eval_every=10, learning_rate=0.3, clip=100.0, kl_weight=0.0)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    deltas = trainable(model, recipe)
    result = tune(model, deltas, halves(tokenizer), 0, recipe)
    assert result.loss_after < 0.9 * result.loss_before
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(module.delta.abs().max() > 0 for module in deltas.modules)


def test_tuning_is_deterministic_and_depends_on_the_seed(llama):
    model, tokenizer = llama

    def run(seed):
        recipe = Recipe(steps=4, batch=4, eval_every=2, learning_rate=0.5, seed=seed)
        deltas = trainable(model, recipe)
        tune(model, deltas, halves(tokenizer), 0, recipe)
        return torch.cat([d.flatten() for d in deltas.snapshot()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_tuning_stops_early_and_keeps_the_best(llama):
    model, tokenizer = llama
    # A step size that cannot work: the loss explodes, so the start stays the best.
    recipe = Recipe(steps=200, batch=4, eval_every=1, patience=3, learning_rate=10.0, clip=1e6, warmup=0.0)
    deltas = trainable(model, recipe)
    result = tune(model, deltas, halves(tokenizer), 0, recipe)
    assert result.steps < 200
    assert "no better" in result.reason
    assert result.loss_after <= result.loss_before
    if result.best_step == 0:
        assert all((d == 0).all() for d in deltas.snapshot())


def test_the_scale_of_steps_follows_the_weights(llama):
    """Ten times larger weights take ten times larger steps."""
    model, _ = llama
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight.mul_(10)
    from nestpatch.nest_train._tune import _optimizer

    recipe = Recipe(learning_rate=0.05)
    groups = _optimizer(trainable(model, recipe), recipe).param_groups
    assert groups[2]["lr"] == pytest.approx(10 * groups[0]["lr"], rel=0.2)


@pytest.mark.parametrize(
    ("family", "projections", "parts"),
    [("llama", 2, 1), ("qwen2", 2, 1), ("phi3", 1, 2), ("gpt-neo", 1, 1), ("gpt-neox", 1, 1), ("opt", 1, 1), ("phi", 1, 1)],
)
def test_blocks_are_found_in_every_kind_of_family(models, family, projections, parts):
    model, _ = load_model(models(family), "cpu", "float32")
    blocks = find_mlps(model)
    assert [block.neurons for block in blocks] == [64, 64]
    assert all(len(block.projections) == projections for block in blocks)
    assert {p.parts for block in blocks for p in block.projections} == {parts}
    weights = dict(model.named_parameters())
    for block in blocks:
        for projection in block.projections:
            assert weights[projection.weight_name] is projection.linear.weight


def test_a_model_without_linear_blocks_is_named(models):
    model, _ = load_model(models("gpt2"), "cpu", "float32")
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel") as caught:
        find_mlps(model)
    assert "Linear" in caught.value.advice


def test_padding_does_not_change_what_a_prompt_reads(llama):
    model, _ = llama
    ids, mask = map(torch.from_numpy, pad_left([[4, 5, 6], [7]], 0))
    together = model(input_ids=ids, attention_mask=mask).logits[1, -1]
    alone = model(input_ids=torch.tensor([[7]])).logits[0, -1]
    assert torch.allclose(together, alone, atol=1e-5)
