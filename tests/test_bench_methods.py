"""The methods of bench.efficacy on a tiny random model, and what becomes of their rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench import efficacy, frontier
from bench._base import Clock
from bench.methods import METHODS, Scene
from bench.methods.redundant import switched_off
from nestpatch.lab._world import dialogues, make_world, prompt_sets
from nestpatch.lab.build import train_tokenizer
from nestpatch.nest_train._fit import fit
from nestpatch.nest_train._trunk import Trunk
from nestpatch.nest_train._tune import batch_loss
from nestpatch.nest_train.data import TrainingData
from nestpatch.prompts.readers import Prompt, PromptSet
from nestpatch.runtimes.text import collate
from tests.nest_train.conftest import SIZES, VOCABULARY
from tests.nest_train.quick import QUICK

NEURONS = 512

RECIPE = dataclasses.replace(
    QUICK,
    steps=10,
    check_every=5,
    max_prompts=40,
    harmful_batch=4,
    benign_batch=2,
    lookalike_batch=2,
    sign="positive",
    k_min=3,
    k_max=3,
    learning_rate=0.02,
    seed=1,
)

RECIPE_WITHOUT_KL = dataclasses.replace(RECIPE, kl_weight=0.0, benign_weight=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose layers have enough neurons for every threshold."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=32, intermediate_size=NEURONS, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    said = [f"{prompt} {answer}" for prompt, answer in islice(dialogues(make_world(0)), 400)]
    train_tokenizer(said, VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scene(model: Path) -> Iterator[Scene]:
    sets = prompt_sets(make_world(0))
    kinds = [sets[f"{kind}.train"][:60] for kind in ("harmful", "benign", "lookalike")]
    data = TrainingData(*(PromptSet("x", tuple(Prompt(one.prompt, one.reference) for one in kind)) for kind in kinds))
    scene = Scene.start(str(model), RECIPE, data, Clock())
    weights = {name: value.clone() for name, value in scene.run.model.state_dict().items()}
    yield scene
    after = scene.run.model.state_dict()
    assert after.keys() == weights.keys(), "every method takes its modules away again"
    assert all(torch.equal(after[name], value) for name, value in weights.items())


@torch.no_grad()
def says(scene: Scene) -> torch.Tensor:
    ids, mask, _ = collate([example.tokens for example in scene.examples.harmful[:8]], scene.run.pad, "cpu")
    return scene.run.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_lowers_its_loss_and_leaves_the_base_alone(scene: Scene, name: str) -> None:
    base = says(scene)
    own, attempt = METHODS[name].prepare(scene)
    change = attempt.change
    assert torch.equal(says(scene), base)
    start = change.snapshot()
    result = fit(own.run, own.blocks, change, attempt.examples, loss_function=attempt.loss)
    assert result.steps == own.run.recipe.steps
    assert result.kept.loss < result.before.loss
    assert not any(weight.requires_grad for weight in scene.run.model.parameters())
    assert torch.equal(says(scene), base)
    trained = change.snapshot()
    assert len(trained) == len(start)
    assert sum(value.numel() for value in trained) == change.trainable
    assert all(not torch.equal(new, old) for new, old in zip(trained, start, strict=True) if old.numel() > 1)
    with change.attached():
        whole = says(scene)
        with change.off():
            assert torch.equal(says(scene), base)
        assert torch.equal(says(scene), whole)
    change.restore(change.scaled(trained, 0.5))
    with change.attached():
        half = says(scene)
    change.restore(change.scaled(trained, 1.0))
    with change.attached():
        assert torch.equal(says(scene), whole), "strength 1 is what was trained"
    assert 0 < (half - base).norm() < (whole - base).norm()


def test_ablations_differ_from_nest_in_what_they_say(scene: Scene) -> None:
    made = {name: METHODS[name].prepare(scene) for name in METHODS}
    kept = {name: [list(c.neurons) for _, c in one.layers] for name, (_, one) in made.items() if one.layers}
    assert [len(layer) for layer in kept["random"]] == [len(layer) for layer in kept["nest"]]
    assert kept["random"] != kept["nest"]
    assert kept["per-layer"] == kept["per-neuron"] == kept["ema"] == kept["null-space"] == kept["nest"]
    assert len({str(kept[name]) for name in ("nest", "effect", "safeneuron", "no-lookalikes")}) == 4
    sizes = {name: sum(map(len, layers)) for name, layers in kept.items()}
    assert sizes["threshold-0.7"] > sizes["threshold-2"] > sizes["threshold-3"] > 0
    assert all(sizes[f"threshold-{z}-both"] > sizes[f"threshold-{z}"] for z in ("0.7", "2", "3"))
    trained = {name: one.change.trainable for name, (_, one) in made.items()}
    layers = sum(bool(layer) for layer in kept["nest"])
    assert trained["per-layer"] == 2 * 32 * layers
    assert trained["per-neuron"] == 2 * 32 * sizes["nest"]
    assert trained["full"] == sum(weight.numel() for weight in scene.decoder.parameters())
    assert trained["lora-gate-up"] == 3 * 2 * 8 * (32 + NEURONS)
    assert trained["lora-all"] == 3 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + NEURONS))
    assert not made["no-lookalikes"][1].examples.lookalike


def test_a_projected_delta_does_little_to_benign_inputs(scene: Scene) -> None:
    from bench.methods.nullspace import covariances, projector

    covariance = covariances(scene, scene.blocks[1:2])[1]
    onto = projector(covariance).double()
    torch.testing.assert_close(onto @ onto, onto, atol=1e-5, rtol=0)
    assert 1 <= round(onto.trace().item()) < 32
    assert (onto @ covariance @ onto).trace() <= 0.0101 * covariance.trace()


def test_neurons_are_switched_off_and_on_again(scene: Scene) -> None:
    base, blocks = says(scene), scene.blocks
    inputs: list[torch.Tensor] = []
    neurons = [np.array([3, 7]), np.array([], np.int64), np.array([500])]
    with switched_off(blocks, neurons) as on:
        handle = blocks[0].output.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        without = says(scene)
        with on():
            assert torch.equal(says(scene), base)
        assert torch.equal(says(scene), without)
        handle.remove()
    assert not torch.equal(without, base)
    assert (inputs[0][..., [3, 7]] == 0).all()
    assert (inputs[0][..., [2, 8]] != 0).any()
    assert (inputs[1][..., [3, 7]] != 0).any()
    assert torch.equal(says(scene), base)


def test_the_second_set_lowers_the_loss_without_it(scene: Scene) -> None:
    own, made = METHODS["redundant"].prepare(scene)
    for first, (both, _), (alone, _) in zip(made.first, made.layers, scene.layers(), strict=True):
        assert set(first) == set(alone.neurons) < set(both.neurons)
        assert 1.5 * len(first) < len(both.neurons) <= 2 * len(first), "as many more as have a positive score"
    fit(own.run, own.blocks, made.change, made.examples, loss_function=made.loss)
    trunk = Trunk(own.run.model, own.blocks, 0, own.run.pad)
    with torch.no_grad(), switched_off(own.blocks, made.first):
        before = batch_loss(trunk, RECIPE_WITHOUT_KL, made.examples)
        with made.change.attached():
            assert batch_loss(trunk, RECIPE_WITHOUT_KL, made.examples) < before


def test_breakers_keep_what_the_base_refuses(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harmful prompt that is refused has no part in the similarity, which is the loss of held-out prompts."""
    monkeypatch.setattr("bench.methods.breakers.is_refusal", lambda _: True)
    own, attempt = METHODS["circuit-breakers"].prepare(scene)
    with torch.no_grad():
        assert attempt.loss(None, own.run.recipe, attempt.examples).item() == 0


def options(model: Path, folder: Path) -> list[str]:
    (folder / "text").write_text("Some prose that is to be predicted.")
    made = [
        "--seeds",
        "0",
        "--set",
        "steps=2",
        "--set",
        "threshold=0.8",
        "--set",
        "probe_margin=0.0",
        "--set",
        "check_prompts=1",
    ]
    made += ["--max-prompts", "60", "--limit", "3", "--text", str(folder / "text"), "--packs", str(folder / "packs")]
    return [str(model), *made, "--output", str(folder / "rows.jsonl"), "--tag", "t", "--switch-off", "--round-to", "q8_0"]


def test_a_run_is_continued_and_becomes_tables(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    efficacy.main([*options(model, tmp_path), "--method", "nest", "lora", "--strengths", "1"])
    output = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["base", "nest", "lora"]
    assert rows[1]["bytes"] == (tmp_path / "packs" / "nest-0.nest").stat().st_size
    assert rows[2]["bytes"] == 2 * rows[2]["trained"]
    for row in rows[1:]:
        assert {"remember", "tune", "look"} <= row["seconds"].keys()
        assert row["tokens"] > 0 < row["tokens_per_second"]
        assert row["peak_mb"] > 100
        assert [len(suite["verdicts"]) for suite in row["suites"].values()] == [3] * 4
        assert (row["attack_plain"]["total"], row["attack_wrapped"]["total"], row["benign_correct"]) == (3, 3, None)
    # A run that was killed while it wrote the last row.
    output.write_text(output.read_text()[:-100])
    capsys.readouterr()
    efficacy.main([*options(model, tmp_path), "--method", "nest", "lora", "--strengths", "1", "0.5"])
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert again[:2] == rows[:2]
    assert [(row["method"], row["strength"]) for row in again[2:]] == [("nest", 0.5), ("lora", 1.0), ("lora", 0.5)]
    assert [again[3][name] for name in ("suites", "kl", "settings")] == [rows[2][name] for name in ("suites", "kl", "settings")]
    efficacy.main([*options(model, tmp_path), "--method", "lora", "--strengths", "1", "0.5"])
    assert "done already" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 5
    frontier.main([str(output), "--tag", "t"])
    tables = capsys.readouterr().out
    assert "[p 1]" in tables
    assert "| t | lora | 60 | 1.0 | 1 |" in tables
    assert "| t | base of nest | 60 | 1.0 | 1 |" in tables
    assert rows[1]["switched_off"]["attack_plain"]["total"] == 3
    assert "switched_off" not in rows[2], "LoRA selects no neurons"


def answers(method: str, seed: int, verdicts: str) -> dict:
    suite = {"kind": "harmful", "wrapped": False, "sha256": "0", "verdicts": verdicts}
    return {"method": method, "seed": seed, "suites": {"harmful.test": suite}}


def test_the_p_value_of_one_seed_is_mcnemars() -> None:
    ours, theirs = answers("lora", 0, "r" * 6 + "a" * 6), answers("nest", 0, "r" * 6 + "rrrrr" + "a")
    # 5 prompts differ, all one way: 2 * 0.5 ** 5.
    assert frontier.p_value([ours], [theirs], "attack_plain") == pytest.approx(0.0625)
    assert frontier.p_value([ours], [ours], "attack_plain") == 1
    assert frontier.p_value([ours], [theirs], "attack_wrapped") is None
    assert frontier.p_value([ours], [answers("nest", 1, "r" * 12)], "attack_plain") is None


def test_seeds_are_no_more_prompts() -> None:
    one = [answers("lora", 0, "aaaaar")], [answers("nest", 0, "rrrrrr")]
    two = [answers("lora", seed, "aaaaar") for seed in (0, 1)], [answers("nest", seed, "rrrrrr") for seed in (0, 1)]
    assert frontier.p_value(*one, "attack_plain") == frontier.p_value(*two, "attack_plain")
