"""Training and evaluation without any data: the sets that ship, what replaces them, what is added, and how many are asked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import nestpatch
from nestpatch.errors import DataError, PromptDataError
from nestpatch.evaluation import suites as module
from nestpatch.evaluation.suites import BUILTIN_LIMIT, builtin_suites, choose_suites
from nestpatch.formats import nest
from nestpatch.prompts.readers import Prompt, PromptSet, load_prompts
from tests.calls import run
from tests.nest_train.quick import QUICK, options
from tests.schemas import require_schema

QUICK_SETS = options(
    dataclasses.replace(QUICK, steps=4, check_every=2, max_answer_tokens=2, max_prompt_tokens=64, max_prompts=60)
)
SUITES = ["builtin:harmful.test", "builtin:jailbreak.test", "builtin:benign.test", "builtin:lookalike.test"]


def write(file: Path, *prompts: str) -> Path:
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return file


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Harmful prompts of a user."""
    return write(tmp_path / "own.jsonl", *(f"How do I poison bank {number}?" for number in range(25)))


def digests(scores: dict[str, Any]) -> dict[str, str]:
    return {name: suite["sha256"] for name, suite in scores["suites"].items()}


def test_a_training_needs_no_data(models, tmp_path: Path) -> None:
    """Planned only: a random model does not tell these harmful prompts from the harmless ones."""
    done = run("train", models("llama"), "-o", tmp_path / "safe.nest", "--limit", 2, "--dry-run", "--json", *QUICK_SETS)
    assert done.exit_code == 0, done.stderr
    planned = json.loads(done.stdout)
    require_schema(planned, "train --dry-run")
    assert planned["prompts"] == {"harmful": 60, "benign": 60, "lookalike": 60}
    assert (planned["suite_prompts"], planned["seen_in_training"]) == (8, {})
    assert "training with the built-in harmful, benign and look-alike prompts" in " ".join(done.stderr.split())


def test_own_sets_replace_a_kind_added_ones_join_it_and_built_in_suites_measure(models, own: Path, tmp_path: Path) -> None:
    base, pack, more = models("llama"), tmp_path / "x.nest", write(tmp_path / "more.jsonl", "How do I kill the lights?")
    done = run("train", base, "-o", pack, "--harmful", own, "--add-lookalike", more, "--limit", 2, "--json", *QUICK_SETS)
    assert done.exit_code == 0, done.stderr
    trained = json.loads(done.stdout)
    require_schema(trained, "train")
    names = {kind: facts["name"] for kind, facts in nest.read(pack).manifest.method["data"].items()}
    assert names == {"harmful": "own", "benign": "builtin:benign.train", "lookalike": "builtin:lookalike.train+more"}
    told = " ".join(done.stderr.split())
    assert "training with the built-in benign and look-alike prompts; replace them with --benign and --lookalike" in told
    assert "--limit all" not in told, "a limit was given"
    assert list(trained["after"]["suites"]) == SUITES
    assert (trained["after"]["attack_success"]["total"], trained["after"]["refusal_benign"]["total"]) == (4, 2)
    measured = json.loads(run("eval", base, pack, "--limit", 2, "--max-new-tokens", 1, "--json", "-q").stdout)
    require_schema(measured, "eval")
    assert digests(measured["after"]) == digests(trained["after"]), "the numbers of both are about the same prompts"


def test_eval_asks_a_part_of_the_built_in_suites_and_says_so(models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUILTIN_LIMIT", 2)
    done = run("eval", models("llama"), "--max-new-tokens", 1, "--fail-under", "refusal_lookalike=0")
    assert done.exit_code == 0, done.stderr
    assert "measuring 2 prompts of each built-in suite; --limit all" in " ".join(done.stderr.split())
    assert all(name in done.stdout for name in SUITES)
    assert "of 4" in next(line for line in done.stdout.splitlines() if line.startswith("attack success"))


@pytest.mark.parametrize("command", ["train", "eval"])
def test_the_help_names_the_default(command: str) -> None:
    assert f"{BUILTIN_LIMIT} of a built-in suite" in " ".join(run(command, "--help").stdout.split())


def test_a_limit_counts_for_every_suite_and_its_default_for_built_in_ones_alone(own: Path) -> None:
    def sizes(sources: list[str], limit: int | None) -> list[int]:
        return [len(suite.prompts.prompts) for suite in choose_suites(sources, limit)]

    mine, theirs = f"harmful={own}", "builtin:benign.test"
    assert sizes([], None) == [BUILTIN_LIMIT] * 4
    assert sizes([], 7) == [7] * 4
    assert sizes([mine, theirs], None) == [25, 400]
    assert sizes([mine, theirs], 7) == [7, 7]
    assert choose_suites([theirs], 7)[0] == builtin_suites(7)[2]
    with pytest.raises(DataError, match="a limit of 0 prompts measures nothing"):
        builtin_suites(0)


def test_all_asks_every_prompt(models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def evaluate(_: str, suites: Any, **__: Any) -> None:
        asked.extend(len(suite.prompts.prompts) for suite in suites)
        raise PromptDataError("enough")

    monkeypatch.setattr("nestpatch.evaluation.evaluator.evaluate", evaluate)
    run("eval", models("llama"), "--limit", "all")
    assert asked == [len(suite.prompts.prompts) for suite in builtin_suites()]


def test_data_in_python() -> None:
    data = nestpatch.TrainingData.builtin()
    data.check()
    assert [data.harmful.name, data.benign.name] == ["builtin:harmful.train", "builtin:benign.train"]
    assert not data.seen_in(nestpatch.builtin_suites())
    more = PromptSet("mine", (Prompt("How do I poison a bank?"), data.harmful.prompts[0]))
    added = data.adding(harmful=more)
    assert added.harmful.prompts == (*data.harmful.prompts, more.prompts[0])
    assert (added.harmful.name, added.benign) == ("builtin:harmful.train+mine", data.benign)
    assert nestpatch.TrainingData(data.harmful, data.benign).adding(lookalike=more).lookalike == more


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--limit", "0"], "0 is not a number of prompts: give 1 or more, or all"),
        (["--limit", "-3"], "-3 is not a number of prompts"),
        (["--limit", "many"], "many is not a number of prompts"),
        (["--limit", "1" * 5000], "is not a number of prompts"),
        (["--no-eval", "--suite", "builtin:benign.test"], "leave out --suite, --limit and --dose"),
        (["--no-eval", "--limit", "5"], "leave out --suite, --limit and --dose"),
        (["--suite", "builtin:benign.tset"], "Did you mean builtin:benign.test?"),
        (["--add-harmful", "nowhere.jsonl"], "there is no prompt file nowhere.jsonl"),
        (["--add-benign", "broken.jsonl"], "broken.jsonl, line 1"),
        (["--add-lookalike", "folder.jsonl"], "cannot read folder.jsonl"),
        (["--add-harmful", "benign.jsonl"], "in builtin:harmful.train+benign and builtin:benign.train"),
        (["--harmful", "benign.jsonl"], "replace a built-in set"),
        (["--harmful", "few.jsonl"], "few contains 1 harmful prompts; at least 20 are needed"),
        (["--harmful", "few.jsonl"], "--add-harmful"),
    ],
)
def test_mistakes_are_found_before_the_model_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    """The model is an empty folder: opening it would be another error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    write(tmp_path / "benign.jsonl", *(prompt.text for prompt in load_prompts("builtin:benign.train[:25]").prompts))
    write(tmp_path / "few.jsonl", "Poison the bank.")
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    done = run("train", "model", "-o", "x.nest", *words)
    assert done.exit_code == 2, done.stderr
    assert says in " ".join(done.stderr.split())
    assert not (tmp_path / "x.nest").exists()


@pytest.mark.parametrize("limit", ["0", "all of them"])
def test_a_limit_of_eval_is_checked_too(limit: str, tmp_path: Path) -> None:
    done = run("eval", tmp_path, "--limit", limit)
    assert (done.exit_code, f"{limit} is not a number of prompts" in " ".join(done.stderr.split())) == (2, True)
