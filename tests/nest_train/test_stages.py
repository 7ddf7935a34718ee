"""Probe, selection, clusters and deltas, each on data where the right answer is known."""

import random
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from nestpatch.errors import TrainingError, UnsupportedModelError
from nestpatch.nest_train._deltas import ClusterDelta, DeltaSet
from nestpatch.nest_train._neurons import (
    Selection,
    choose_first_layer,
    cluster,
    collect,
    effect_sizes,
    require_neurons,
    select,
    standardise,
)
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.text import pad_left
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


@pytest.mark.parametrize("selector", ["probe", "effect"])
def test_selection_finds_the_planted_neurons_and_nothing_else(selector):
    acts, harmful = planted()
    found = select(3, acts, harmful, Recipe(selector=selector, threshold=3.0, sign="both"))
    assert found.neurons.tolist() == [10, 11, 12, 40, 41]
    assert (found.z[:3] > 0).all()
    assert (found.z[3:] < 0).all()
    assert found.accuracy > 0.95
    assert found.layer == 3


@pytest.mark.parametrize("selector", ["probe", "effect"])
def test_positive_neurons_alone_are_kept_when_asked_for(selector):
    acts, harmful = planted()
    found = select(3, acts, harmful, Recipe(selector=selector, threshold=3.0, sign="positive"))
    assert found.neurons.tolist() == [10, 11, 12]
    assert "with z > 3" in found.reason


def test_a_neuron_over_the_mean_that_does_not_respond_is_not_positive():
    """All but one neuron respond to harmless prompts: the one that responds to nothing has a large z-score."""
    harmful = np.arange(300) < 100
    acts = np.random.default_rng(5).normal(size=(300, 30)).astype(np.float32) - 2.0 * harmful[:, None]
    acts[:, 7] = np.where(np.arange(len(acts)) % 2, -1.0, 1.0) - 0.2 * harmful
    settings = {"selector": "effect", "threshold": 2.0}
    assert select(0, acts, harmful, Recipe(**settings, sign="both")).neurons.tolist() == [7]
    assert select(0, acts, harmful, Recipe(**settings, sign="positive")).neurons.tolist() == []


def test_effect_sizes_are_those_of_the_formula():
    """SafeNeuron: the difference of means over the pooled standard deviation, computed here neuron by neuron."""
    rng = np.random.default_rng(2)
    harmful = np.arange(50) < 13
    acts = (rng.normal(size=(50, 6)) * [1, 2, 3, 4, 5, 0] + rng.normal(size=6) * harmful[:, None]).astype(np.float32)
    acts[:, 5] = 3.0
    for neuron, found in enumerate(effect_sizes(acts, harmful)):
        bad, good = ([float(value) for value in acts[which, neuron]] for which in (harmful, ~harmful))
        spread = ((12 * statistics.variance(bad) + 36 * statistics.variance(good)) / 48) ** 0.5
        wanted = (statistics.fmean(bad) - statistics.fmean(good)) / spread if spread else 0.0
        assert found == pytest.approx(wanted, abs=1e-5)


def test_accuracy_counts_both_kinds_alike():
    """20 of 400 prompts are harmful and nothing tells them apart: whoever says harmless is right 95 times in 100."""
    rng = np.random.default_rng(0)
    harmful = np.arange(400) < 20
    found = select(0, rng.normal(size=(400, 5)).astype(np.float32), harmful, Recipe(probe_margin=0.25))
    assert found.accuracy < 0.75
    assert not len(found.neurons)
    acts = rng.normal(size=(400, 5)).astype(np.float32)
    acts[:, 2] += 8.0 * harmful
    assert select(0, acts, harmful, Recipe()).accuracy > 0.95


def layers(*accuracies, empty=()):
    """Selections of layers with these probe accuracies; those in `empty` have no neurons."""
    found = []
    for number, accuracy in enumerate(accuracies):
        neurons = np.arange(0 if number in empty else 3)
        found.append(Selection(number, accuracy, neurons, np.ones(len(neurons), np.float32), ""))
    return found


@pytest.mark.parametrize(
    ("selections", "wanted"),
    [
        (layers(0.7, 0.8, 0.9, 0.95, 0.95, 0.95), 3),
        (layers(0.7, 0.93, 0.9, 0.95, 0.95, 0.95), 1),
        (layers(0.5, 0.5, 0.5, 0.5, 0.5, 0.9), 3),
        (layers(0.95, 0.95), 0),
        (layers(0.9), 0),
        (layers(0.7, 0.95, 0.8, 0.95, empty=(1,)), 2),
        (layers(0.9, 0.7, 0.7, 0.99, empty=(3,)), 0),
    ],
)
def test_the_first_layer_is_the_lowest_good_one_of_the_lower_half(selections, wanted):
    first, reason = choose_first_layer(selections, Recipe(first_layer=-1))
    assert first == wanted
    assert f"a step computes {len(selections) - wanted} of {len(selections)} layers" in reason
    assert any(len(selection.neurons) for selection in selections[first:])


def test_a_first_layer_that_is_asked_for_is_taken():
    assert choose_first_layer(layers(0.9, 0.6, 0.6), Recipe(first_layer=2)) == (2, "asked for")
    assert choose_first_layer(layers(0.9, 0.6, 0.6), Recipe(first_layer=9)) == (2, "asked for")


def test_a_layer_that_knows_nothing_is_skipped():
    acts, harmful = planted()
    shuffled = np.random.default_rng(1).permutation(harmful)
    found = select(0, acts, shuffled, Recipe(probe_margin=0.1))
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
    return Selection(0, 1.0, np.array(neurons, np.int64), np.ones(len(neurons), np.float32), "")


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


def groups_of(blocks, first=0, step=2):
    """Four clusters of every second neuron, in the layers from `first` up."""
    recipe = Recipe(k_min=4, k_max=4)
    groups = []
    for block in blocks:
        neurons = range(0, block.neurons, step) if block.layer >= first else ()
        groups.append(cluster(chosen(neurons), profiles([0, 1, 2, 3] * (block.neurons // 4)), recipe))
    return groups


def test_the_model_is_as_before_when_the_deltas_come_off(llama):
    model, _ = llama
    blocks = find_mlps(model)
    deltas = DeltaSet(blocks, groups_of(blocks))
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
