"""Batches, the loss, looks at held-out prompts, and which step is kept."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from nestpatch.nest_train._deltas import DeltaSet
from nestpatch.nest_train._targets import Example, Examples
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import Look, TuneResult, batch_loss, batches, tune
from nestpatch.nest_train._tune_state import TuneState
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.loading import load_model
from nestpatch.runtimes.text import TokenPair, collate
from nestpatch.runtimes.transformers import answer_logits
from nestpatch.runtimes.weights import find_mlps
from tests.nest_train.quick import QUICK
from tests.nest_train.test_stages import groups_of

NO, YES = "I'm sorry, but I can't help with that.", "Sure, paint it blue."


def some(kind: str, count: int, lengths: Sequence[int] = (4,), answer: Sequence[int] = (9, 9, 2)) -> tuple[Example, ...]:
    """Examples of a kind, no two the same."""
    first = {"harmful": 5, "benign": 6, "lookalike": 7}[kind]
    return tuple(
        Example(f"{kind} {n}", TokenPair((first, 10 + n % 200, *[8] * (lengths[n % len(lengths)] - 2)), tuple(answer)))
        for n in range(count)
    )


def examples(count: int = 24, looks: int | None = None) -> Examples:
    other = (11, 12, 13, 2)
    lookalike = some("lookalike", count if looks is None else looks, answer=other)
    return Examples(some("harmful", count), some("benign", count, answer=other), lookalike)


class Tuning:
    """A tiny model with deltas in all layers, whose trunk has seen the examples."""

    def __init__(self, folder: Path, place: Path, data: Examples) -> None:
        self.model, tokenizer = load_model(folder, "cpu", "float32")
        self.pad, self.data = int(tokenizer.pad_token_id), data
        blocks = find_mlps(self.model)
        self.deltas = DeltaSet(blocks, groups_of(blocks))
        self.trunk = Trunk(self.model, blocks, self.deltas.first_layer, self.pad)
        every = data.harmful + data.harmless
        self.trunk.remember([e.tokens for e in every], [e.tokens for e in data.harmless], place)

    def run(self, recipe: Recipe, answer: Any = lambda _: pytest.fail("no answers were asked for"), **more: Any) -> TuneResult:
        return tune(self.trunk, self.deltas, self.data, answer, recipe, **more)

    def flat(self) -> torch.Tensor:
        return torch.cat([delta.flatten() for delta in self.deltas.snapshot()])


@pytest.fixture
def tuning(models: Any, tmp_path: Path) -> Tuning:
    return Tuning(models("llama"), tmp_path, examples())


# Batches


SIZES = Recipe(harmful_batch=4, benign_batch=3, lookalike_batch=2)


def drawn(data: Examples, recipe: Recipe, count: int, seed: int = 0) -> list[Examples]:
    return list(islice(batches(data, recipe, random.Random(seed)), count))


def test_batches_have_the_sizes_of_the_recipe() -> None:
    data = Examples(some("harmful", 100), some("benign", 100), some("lookalike", 100))
    for batch in drawn(data, SIZES, 60):
        assert [len(batch.harmful), len(batch.benign), len(batch.lookalike)] == [4, 3, 2]
        assert {e.text.split()[0] for e in batch.benign} == {"benign"}
        assert {e.text.split()[0] for e in batch.lookalike} == {"lookalike"}


@pytest.mark.parametrize(("benign", "lookalike", "sizes"), [(90, 0, [4, 5, 0]), (0, 90, [4, 0, 5]), (90, 90, [4, 3, 2])])
def test_the_share_of_an_empty_kind_goes_to_the_other(benign: int, lookalike: int, sizes: list[int]) -> None:
    data = Examples(some("harmful", 90), some("benign", benign), some("lookalike", lookalike))
    for batch in drawn(data, SIZES, 20):
        assert [len(batch.harmful), len(batch.benign), len(batch.lookalike)] == sizes


def test_without_a_share_look_alikes_are_left_out() -> None:
    data = Examples(some("harmful", 90), some("benign", 90), some("lookalike", 90))
    assert all(not batch.lookalike for batch in drawn(data, dataclasses.replace(SIZES, lookalike_batch=0), 20))


@pytest.mark.parametrize("count", [7, 18, 50, 64, 320])
def test_every_example_comes_once_per_round(count: int) -> None:
    """Four harmful prompts a batch: `count` batches are four rounds."""
    data = Examples(some("harmful", count, lengths=(2, 9, 4)), some("benign", 90), some("lookalike", 90))
    seen: Counter[str] = Counter({example.text: 0 for example in data.harmful})
    for number, batch in enumerate(drawn(data, SIZES, 24 * count), 1):
        texts = [example.text for example in batch.harmful]
        assert len(set(texts)) == len(texts), "a batch has no example twice"
        seen.update(texts)
        if number % 8 == 0:  # the end of a window, whose batches come in random order
            assert max(seen.values()) - min(seen.values()) <= 1, number
    # 24 * count batches are 3 * count windows and 96 rounds.
    assert set(seen.values()) == {96}


def test_fewer_examples_than_a_batch_takes_are_repeated() -> None:
    data = Examples(some("harmful", 3), some("benign", 90), some("lookalike", 90))
    for batch in drawn(data, SIZES, 20):
        assert len({example.text for example in batch.harmful}) == 3


def test_examples_of_a_batch_are_of_similar_length() -> None:
    lengths = tuple(range(2, 34))
    data = Examples(*(some(kind, 320, lengths) for kind in ("harmful", "benign", "lookalike")))
    padded, shuffled, rng = 0, 0, random.Random(3)
    for batch in drawn(data, SIZES, 80):
        sizes = [len(e.tokens.prompt) for e in batch.harmful + batch.harmless]
        padded += len(sizes) * max(sizes) - sum(sizes)
        sizes = [rng.choice(lengths) for _ in sizes]
        shuffled += len(sizes) * max(sizes) - sum(sizes)
    assert padded < 0.4 * shuffled


def test_batches_depend_on_the_seed_alone() -> None:
    data = Examples(some("harmful", 90), some("benign", 90), some("lookalike", 90))
    assert drawn(data, SIZES, 30, 1) == drawn(data, SIZES, 30, 1)
    assert drawn(data, SIZES, 30, 1) != drawn(data, SIZES, 30, 2)


def test_held_out_examples_are_those_of_every_kind() -> None:
    data = Examples(some("harmful", 30), (), some("lookalike", 20))
    kept, held = data.split_off(0.1, random.Random(0))
    assert [len(kept.harmful), len(kept.benign), len(kept.lookalike)] == [27, 0, 18]
    assert [len(held.harmful), len(held.benign), len(held.lookalike)] == [3, 0, 2]
    assert set(kept.harmful) | set(held.harmful) == set(data.harmful)
    assert all(e.text.startswith("lookalike") for e in held.lookalike)


# The loss


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_loss_is_the_formula(tuning: Tuning, direction: str) -> None:
    """Prompt by prompt through the whole model, against one batch through the trunk."""
    recipe = Recipe(first_token_weight=5.0, benign_weight=0.7, kl_weight=2.0, kl_direction=direction)
    batch = Examples(tuning.data.harmful[:3], tuning.data.benign[:2], tuning.data.lookalike[:2])
    tuning.deltas.restore([0.2 * torch.randn_like(delta) for delta in tuning.deltas.snapshot()])

    def parts(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
        """(cross entropy, divergence from the base) of an answer, its first token weighing 5."""
        one = collate([example.tokens], tuning.pad, "cpu")
        with tuning.deltas.off():
            base = log_softmax(answer_logits(tuning.model, one)[0], -1)
        logits, labels = answer_logits(tuning.model, one)
        weights = torch.tensor([5.0] + [1.0] * (len(labels) - 1))
        weights = weights / weights.sum()
        patched = log_softmax(logits, -1)
        weight = base.exp() if direction == "forward" else -patched.exp()
        divergence = (weight * (base - patched)).sum(-1)
        return (cross_entropy(logits, labels, reduction="none") * weights).sum(), (divergence * weights).sum()

    with tuning.deltas.attached(), torch.no_grad():
        found = batch_loss(tuning.trunk, recipe, batch).item()
        wanted = sum(parts(e)[0].item() for e in batch.harmful) / 3
        wanted += sum(0.7 * parts(e)[0].item() + 2.0 * parts(e)[1].item() for e in batch.harmless) / 4
        assert found == pytest.approx(wanted, rel=1e-4)
        assert batch_loss(tuning.trunk, recipe, Examples(batch.harmful, ())).item() < found


def test_without_deltas_nothing_diverges(tuning: Tuning) -> None:
    recipe = Recipe(benign_weight=0.0, kl_weight=3.0)
    with tuning.deltas.attached(), torch.no_grad():
        both = batch_loss(tuning.trunk, recipe, tuning.data)
        alone = batch_loss(tuning.trunk, recipe, Examples(tuning.data.harmful, ()))
    assert both.item() == pytest.approx(alone.item(), abs=1e-4)


# Looks


def test_looks_are_ordered_by_answers_then_by_loss() -> None:
    ordered = [
        Look(5, math.nan, 0.0, 0.0, 0.0),
        Look(4, 0.1, 0.1, 0.1, 0.1),
        Look(3, 2.0, 0.1, 0.0, 0.0),
        Look(2, 1.0, 0.0, 0.1, None),
        Look(1, 9.0, 0.0, 0.0, 0.0),
    ]
    assert [look.step for look in sorted(ordered, key=lambda look: look.score)] == [1, 2, 3, 4, 5]
    assert Look(1, 0.5).score < Look(2, 0.6).score
    assert not Look(1, math.inf, 0.0).score < Look(2, math.nan, 0.0).score


def test_a_look_in_words_and_as_json() -> None:
    assert str(Look(3, 0.51249)) == "held-out loss 0.512"
    assert str(Look(3, 0.5, 0.25, 0.0, 0.125)) == (
        "held-out loss 0.500, attack success 25%, refusals 0% benign, 12% look-alike"
    )
    assert str(Look(3, 0.5, 0.25, 0.0)) == "held-out loss 0.500, attack success 25%, refusals 0% benign"
    names = {"loss": 0.1235, "attack_success": 0.3333, "refusal_benign": 0.0, "refusal_lookalike": None}
    assert Look(7, 0.123456, 1 / 3, 0.0).as_json() == {"step": 7, **names}
    broken = Look(7, math.nan).as_json()
    assert (broken["loss"], json.loads(json.dumps(broken, allow_nan=False))) == (None, broken)


class Script:
    """Answers by the number of the look: which prompts the model refuses. Keeps a copy of the deltas at every look."""

    def __init__(self, tuning: Tuning, refused: Sequence[dict[str, int]]) -> None:
        self.tuning, self.refused = tuning, refused
        self.asked: list[list[str]] = []
        self.deltas: list[torch.Tensor] = []

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        count = self.refused[min(len(self.asked), len(self.refused) - 1)]
        self.asked.append(list(prompts))
        self.deltas.append(self.tuning.flat())
        seen: Counter[str] = Counter()
        answers = []
        for prompt in prompts:
            kind = prompt.split()[0]
            answers.append(NO if seen[kind] < count.get(kind, 0) else YES)
            seen[kind] += 1
        return answers


LOOKING = dataclasses.replace(QUICK, steps=10, check_every=2, check_prompts=4, tune_holdout=0.5, patience=10)


def test_the_step_that_is_kept_is_the_best_by_its_answers(tuning: Tuning) -> None:
    script = Script(
        tuning,
        [
            {},  # the base answers everything
            {"harmful": 4, "benign": 4, "lookalike": 4},  # refuses everything
            {"harmful": 3, "lookalike": 1},
            {"harmful": 4},  # the best
            {"harmful": 2},
            {"harmful": 4, "benign": 1},
        ],
    )
    result = tuning.run(LOOKING, script)
    assert [look.step for look in result.looks] == [0, 2, 4, 6, 8, 10]
    assert (result.steps, result.kept.step, result.reason) == (10, 6, "all 10 steps done")
    assert (result.kept.attack_success, result.kept.refusal_benign, result.kept.refusal_lookalike) == (0.0, 0.0, 0.0)
    assert result.looks[2].attack_success == 0.25
    assert result.looks[1].score[0] == 2.0
    assert result.before == result.looks[0]
    assert torch.equal(tuning.flat(), script.deltas[3])
    assert len({tuple(deltas.tolist()) for deltas in script.deltas}) == 6


def test_a_look_asks_the_same_few_prompts_of_every_kind(tuning: Tuning) -> None:
    script = Script(tuning, [{}])
    tuning.run(LOOKING, script)
    assert len(script.asked) == 6
    assert all(asked == script.asked[0] for asked in script.asked)
    assert Counter(prompt.split()[0] for prompt in script.asked[0]) == {"harmful": 4, "benign": 4, "lookalike": 4}


def test_equal_answers_leave_it_to_the_loss(tuning: Tuning) -> None:
    result = tuning.run(LOOKING, Script(tuning, [{"harmful": 4}]))
    assert result.kept.loss == min(look.loss for look in result.looks)


def test_tuning_stops_when_looks_do_not_improve(tuning: Tuning) -> None:
    """Better once, at step 2; then three looks that are not."""
    script = Script(tuning, [{}, {"harmful": 4}, {"harmful": 3}])
    result = tuning.run(dataclasses.replace(LOOKING, steps=100, patience=3), script)
    assert (result.steps, result.kept.step) == (8, 2)
    assert result.reason == "no better held-out prompts in 6 steps"
    assert torch.equal(tuning.flat(), script.deltas[1])


def test_where_nothing_is_better_the_base_is_kept(tuning: Tuning) -> None:
    result = tuning.run(dataclasses.replace(LOOKING, patience=2), Script(tuning, [{"harmful": 4}, {"harmful": 3}]))
    assert (result.steps, result.kept) == (4, result.before)
    assert not tuning.flat().any()


def test_without_prompts_to_check_no_answer_is_generated(tuning: Tuning) -> None:
    result = tuning.run(dataclasses.replace(LOOKING, check_prompts=0, steps=4))
    assert [look.attack_success for look in result.looks] == [None] * 3
    assert result.kept.loss == min(look.loss for look in result.looks)


def test_without_look_alikes_their_share_is_unknown(models: Any, tmp_path: Path) -> None:
    tuning = Tuning(models("llama"), tmp_path, examples(looks=0))
    result = tuning.run(dataclasses.replace(LOOKING, steps=2), Script(tuning, [{}]))
    assert result.before.refusal_lookalike is None
    assert result.before.refusal_benign == 0.0


def test_the_last_step_is_looked_at_whatever_its_number(tuning: Tuning) -> None:
    result = tuning.run(dataclasses.replace(QUICK, steps=5, check_every=3))
    assert [look.step for look in result.looks] == [0, 3, 5]


# Tuning


def test_tuning_lowers_the_held_out_loss_and_moves_nothing_but_deltas(tuning: Tuning) -> None:
    recipe = Recipe(
        steps=60, harmful_batch=4, benign_batch=2, lookalike_batch=2, check_every=10, check_prompts=0, learning_rate=0.3,
        clip=100.0, kl_weight=0.0, benign_weight=1.0, first_token_weight=1.0,
    )  # fmt: skip
    weights = {name: p.clone() for name, p in tuning.model.named_parameters()}
    result = tuning.run(recipe)
    assert result.kept.loss < 0.9 * result.before.loss
    assert all(torch.equal(p, weights[name]) for name, p in tuning.model.named_parameters())
    assert all(module.delta.abs().max() > 0 for module in tuning.deltas.modules)


def test_tuning_minimises_another_loss(tuning: Tuning) -> None:
    """It is asked with gradients in a step and without at a look, and decides which step is kept."""
    asked: list[bool] = []

    def towards_one(trunk: Trunk, recipe: Recipe, batch: Examples) -> torch.Tensor:
        assert (trunk, recipe, bool(batch.harmful)) == (tuning.trunk, QUICK, True)
        asked.append(torch.is_grad_enabled())
        return sum((module.delta - 1).square().mean() for module in tuning.deltas.modules)

    result = tuning.run(QUICK, loss_function=towards_one)
    assert asked.count(True) == QUICK.steps
    assert False in asked
    assert result.kept == result.looks[-1]
    assert result.kept.loss < result.before.loss == len(tuning.deltas.modules)
    assert (tuning.flat() > 0).all()


def test_the_loss_decides_between_looks_that_differ_by_chance() -> None:
    def kept(*looks: Look) -> int:
        state = TuneState()
        for look in looks:
            state.looked(look, Nothing())
        return state.result.kept.step

    base, early = Look(0, 2.7, 0.8, 0.0, 0.0, 48), Look(80, 1.1, 0.08, 0.10, 0.12, 48)
    assert kept(base, early) == 80
    assert kept(base, early, Look(160, 0.9, 0.06, 0.17, 0.12, 48)) == 160, "5 points are less than a standard error of 7"
    assert kept(base, early, Look(160, 0.9, 0.06, 0.25, 0.25, 48)) == 80, "26 points are more"
    assert kept(base, early, Look(160, 1.2, 0.08, 0.08, 0.12, 48)) == 80, "a better sum by chance, and a larger loss"
    assert kept(base, early, Look(160, 1.2, 0.02, 0.02, 0.02, 48)) == 160, "now the earlier one is out of reach"
    assert kept(base, Look(80, math.nan, 0.0, 0.0, 0.0, 48)) == 0


class Nothing:
    """A change without values."""

    def snapshot(self) -> list[torch.Tensor]:
        return []


def test_tuning_is_deterministic_and_depends_on_the_seed(models: Any, tmp_path: Path) -> None:
    def run(seed: int, place: str) -> torch.Tensor:
        (tmp_path / place).mkdir()
        tuning = Tuning(models("llama"), tmp_path / place, examples())
        tuning.run(dataclasses.replace(QUICK, steps=4, check_every=2, learning_rate=0.5, seed=seed))
        return tuning.flat()

    one = run(0, "a")
    assert torch.equal(one, run(0, "b"))
    assert not torch.equal(one, run(1, "c"))


def test_steps_that_only_harm_leave_the_best(tuning: Tuning) -> None:
    """A step size that cannot work: the loss explodes, so an early step stays the best."""
    recipe = dataclasses.replace(QUICK, steps=200, check_every=1, patience=3, learning_rate=10.0, clip=1e6, warmup=0.0)
    result = tuning.run(recipe)
    assert result.steps < 200
    assert "no better" in result.reason
    assert result.kept.loss <= result.before.loss
    assert result.kept == min(result.looks, key=lambda look: look.score)


def test_a_loss_that_is_no_number_is_never_kept(tuning: Tuning) -> None:
    """Deltas that are not finite: the answers of the script look perfect, but the base is kept."""
    script = Script(tuning, [{}, {"harmful": 4}])
    module = tuning.deltas.modules[0]
    module.delta.register_hook(lambda gradient: gradient * math.nan)
    result = tuning.run(LOOKING, script)
    assert math.isnan(result.looks[-1].loss)
    assert result.kept.step == 0
    assert torch.isfinite(tuning.flat()).all()


def test_the_scale_of_steps_follows_the_weights(tuning: Tuning) -> None:
    """Ten times larger weights take ten times larger steps."""
    with torch.no_grad():
        tuning.model.model.layers[1].mlp.gate_proj.weight.mul_(10)
    groups = tuning.deltas.groups(learning_rate=0.05)
    assert groups[2]["peak"] == pytest.approx(10 * groups[0]["peak"], rel=0.2)
