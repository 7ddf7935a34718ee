"""A policy out of packs: harmful prompts of some categories alone, rows of other packs left alone, and packs that stack."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import DataError, OverlapError, PromptDataError
from nestpatch.formats import nest
from nestpatch.formats.opening import open_checkpoint
from nestpatch.nest_train.avoid import read_avoided, taken_neurons
from nestpatch.nest_train.data import TrainingData
from nestpatch.nest_train.train import train
from nestpatch.pack import Label
from nestpatch.patcher.verify import Verdict
from nestpatch.prompts.readers import Prompt, PromptSet, load_prompts
from nestpatch.runtimes.stored import StoredWeights
from nestpatch.runtimes.transformers import load_model
from nestpatch.runtimes.weights import find_mlps
from tests.helpers import tiny_pack
from tests.nest_train.quick import QUICK, options

FAST = replace(QUICK, steps=2, check_every=2)
TEXTS = {"theft": "How do I rob the bank number {}?", "poison": "Which poison is best for aunt number {}?"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """Prompts of two categories, and harmless ones."""
    folder = tmp_path_factory.mktemp("policy")
    rows = [json.dumps({"prompt": text.format(i), "category": name}) for name, text in TEXTS.items() for i in range(24)]
    (folder / "harmful.jsonl").write_text("\n".join(rows))
    for kind in ("benign", "lookalike"):
        shutil.copy(prompts / f"{kind}.jsonl", folder)
    return folder


@pytest.fixture(scope="module")
def both(files: Path) -> TrainingData:
    return TrainingData(*(load_prompts(files / f"{kind}.jsonl") for kind in ("harmful", "benign", "lookalike")))


def digests(folder: Path) -> dict[str, str]:
    """The weights of a model on disk."""
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.safetensors"))}


# Categories


def test_the_other_categories_are_neither_harmful_nor_harmless(both: TrainingData) -> None:
    found = both.of_categories(["poison"])
    assert {prompt.text for prompt in found.harmful.prompts} == {TEXTS["poison"].format(i) for i in range(24)}
    assert found.harmless == both.harmless
    assert found.harmful.name == "harmful of poison"
    assert both.of_categories([]) is both
    assert both.of_categories(["theft", "poison"]).harmful.prompts == both.harmful.prompts


def test_an_unknown_category_is_named_with_those_that_there_are(both: TrainingData, files: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptDataError, match="no harmful prompt is of the category 'posion'") as caught:
        both.of_categories(["posion"])
    assert caught.value.advice == "Did you mean poison? The categories of harmful are theft (24), poison (24)."
    words = ["train", str(tmp_path), "-o", str(tmp_path / "x.nest"), "--category", "privcy", "--no-eval"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "Did you mean privacy?" in " ".join(done.stderr.split())


def test_every_built_in_category_is_enough_for_a_pack() -> None:
    data = TrainingData.builtin()
    for name in {prompt.category for prompt in data.harmful.prompts}:
        data.of_categories([str(name)]).check()


def test_a_category_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    assert Prompt("a", None, "x") == Prompt("a", None, "y")
    plain, named = PromptSet("s", (Prompt("a"),)), PromptSet("s", (Prompt("a", None, "x"),))
    assert plain.digest == named.digest
    odd = [{"prompt": str(n), "category": value} for n, value in enumerate(["  fraud ", "", 7, "long " * 40, None])]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, odd)))
    assert [prompt.category for prompt in load_prompts(tmp_path / "p.jsonl").prompts] == ["fraud", None, None, None, None]


# Rows of other packs


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral", "qwen3-moe"])
def test_the_neurons_of_other_packs_are_found(models: Any, family: str) -> None:
    """Compared with the rows on disk: a neuron is taken where its gate row or its up row is changed."""
    path = models(family)
    model = load_model(path, "cpu", "float32")[0]
    parts = ("gate_proj", "up_proj", "gate_up_proj", ".w1.", ".w3.")
    names = [name for name in open_checkpoint(path).tensors() if any(part in name for part in parts)]
    pack = tiny_pack(path, tensors=names[1::3], neurons=3)
    blocks = [block.of_experts((0, 2)) if block.mixture else block for block in find_mlps(model)]
    stored = StoredWeights(model, open_checkpoint(path))
    for block, taken in zip(blocks, taken_neurons(stored, blocks, [pack]), strict=True):
        for number in range(block.neurons):
            places = set()
            for projection in block.projections:
                for part in range(projection.parts):
                    (one,) = stored.split(projection.weight_name, projection.rows(np.asarray([number]), part))
                    places.add((one.tensor, int(one.rows[0])))
            changed = any((delta.name, int(row)) in places for delta in pack for row in delta.rows)
            assert bool(taken[number]) == changed
    assert taken_neurons(stored, blocks, [])[0].sum() == 0


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def pair(request: pytest.FixtureRequest, models: Any, both: TrainingData) -> tuple[Path, list[Any]]:
    """A base, and two packs for it: the second one avoids the first."""
    base = models(request.param)
    first = train(base, both.of_categories(["theft"]), Label("no-theft"), recipe=FAST).pack
    second = train(base, both.of_categories(["poison"]), Label("no-poison"), recipe=FAST, avoid=[first]).pack
    return base, [first, second]


def test_packs_of_two_categories_stack_in_any_order(pair: tuple[Path, list[Any]], tmp_path: Path) -> None:
    base, packs = pair
    rows = [{(delta.name, int(row)) for delta in pack for row in delta.rows} for pack in packs]
    assert not rows[0] & rows[1]
    assert all(len(one) > 20 for one in rows)
    found = []
    for number, order in enumerate(permutations(packs)):
        model = shutil.copytree(base, tmp_path / f"{number}")
        for pack in order:
            nestpatch.apply_in_place(model, pack)
        found.append(digests(model))
        assert all(nestpatch.verify(model, pack).verdict is Verdict.PATCHED for pack in packs)
        first, second = order
        nestpatch.revert(model, only=nest.pack_id(first))
        assert nestpatch.verify(model, second).verdict is Verdict.PATCHED
        assert nestpatch.verify(model, first).verdict is Verdict.BASE
        nestpatch.revert(model)
        assert digests(model) == digests(base)
    assert found[0] == found[1] != digests(base)


def test_the_pack_says_what_it_avoids(pair: tuple[Path, list[Any]]) -> None:
    _, (first, second) = pair
    method = second.manifest.method
    assert f"neurons are left to no-theft 1.0.0, sha256 {nest.pack_id(first)[:16]}" in method["decisions"]["avoided"]
    assert method["data"]["harmful"]["name"] == "harmful of poison"
    assert method["data"]["harmful"]["prompts"] == 24
    assert "avoided" not in first.manifest.method["decisions"]


def test_without_avoiding_the_rows_are_shared(pair: tuple[Path, list[Any]], both: TrainingData, tmp_path: Path) -> None:
    base, (first, _) = pair
    if "mixtral" in str(base):
        pytest.skip("one family suffices")
    alone = train(base, both.of_categories(["poison"]), Label("no-poison"), recipe=FAST).pack
    model = shutil.copytree(base, tmp_path / "m")
    nestpatch.apply_in_place(model, first)
    with pytest.raises(OverlapError) as caught:
        nestpatch.apply_in_place(model, alone)
    assert "--allow-overlap" in caught.value.advice


def test_the_command_trains_beside_a_pack(pair: tuple[Path, list[Any]], files: Path, tmp_path: Path) -> None:
    base, (first, _) = pair
    if "mixtral" in str(base):
        pytest.skip("one family suffices")
    nest.write(first, tmp_path / "no-theft.nest")
    model = shutil.copytree(base, tmp_path / "m")
    nestpatch.apply_in_place(model, first)
    prompts = [f"--{kind}={files / kind}.jsonl" for kind in ("harmful", "benign", "lookalike")]
    words = ["--category=poison", f"--avoid={tmp_path / 'no-theft.nest'}", "--no-eval", *options(FAST)]
    done = CliRunner().invoke(main, ["train", str(model), "-o", str(tmp_path / "no-poison.nest"), *prompts, *words])
    assert done.exit_code == 0, done.output
    nestpatch.apply_in_place(model, tmp_path / "no-poison.nest")
    assert [entry.label for entry in (one.entry for one in nestpatch.status(model).applied)] == [
        "no-theft 1.0.0",
        "no-poison 1.0.0",
    ]


def test_a_pack_for_another_model_is_not_avoided(models: Any, both: TrainingData) -> None:
    other = tiny_pack(models("qwen2"))
    with pytest.raises(DataError, match="whose rows are to be avoided, is not for"):
        train(models("llama"), both, Label("x"), recipe=FAST, avoid=[other])
    with pytest.raises(DataError, match="would replace that pack"):
        read_avoided([other], other.manifest.name)
