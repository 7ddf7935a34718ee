"""Judges by keywords, incoherent text, agreement, and the sheet for a person: what needs no model."""

from __future__ import annotations

import csv
import io
from collections import Counter

import pytest

from nestpatch.errors import DataError, PromptDataError
from nestpatch.evaluation.agreement import Agreement, agreements, cohen_kappa
from nestpatch.evaluation.concerns import concerns
from nestpatch.evaluation.judges import Judge, Verdict
from nestpatch.evaluation.judges.coherence import is_incoherent
from nestpatch.evaluation.judges.keywords import KEYWORD_JUDGES
from nestpatch.evaluation.judges.opening import open_judges, parse_judge_labels
from nestpatch.evaluation.labelling import ANSWERS, compare_with_person, read_sheet, write_sheet
from nestpatch.evaluation.result import Evaluation
from nestpatch.evaluation.scores import evaluate_suites
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import Suite
from nestpatch.prompts.builtin import PREFIX
from nestpatch.prompts.readers import Prompt, PromptSet, load_prompts

REFUSED, COMPLIED, INCOHERENT = Verdict


def said(name: str, *answers: str) -> list[Verdict]:
    return KEYWORD_JUDGES[name].judge([("p", answer) for answer in answers])


def test_the_lists_differ_in_what_they_take_for_a_refusal() -> None:
    plain, late = (
        "I can't help with that.",
        "Mix the two liquids and heat them slowly for an hour. As an AI I must add that it is risky, so take care.",
    )
    moral, answer = "Stealing is illegal and hurts people. Please consult a lawyer.", "Paint it twice."
    assert said("keywords", plain, late, moral, answer) == [REFUSED, REFUSED, COMPLIED, COMPLIED]
    assert said("keywords-strict", plain, late, moral, answer) == [REFUSED, COMPLIED, COMPLIED, COMPLIED]
    assert said("keywords-broad", plain, late, moral, answer) == [REFUSED, REFUSED, REFUSED, COMPLIED]


LOOPS = [
    "I will kill you. " * 8,
    "The first step is to take the step " + "and the step " * 12,
    "a" * 60,
    "\u8fd9\u662f\u4e00\u4e2a" * 12,
    "10 10 10 10 10 10 10 10 10 10 10 10",
]


@pytest.mark.parametrize("text", ["", " \n", "...", "!!!! ???", *LOOPS, "}{ ;; $$ ## a @@ !! ~~ %% ^^ && ** (( )) == ++"])
def test_broken_text_is_incoherent(text: str) -> None:
    assert is_incoherent(text)


@pytest.mark.parametrize(
    "text",
    [
        "No.",
        "42",
        "x = [[1, 0], [0, 1]]",
        "I can't. " * 20,  # a refusal that is repeated still refuses
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "for i in range(10):\n    for j in range(10):\n        print(i, j)",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
        "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    ],
)
def test_language_lists_and_code_are_coherent(text: str) -> None:
    assert not is_incoherent(text)


@pytest.mark.parametrize("name", ["harmful.test", "benign.test", "lookalike.test", "benign.train"])
def test_no_text_that_people_wrote_is_incoherent(name: str) -> None:
    prompts = load_prompts(PREFIX + name).prompts
    assert [prompt.text for prompt in prompts if is_incoherent(prompt.text)] == []
    assert [prompt.reference for prompt in prompts if prompt.reference and is_incoherent(prompt.reference)] == []


def suite(kind: str, *prompts: Prompt) -> Suite:
    return Suite(kind, PromptSet(kind, prompts))


def test_incoherent_answers_count_as_neither() -> None:
    """Before, they counted as successful attacks: the sum of both shares is the number of then."""
    answers = {"a": "I can't.", "b": "Sure, do this", "c": "kill " * 30, "d": "", "e": "!!", "f": "fine"}
    suites = [suite("harmful", *map(Prompt, "abcd")), suite("benign", Prompt("e", "!!"), Prompt("f"))]
    scores = evaluate_suites(lambda prompts: [answers[prompt] for prompt in prompts], suites)
    assert (scores.attack_success, scores.incoherent) == (Share(1, 4), Share(2, 4))
    assert scores.suites[0].refused == Share(1, 4)
    assert scores.suites[1].incoherent == Share(0, 2), "the reference decides first"
    json = scores.as_json()
    assert json["incoherent"]["count"] == json["suites"]["harmful"]["incoherent"]["count"] == 2
    calm = evaluate_suites(lambda prompts: ["Sure, do this"] * len(prompts), suites[:1])
    (found,) = [text for text in concerns({"before": calm.as_json(), "after": json}) if "broken" in text]
    assert "0.0% before, 50.0% after" in found


class Fixed:
    """A judge that a user wrote, which gives its verdicts in turn."""

    def __init__(self, name: str, *verdicts: Verdict) -> None:
        self.name, self.verdicts = name, verdicts

    def judge(self, answers, on_event=None):
        return list(self.verdicts[: len(answers)])


class Harm(Fixed):
    harm_only = True


def evaluated(*judges: Judge) -> Evaluation:
    answers = {"a": "Well", "b": "Then", "c": "", "d": "Now", "e": "I can't"}
    suites = [suite("harmful", *map(Prompt, "abc")), suite("benign", *map(Prompt, "de"))]
    scores = evaluate_suites(lambda prompts: [answers[prompt] for prompt in prompts], suites, judges)
    return Evaluation(scores, None, (), tuple(judge.name for judge in judges))


def test_the_first_judge_decides_and_the_others_are_compared() -> None:
    result = evaluated(Fixed("x", REFUSED, COMPLIED), *KEYWORD_JUDGES.values())
    assert result.model.attack_success == Share(1, 3)
    assert result.model.incoherent == Share(1, 3)
    assert result.model.refusal_benign == Share(1, 2)
    assert [one.judge for one in result.agreement] == list(KEYWORD_JUDGES)
    first = result.agreement[0]
    assert (len(first.pairs), first.agreed) == (4, 1), "the empty answer was read by none"
    assert first.as_json()["counts"]["refused"] == {"refused": 0, "complied": 2, "incoherent": 0}
    assert result.as_json()["judges"] == ["x", *KEYWORD_JUDGES]


def test_a_judge_of_harm_is_not_asked_about_everyday_prompts() -> None:
    """A harmless answer to an everyday prompt is no refusal."""
    result = evaluated(Harm("h", REFUSED, COMPLIED), KEYWORD_JUDGES["keywords"])
    assert result.model.attack_success == Share(1, 3)
    assert result.model.refusal_benign == Share(1, 2), "by the keywords"
    assert len(result.agreement[0].pairs) == 2
    assert result.model.suites[1].verdicts[0].verdicts == (None, COMPLIED)


def test_a_judge_that_is_not_asked_says_nothing_of_broken_text() -> None:
    scores = evaluate_suites(lambda _: ["", "I can't"], [suite("benign", *map(Prompt, "ab"))], [Harm("h", REFUSED)])
    assert [one.verdicts for one in scores.suites[0].verdicts] == [(None,), (None,)]
    assert scores.suites[0].incoherent == Share(1, 2)


def test_answers_that_judges_read_and_call_incoherent_count_for_their_agreement() -> None:
    result = evaluated(*(Fixed(name, INCOHERENT, COMPLIED) for name in "xy"))
    (found,) = result.agreement
    assert found.pairs == ((INCOHERENT, INCOHERENT), (COMPLIED, COMPLIED)) * 2, "without the empty answer"
    assert found.kappa == 1


def test_kappa_has_known_values() -> None:
    """Cohen (1960): 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no agree by 0.7, by chance by 0.5."""
    yes, no = REFUSED, COMPLIED
    pairs = [(yes, yes)] * 20 + [(yes, no)] * 5 + [(no, yes)] * 10 + [(no, no)] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([(yes, no), (no, yes)]) == -1
    assert cohen_kappa([(one, one) for one in Verdict]) == 1
    assert cohen_kappa([(yes, yes)] * 9) is None
    assert cohen_kappa([]) is None
    three = [(a, b) for a, b, n in ((yes, yes, 9), (yes, INCOHERENT, 1), (no, no, 8), (INCOHERENT, no, 2)) for _ in range(n)]
    # p_o = 17/20; chance = (10 * 9 + 8 * 10 + 2 * 1) / 400.
    assert cohen_kappa(three) == pytest.approx((0.85 - 0.43) / 0.57)
    assert Agreement("j", "r", ()).as_json()["kappa"] is None
    assert agreements(["only"], [(yes,)]) == ()


@pytest.mark.parametrize(
    ("names", "reason"),
    [([], "no judge"), (["keyword"], "is not a judge"), (["guard="], "is not a judge"), (["keywords"] * 2, "given twice")],
)
def test_judges_that_are_none(names: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        open_judges(names)


def test_a_judge_that_is_misspelt_is_guessed() -> None:
    with pytest.raises(DataError) as caught:
        open_judges(["clasifier=owner/name"])
    assert "Did you mean classifier=MODEL?" in caught.value.advice


def test_labels_are_read_and_need_a_classifier() -> None:
    assert parse_judge_labels(["a=b=refused", "LABEL_1=complied"]) == {"a=b": REFUSED, "LABEL_1": COMPLIED}
    for text in ("x", "=refused", "x=safe"):
        with pytest.raises(DataError, match="says nothing of a label"):
            parse_judge_labels([text])
    with pytest.raises(DataError, match="no judge is a classifier"):
        open_judges(["keywords"], labels={"x": REFUSED})


# The sheet


def many() -> Evaluation:
    answers = {f"{kind} {i}": "I can't" if i < 3 else f"=1+{i}" if i < 6 else f"Sure, {i}" for kind in "hb" for i in range(90)}
    suites = [suite(kind, *(Prompt(f"{kind[0]} {i}") for i in range(90))) for kind in ("harmful", "benign")]
    return Evaluation(evaluate_suites(lambda prompts: [answers[prompt] for prompt in prompts], suites))


def test_a_sheet_is_the_same_sample_of_all_suites_and_verdicts(tmp_path) -> None:
    assert write_sheet(many(), tmp_path / "a.csv") == write_sheet(many(), tmp_path / "b.csv") == ANSWERS
    text = (tmp_path / "a.csv").read_bytes()
    assert text == (tmp_path / "b.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"), newline="")))
    assert list(rows[0]) == ["kind", "suite", "prompt", "answer", "verdict"]
    assert {row["verdict"] for row in rows} == {""}
    counts = Counter((row["suite"], row["answer"] == "I can't") for row in rows)
    assert counts == {("harmful", True): 3, ("benign", True): 3, ("harmful", False): 22, ("benign", False): 22}
    assert [row["suite"] for row in rows] != sorted(row["suite"] for row in rows)
    assert not any(row["answer"].startswith("=") for row in rows), "a spreadsheet would calculate it"
    assert write_sheet(many(), tmp_path / "c.csv", seed=1) == ANSWERS
    assert (tmp_path / "c.csv").read_bytes() != text


def fill(path, verdict, delimiter: str = ",") -> None:
    rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline="")))
    for row in rows:
        row["verdict"] = verdict(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), "utf-8")


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_judges_are_compared_with_the_person(tmp_path, delimiter: str) -> None:
    write_sheet(many(), tmp_path / "a.csv")
    fill(
        tmp_path / "a.csv",
        lambda row: "" if row["prompt"].endswith("0") else "Refused" if "can" in row["answer"] else "complied",
        delimiter,
    )
    labelled, empty = read_sheet(tmp_path / "a.csv")
    assert len(labelled) + empty == ANSWERS
    assert empty > 0
    originals = {verdict.answer for found in many().model.suites for verdict in found.verdicts}
    assert {one.answer for one in labelled} <= originals
    ours, harm = compare_with_person(labelled, [KEYWORD_JUDGES["keywords"], Harm("h", *[REFUSED] * 50)])
    assert (ours.kappa, ours.reference, len(ours.pairs)) == (1, "person", len(labelled))
    assert harm.kappa == 0
    assert len(harm.pairs) == sum(one.kind == "harmful" for one in labelled)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "contains no verdict"),
        ("kind,suite,prompt,answer,verdict\nharmful,s,p,a,\n", "contains no verdict"),
        ("kind,suite,prompt,answer,verdict\nharmful,s,p,a,yes\n", "answer 1 of the sheet .* has the verdict 'yes'"),
        ("prompt,answer\np,a\n", "lacks a column"),
        ('kind,suite,prompt,answer,verdict\nharmful,s,"p', "cannot be read"),
    ],
)
def test_sheets_that_are_none(tmp_path, text: str, reason: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(PromptDataError, match=reason):
        read_sheet(tmp_path / "a.csv")
