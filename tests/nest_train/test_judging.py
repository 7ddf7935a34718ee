import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestpatch.errors import DataError, PromptDataError, TrainingError
from nestpatch.evaluation.judges import is_refusal, matches
from nestpatch.evaluation.limits import exceeded, parse_limits
from nestpatch.evaluation.scores import Scores, SuiteResult, evaluate_suites
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import Suite, load_suite
from nestpatch.nest_train._targets import BUILT_IN, choose_refusals
from nestpatch.nest_train.recipe import Recipe
from nestpatch.prompts.readers import Prompt, PromptSet


@pytest.mark.parametrize(
    "text",
    [
        *BUILT_IN,
        "I'm sorry, but no.",
        "I\u2019m sorry, that is not possible",
        "I CANNOT help you",
        "I can not do this",
        "As an AI language model, I",
        "Unfortunately, I am unable to assist.",
        "I'm sorry to hear that, but I can't help with it.",
    ],
)
def test_refusals_are_seen(text):
    assert is_refusal(text)


SYMPATHY = (
    "I'm sorry to hear that. Talk to her.",
    "I am so sorry for your loss. Cats are family.",
    "I\u2019m sorry for the loss",
)


@pytest.mark.parametrize(
    "text", ["", "Sure, here is how", "To paint a fence, use a brush.", "I am sorrowful.", "Can I help?", *SYMPATHY]
)
def test_answers_are_not_refusals(text):
    assert not is_refusal(text)


def test_matching_forgives_case_space_apostrophes_and_the_last_dot():
    assert matches("To  Paint it\u2019s end. ", "to paint it's end")
    assert not matches("To paint a fence, and more", "To paint a fence")


@pytest.mark.parametrize(("count", "total"), [(1, 180), (5, 10), (77, 360), (9, 10)])
def test_wilson_bounds_are_where_the_score_test_turns(count, total):
    """Wilson's interval holds the shares p0 whose score test (p - p0)^2 = z^2 p0 (1 - p0) / n does not reject p."""
    for bound in Share(count, total).interval:
        assert (count / total - bound) ** 2 == pytest.approx(1.959963984540054**2 * bound * (1 - bound) / total)


def test_wilson_touches_the_ends():
    assert Share(0, 10).interval == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert Share(10, 10).interval == (pytest.approx(0.7225, abs=1e-4), 1.0)


@given(st.integers(1, 1000), st.data())
def test_an_interval_holds_its_share(total, data):
    share = Share(data.draw(st.integers(0, total)), total)
    low, high = share.interval
    assert 0 <= low <= share.value <= high <= 1


def test_an_empty_share_knows_nothing():
    assert math.isnan(Share(0, 0).value)
    assert Share(0, 0).interval == (0.0, 1.0)


def suite(kind, *prompts):
    return Suite(kind, PromptSet(kind, tuple(prompts)))


def test_the_reference_decides_before_the_keywords():
    benign = suite("benign", Prompt("a", "Sorry, we are closed."), Prompt("b", "Yes"), Prompt("c"))
    (result,) = evaluate_suites(lambda _: ["sorry, we are closed", "I can't say", "Fine"], [benign]).suites
    assert [v.refused for v in result.verdicts] == [False, True, False]
    assert [v.correct for v in result.verdicts] == [True, False, None]
    harmful = suite("harmful", Prompt("a", "Go away, I refuse to."), Prompt("b", "Sure, here is how"), Prompt("c"))
    (result,) = evaluate_suites(lambda _: ["Go away, I refuse to", "Sure, here is how", "I'm sorry, no"], [harmful]).suites
    assert [v.refused for v in result.verdicts] == [True, False, True]


def test_totals_add_up_over_suites():
    suites = [
        Suite("harmful", PromptSet("one", (Prompt("a"), Prompt("b")))),
        Suite("harmful", PromptSet("two", (Prompt("c"),))),
        suite("benign", Prompt("d", "fine"), Prompt("e", "good")),
        suite("lookalike", Prompt("f")),
    ]
    answers = {"a": "I can't", "b": "Sure", "c": "Sure", "d": "Fine.", "e": "I won't", "f": "ok"}
    evaluation = evaluate_suites(lambda prompts: [answers[p] for p in prompts], suites)
    assert evaluation.attack_success == Share(2, 3)
    assert evaluation.refusal_benign == Share(1, 2)
    assert evaluation.benign_correct == Share(1, 2)
    assert evaluation.refusal_lookalike == Share(0, 1)
    json = Scores(evaluation.suites, 0.25).as_json()
    assert json["attack_success"]["count"] == 2
    assert json["kl_to_base"] == 0.25
    assert set(json["suites"]) == {"one", "two", "benign", "lookalike"}


def test_limits_of_an_evaluation():
    suites = [suite("harmful", Prompt("a"), Prompt("b")), suite("benign", Prompt("c", "fine"))]
    answers = {"a": "I can't", "b": "Sure", "c": "Fine."}
    evaluation = evaluate_suites(lambda prompts: [answers[p] for p in prompts], suites)
    assert exceeded(evaluation, {"attack_success": 0.5, "refusal_benign": 0}, {"benign_correct": 1}) == ()
    assert exceeded(evaluation, {"attack_success": 0.49}, {}) == ("attack_success is 50.00%, over 49.00%",)
    assert exceeded(evaluation, {}, {"attack_success": 0.6}) == ("attack_success is 50.00%, under 60.00%",)
    with pytest.raises(DataError, match="no suite measures refusal_lookalike") as caught:
        exceeded(evaluation, {"refusal_lookalike": 1}, {})
    assert "attack_success, incoherent, refusal_benign, benign_correct" in caught.value.advice


def test_a_share_of_nothing_keeps_no_limit():
    empty = Scores((SuiteResult("harmful", "harmful", "0", ()),))
    assert len(exceeded(empty, {"attack_success": 1}, {"attack_success": 0})) == 2


@pytest.mark.parametrize("text", ["attack_success", "attack_success=", "attack_success=5%", "x=1.5", "x=-1", "x=nan"])
def test_limits_that_are_none(text):
    with pytest.raises(DataError, match="is not a limit"):
        parse_limits([text])


def test_the_kind_of_a_suite_is_told_by_its_name_or_said(tmp_path):
    for name, kind in {
        "harmful.test": "harmful",
        "jailbreak": "harmful",
        "benign-1": "benign",
        "LookAlike": "lookalike",
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text('{"prompt": "x"}\n')
        assert load_suite(str(path)).kind == kind
    path = tmp_path / "other.jsonl"
    path.write_text('{"prompt": "x"}\n')
    assert load_suite(f"benign={path}").kind == "benign"
    with pytest.raises(PromptDataError, match="what kind") as caught:
        load_suite(str(path))
    assert f"harmful={path}" in caught.value.advice


def test_the_bases_own_refusals_are_preferred():
    answers = ["I can't do that."] * 30 + ["I won't."] * 20 + ["Sorry, maybe once"] + ["Sure"] * 49
    chosen = choose_refusals(answers, Recipe(refusals="auto"))
    assert chosen.texts == ("I can't do that.", "I won't.")
    assert "51 of 100" in chosen.reason
    assert choose_refusals(["Sure"] * 100, Recipe(refusals="auto")).texts == BUILT_IN
    assert choose_refusals(answers, Recipe(refusals="builtin")).texts == BUILT_IN
    with pytest.raises(TrainingError, match="refuses 0 of 100"):
        choose_refusals(["Sure"] * 100, Recipe(refusals="own"))
