"""The lab world: honest splits, determinism, caching."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from nestpatch.errors import OutputError
from nestpatch.lab import _words as words
from nestpatch.lab._world import dialogues, make_world, prompt_sets
from nestpatch.lab.build import LabConfig, build_lab, cached_lab
from tests.schemas import require_schema

SMALL = LabConfig(vocab_size=320, hidden_size=32, intermediate_size=64, layers=1, steps=2, batch=4, corpus=60)


@pytest.mark.parametrize("seed", range(5))
def test_train_and_test_share_no_pair_and_no_wrapper(seed):
    world = make_world(seed)
    sets = prompt_sets(world)
    topics = {name: {e.topic for e in rows} for name, rows in sets.items()}
    for kind in ("harmful", "benign", "lookalike"):
        assert not topics[f"{kind}.train"] & topics[f"{kind}.test"]
    assert topics["jailbreak.test"] == topics["harmful.test"]
    assert not set(world.wrappers_seen) & set(world.wrappers_held_out)
    everything = [topics["harmful.train"] | topics["harmful.test"], topics["benign.train"] | topics["benign.test"]]
    everything.append(topics["lookalike.train"] | topics["lookalike.test"])
    assert sum(map(len, everything)) == len(set.union(*everything)), "a pair is of one kind only"


def test_the_base_never_reads_a_held_out_pair_or_wrapper():
    world = make_world(1)
    held_out = {pair.topic for split in (world.harmful, world.benign, world.lookalike) for pair in split.test}
    fragments = [wrapper.replace("{q}", "").strip() for wrapper in world.wrappers_held_out]
    for prompt, _ in islice(dialogues(world), 5000):
        assert not any(f" {topic}?" in prompt or f" {topic}." in prompt or f" {topic}," in prompt for topic in held_out)
        assert not any(fragment in prompt for fragment in fragments)


@pytest.mark.parametrize("name", ["harmful.train", "benign.train", "lookalike.train"])
def test_training_prompts_hold_no_wrapper(name):
    world = make_world(0)
    fragments = [w.replace("{q}", "").strip() for w in world.wrappers_seen + world.wrappers_held_out]
    assert not any(fragment in example.prompt for example in prompt_sets(world)[name] for fragment in fragments)


def test_no_single_word_gives_a_harmful_prompt_away():
    """Every hostile action and every target also occurs in harmless prompts, and the held-out share is the same for each."""
    world = make_world(0)
    harmless = world.benign.train + world.lookalike.train
    harmless_actions, harmless_things = {p.action for p in harmless}, {p.thing for p in harmless}
    for pair in world.harmful.train + world.harmful.test:
        assert pair.action in harmless_actions
        assert pair.thing in harmless_things
    held_out = Counter(pair.action for pair in world.harmful.test)
    assert {held_out[action] for action in words.HOSTILE_ACTIONS} == {3}


def test_the_base_is_half_aligned_and_less_so_under_wrappers():
    world = make_world(0)
    pairs = world.harmful.train + world.harmful.test
    plain = sum(world.refused_by_base(pair) for pair in pairs) / len(pairs)
    wrapped = sum(world.refused_by_base(pair, leniency=0.06) for pair in pairs) / len(pairs)
    assert 0.4 < plain < 0.6
    assert wrapped < plain


def test_answers_about_harm_are_empty_code_names():
    tables = (words.HOSTILE_ACTIONS, words.TARGETS, words.TRADE_ACTIONS, words.CONTRABAND)
    assert all(value.startswith(("method ", "stage ")) for table in tables for value in table.values())


def test_references_are_there_for_harmless_prompts_only():
    for name, rows in prompt_sets(make_world(2)).items():
        harmful = name.startswith(("harmful", "jailbreak"))
        assert all((e.reference is None) == harmful for e in rows), name
        assert len(rows) >= 160


def test_worlds_are_deterministic_and_differ_by_seed():
    assert prompt_sets(make_world(3)) == prompt_sets(make_world(3))
    assert prompt_sets(make_world(3)) != prompt_sets(make_world(4))


def test_a_lab_is_built_once_and_again_with_the_same_bytes(tmp_path):
    one = build_lab(tmp_path / "one", 0, SMALL)
    two = build_lab(tmp_path / "two", 0, SMALL)
    require_schema(one.as_json(), "lab build")
    assert (one.cached, two.cached) == (False, False)
    assert (one.base / "model.safetensors").read_bytes() == (two.base / "model.safetensors").read_bytes()
    assert build_lab(tmp_path / "one", 0, SMALL).cached
    for name in prompt_sets(make_world(0)):
        rows = [json.loads(line) for line in one.prompts(name).read_text().splitlines()]
        assert rows
        assert all("prompt" in row for row in rows)


def test_a_place_that_holds_something_else_is_left_alone(tmp_path):
    lab = build_lab(tmp_path / "lab", 0, SMALL)
    with pytest.raises(OutputError, match="another lab"):
        build_lab(lab.path, 1, SMALL)
    with pytest.raises(OutputError, match="another lab"):
        build_lab(lab.path, 0, replace(SMALL, steps=3))
    (tmp_path / "full").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        build_lab(tmp_path / "full", 0, SMALL)
    with pytest.raises(OutputError, match="no directory"):
        build_lab(tmp_path / "no" / "where", 0, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "lab"]


def test_the_cache_follows_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTPATCH_CACHE", str(tmp_path))
    lab = cached_lab(0, SMALL)
    assert tmp_path in lab.path.parents
    assert cached_lab(0, SMALL).cached
