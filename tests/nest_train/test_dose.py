"""Models with a pack at several strengths: `eval --strength`, `train --dose`, and what `show` and `apply` say of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

import nestpatch
from nestpatch.cli import main
from nestpatch.errors import DataError, RecipeError
from nestpatch.evaluation.evaluator import evaluate
from nestpatch.evaluation.suites import load_suite
from nestpatch.formats import nest
from nestpatch.nest_train.recipe import Recipe
from nestpatch.runtimes.protocol import open_runtime
from tests.gguf_files import needs_llama, write_gguf
from tests.nest_train.quick import KINDS, QUICK, options, write_prompts
from tests.schemas import require_schema
from tests.varied_packs import varied_pack

UP = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
STRENGTHS = (0, 0.5, 1, 1.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts for training and for the suites."""
    return write_prompts(tmp_path_factory.mktemp("prompts"), 20, tests=4)


@pytest.fixture(scope="module")
def sources(folder):
    return [str(folder / f"{kind}-test.jsonl") for kind in KINDS]


@pytest.fixture(scope="module")
def suites(sources):
    return [load_suite(source) for source in sources]


@pytest.fixture(scope="module")
def made(models):
    """(base in bfloat16, so that rows are rounded, and a pack for it)."""
    base = models("llama", "bfloat16")
    return base, varied_pack(base, UP, scale=1.0)


def run(*words: object):
    return CliRunner().invoke(main, list(map(str, words)))


def answers(scores):
    return [verdict.answer for suite in scores.suites for verdict in suite.verdicts]


# Measured


def test_every_strength_is_the_file_that_apply_writes(made, suites, tmp_path):
    base, pack = made
    events = []
    found = evaluate(base, suites, pack=pack, strengths=STRENGTHS, max_new_tokens=6, on_event=events.append)
    plain = evaluate(base, suites, pack=pack, max_new_tokens=6)
    assert (found.model, found.patched) == (plain.model, plain.patched)
    assert [strength for strength, _ in found.curve] == [0.5, 1, 1.5]
    assert [point.strength for point in found.dose.points] == list(STRENGTHS)
    assert len({tuple(answers(scores)) for scores in (found.model, *dict(found.curve).values())}) == 4
    nestpatch.apply(base, pack, tmp_path / "half", strength=0.5)
    half = evaluate(tmp_path / "half", suites, base=base, max_new_tokens=6).model
    assert dict(found.curve)[0.5].suites == half.suites
    assert dict(found.curve)[0.5].drift == pytest.approx(half.drift, rel=1e-4)
    alone = evaluate(base, suites, pack=pack, strengths=[0.5], max_new_tokens=6)
    assert (alone.patched, alone.strength, alone.dose) == (dict(found.curve)[0.5], 0.5, None)
    assert [event.note for event in events if event.stage == "load"] == [str(base)], "the model is loaded once"
    notes = [event.note for event in events if event.stage == "note"]
    name = f"evaluating {base} with {pack.label} at strength"
    assert notes == [f"evaluating {base}", *(f"{name} {s}, {n} of 3" for n, s in ((1, "0.5"), (2, "1"), (3, "1.5")))]


def test_rows_are_rounded_as_apply_rounds_them(made, tmp_path):
    base, pack = made
    nestpatch.apply(base, pack, tmp_path / "third", strength=0.3)
    with open_runtime(base, dtype="float32") as runtime, open_runtime(tmp_path / "third", dtype="float32") as written:
        with runtime.with_pack(pack, 0.3) as patched:
            np.testing.assert_array_equal(patched.logits([5, 6, 7]), written.logits([5, 6, 7]))
        with runtime.with_pack(pack) as whole:
            assert (whole.logits([5, 6, 7]) != written.logits([5, 6, 7])).any()


@needs_llama
def test_an_adapter_has_the_strength_in_llama_cpp(models, suites, tmp_path):
    base = models("llama")
    pack, file = varied_pack(base, UP, scale=1.0), write_gguf(base, tmp_path / "m.gguf")
    found = evaluate(file, suites, pack=pack, strengths=(0, 0.5, 1), max_new_tokens=6)
    plain = evaluate(file, suites, pack=pack, max_new_tokens=6)
    assert (found.model, found.patched) == (plain.model, plain.patched)
    nestpatch.apply(file, pack, tmp_path / "half.gguf", strength=0.5)
    half = evaluate(tmp_path / "half.gguf", suites, base=file, max_new_tokens=6).model
    assert answers(dict(found.curve)[0.5]) == answers(half)
    assert answers(half) not in (answers(found.model), answers(found.patched))
    assert dict(found.curve)[0.5].drift == pytest.approx(half.drift, abs=1e-4)


# The command


@pytest.fixture(scope="module")
def words(made, sources, tmp_path_factory):
    """`eval BASE PACK` with the suites."""
    file = tmp_path_factory.mktemp("pack") / "x.nest"
    nest.write(made[1], file)
    return ["eval", made[0], file, *(f"--suite={source}" for source in sources), "--max-new-tokens=3"]


def test_a_curve_is_a_table_and_a_list(words, tmp_path):
    shown = run(*words, "--strength", "0:1:0.5", "--answers", tmp_path / "a.jsonl")
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert lines[0].split() == [
        "strength",
        "attack",
        "success",
        "incoherent",
        "refusals,",
        "benign",
        "refusals,",
        "look-alike",
        "KL",
    ]
    assert [line.split("  ")[0] for line in lines[1:4]] == ["0, the base", "0.5", "1"]
    assert "100.0 51.0-100.0" in lines[1]
    reason = "no strength is within the limits for harmless prompts: at 0.5, benign answers moved far from the base: "
    assert lines[-1].startswith(f"recommended strength: none, {reason}")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [(row["of"], row.get("strength")) for row in rows[::12]] == [("model", None), ("patched", 0.5), ("patched", 1.0)]
    facts = json.loads(run(*words, "--strength", "0.5,1", "--json", "-q").stdout)
    require_schema(facts, "eval")
    assert [point["strength"] for point in facts["dose"]] == [0, 0.5, 1]
    assert facts["dose"][2]["kl_to_base"] == facts["after"]["kl_to_base"]
    assert facts["dose"][0]["attack_success"] == facts["before"]["attack_success"]
    assert (facts["strength"], facts["recommended"]["strength"]) == (1, None)
    assert facts["recommended"]["reason"].startswith(reason)


def test_one_strength_is_an_evaluation_at_it(words):
    facts = json.loads(run(*words, "--strength", "0.8", "--json", "-q").stdout)
    require_schema(facts, "eval")
    assert (facts["strength"], facts["dose"], facts["recommended"]) == (0.8, None, None)
    assert "patched, strength 0.8" in run(*words, "--strength", "0.8", "-q").stdout
    without = json.loads(run(*words, "--strength", "0.5,1.5", "--json", "-q").stdout)
    require_schema(without, "eval")
    assert (without["after"], without["strength"]) == (None, None)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--strength", "half"], "'half' names no strengths"),
        (["--strength", "0.5,2"], "at most 1.5, got 2.0"),
        (["--strength", "0.5,0.8", "--fail-over", "attack_success=0.1"], "add 1 to --strength"),
    ],
)
def test_strengths_are_checked_first(words, monkeypatch, more, says):
    monkeypatch.setattr("nestpatch.evaluation.evaluator.open_runtime", lambda *_, **__: pytest.fail("a model was loaded"))
    done = run(*words, *more)
    assert done.exit_code == 2
    assert says in done.stderr


def test_a_strength_needs_a_pack_and_a_model_without_it(made, suites, sources, tmp_path):
    base, pack = made
    assert "only with a PACK" in run("eval", base, "--strength", "0.5", f"--suite={sources[0]}").stderr
    with pytest.raises(DataError, match="strengths without a pack"):
        evaluate(base, suites, strengths=(0.5,))
    nestpatch.apply(base, pack, tmp_path / "patched")
    with pytest.raises(DataError, match=r"holds no-harm 1.0.0 already .*: no other strength can be measured"):
        evaluate(tmp_path / "patched", suites, pack=pack, strengths=(0.5, 1))


# In a pack


@pytest.fixture(scope="module")
def trained(models, folder, sources, tmp_path_factory):
    """(command, folder) of a training that measures a curve."""
    place = tmp_path_factory.mktemp("trained")
    sets = [f"--{kind}={folder / kind}.jsonl" for kind in KINDS]
    words = ["train", models("llama"), *sets, *(f"--suite={source}" for source in sources), *options(), "--dose", "0.5,1.25"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        done = run(*words, "-o", place / "x.nest", "--run", place / "run", "--json")
        assert done.exit_code == 0, done.output
        again = run(*words, "-o", place / "x.nest", "--run", place / "run", "--json")
        assert again.exit_code == 0, again.output
    return place, done, again


def test_a_training_stores_the_curve(models, trained, suites):
    place, done, _ = trained
    facts = json.loads(done.stdout)
    require_schema(facts, "train")
    pack = nest.read(place / "x.nest")
    stored = pack.manifest.evaluation
    assert (stored["dose"], stored["recommended"]) == (facts["dose"], facts["recommended"])
    assert [point["strength"] for point in stored["dose"]] == [0, 0.5, 1, 1.25]
    assert "evaluating the base with the pack at strength 1.25, 2 of 2" in done.stderr
    wanted = evaluate(models("llama"), suites, pack=pack, strengths=(0.5, 1, 1.25), max_new_tokens=QUICK.max_answer_tokens).dose
    for ours, theirs in zip(stored["dose"], wanted.as_json(), strict=True):
        close = {} if theirs["kl_to_base"] is None else {"kl_to_base": pytest.approx(theirs["kl_to_base"], rel=1e-3)}
        assert ours == {**theirs, **close}
    drifts = [point["kl_to_base"] for point in stored["dose"][1:]]
    assert drifts == sorted(set(drifts))


def test_a_training_that_goes_on_measures_nothing_twice(trained):
    place, done, again = trained
    assert json.loads(again.stdout) == json.loads(done.stdout)
    for name in ("base answers", "pack answers", "pack answers 0.5", "pack answers 1.25"):
        assert f"reused: 4 of 4 {name}" in again.stderr
    assert (place / "run" / "pack-answers-0.5.jsonl").is_file()
    assert (place / "run" / "pack.nest").read_bytes() == (place / "x.nest").read_bytes()


def test_show_and_apply_name_the_recommended_strength(models, trained, tmp_path):
    file, base = trained[0] / "x.nest", models("llama")
    assert "strength none, no strength is within the limits for harmless prompts" in run("show", file).stdout
    assert "info:" not in run("apply", base, file, "-o", tmp_path / "a", "-q", "--allow-unsigned").stderr
    pack = nest.read(file)
    told = {**pack.manifest.evaluation, "recommended": {"strength": 0.75, "reason": "less\x1b is enough"}}
    other = dataclasses.replace(pack, manifest=dataclasses.replace(pack.manifest, evaluation=told))
    nest.write(other, tmp_path / "told.nest")
    assert "strength 0.75, less\\x1b is enough" in run("show", tmp_path / "told.nest").stdout
    assert "1.25" in run("show", tmp_path / "told.nest", "--rows").stdout.splitlines()[-1]
    words = ("apply", base, tmp_path / "told.nest", "-q", "--allow-unsigned", "-o")
    said = "info: x 1.0.0 is applied at strength 1; its evaluation recommends 0.75, less\\x1b is enough"
    assert said in run(*words, tmp_path / "b").stderr
    assert "info:" not in run(*words, tmp_path / "c", "--strength", "1").stderr


def test_the_setting_is_checked(folder, tmp_path):
    with pytest.raises(RecipeError, match="dose_strengths: 'many' names no strengths"):
        Recipe(dose_strengths="many")
    assert Recipe(dose_strengths="0,0.5,1").doses() == (0.5,)
    done = run("train", folder, "-o", tmp_path / "x.nest", "--no-eval", "--dose", "0.5")
    assert "leave out --suite, --limit and --dose" in done.stderr
