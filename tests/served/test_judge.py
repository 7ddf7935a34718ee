"""A chat model on a server as a judge: one word for each answer, and nothing unreadable passes unseen."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest

from nestpatch.errors import DataError, JudgeError
from nestpatch.evaluation.judges.endpoint import EndpointJudge, open_judge_endpoint, parse_verdict
from nestpatch.evaluation.judges.opening import open_judges
from nestpatch.evaluation.judges.protocol import Verdict
from nestpatch.runtimes import connection
from nestpatch.runtimes.connection import EndpointSettings
from tests.calls import answer
from tests.hubserver.messages import Answer
from tests.served.scripted import Chat


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS", (0.0,))
    for variable in (connection.KEY_VARIABLE, connection.JUDGE_KEY_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    with Chat("guard") as server:
        yield server


def test_verdicts_are_those_of_the_model(chat):
    def reply(question: str) -> str:
        asked = question.partition("ANSWER:")[2]
        return " Refused." if "cannot" in asked else "**COMPLIED**" if "step" in asked else "INCOHERENT"

    chat.reply = reply
    with open_judge_endpoint(f"{chat.url}#guard") as judge:
        assert judge.name == f"endpoint={chat.url}#guard"
        found = judge.judge([("a", "I cannot."), ("b {x}", "First step"), ("c", " "), ("d", "la la la")])
    assert found == [Verdict.REFUSED, Verdict.COMPLIED, Verdict.INCOHERENT, Verdict.INCOHERENT]
    assert len(chat.seen) == 3, "an empty answer is not asked about"
    assert all("Choose one word" in request["messages"][0]["content"] for request in chat.seen)


def test_verdicts_that_cannot_be_read_are_counted_and_too_many_are_an_error(chat):
    chat.reply = lambda question: "I think so" if "answer 7\n" in question else "REFUSED"
    notes = []
    with EndpointJudge(chat.url) as judge:
        pairs = [("p", f"answer {number}") for number in range(20)]
        found = judge.judge(pairs, lambda event: notes.append(event.note))
        assert found == [Verdict.REFUSED] * 7 + [Verdict.COMPLIED] + [Verdict.REFUSED] * 12
        assert judge.unreadable == 1
        assert any("1 of 20 verdicts" in note and "count as complied" in note for note in notes)
        with pytest.raises(JudgeError, match="1 of 10 verdicts"):
            judge.judge(pairs[:10])


def test_a_judge_that_does_not_answer_has_a_name(chat):
    with EndpointJudge(chat.url) as judge:
        chat.reply = lambda question: Answer(500)
        with pytest.raises(JudgeError, match="the judge stopped answering"):
            judge.judge([("a", "b")])
    for text in ("nothing", f"{chat.url}#"):
        with pytest.raises(DataError):
            open_judge_endpoint(text)


def test_the_key_of_a_judge_is_its_own(chat, monkeypatch):
    monkeypatch.setenv(connection.KEY_VARIABLE, "sk-model")
    monkeypatch.setenv(connection.JUDGE_KEY_VARIABLE, "sk-judge")
    chat.reply = lambda question: "REFUSED"
    with open_judge_endpoint(f"{chat.url}#guard") as judge:
        judge.judge([("a", "b")])
    assert {request.token for request in chat.requests} == {"sk-judge"}
    chat.reply = lambda question: Answer(401)
    with open_judge_endpoint(chat.url) as judge, pytest.raises(JudgeError) as caught:
        judge.judge([("a", "b")])
    assert connection.JUDGE_KEY_VARIABLE in caught.value.advice


def test_what_is_known_of_the_server_is_noted_once(chat):
    chat.reply = lambda question: "REFUSED"
    notes = []
    with EndpointJudge(chat.url, EndpointSettings(model="other")) as judge:
        for _ in range(2):
            assert judge.judge([("a", "b")], lambda event: notes.append(event.note)) == [Verdict.REFUSED]
    (heard,) = [note for note in notes if note]
    assert "does not list the model other" in heard


def test_a_judge_is_closed_by_who_opened_it(chat):
    with ExitStack() as stack, EndpointJudge(chat.url) as mine:
        named, given = open_judges([f"endpoint={chat.url}#other", mine], stack=stack)
        assert given is mine
        stack.close()
        assert named._endpoint.server._client.is_closed
        assert not mine._endpoint.server._client.is_closed


def test_answers_are_kept_when_the_judge_fails(chat, tmp_path):
    chat.reply = lambda question: Answer(400) if "Choose one word" in question else f"Fine, {question}."
    (tmp_path / "harmful.jsonl").write_text("\n".join(json.dumps({"prompt": f"harmful {number}"}) for number in range(4)))
    kept = tmp_path / "answers.jsonl"
    words = ("--suite", tmp_path / "harmful.jsonl", "--judge", f"endpoint={chat.url}", "--answers", kept)
    found = answer("eval", chat.url, *words, code=1)
    assert found["error"]["type"] == "JudgeError"
    assert f"The 4 answers until then are in {kept}." in found["error"]["advice"]
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["prompt"], row["answer"]) for row in rows] == [(f"harmful {n}", f"Fine, harmful {n}.") for n in range(4)]
    # The judge said nothing, so nobody is named as if it had.
    assert not any(f"endpoint={chat.url}" in json.dumps(row.get("verdicts", {})) for row in rows)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("REFUSED", Verdict.REFUSED), ("The answer complies.", Verdict.COMPLIED), ("refused or complied", None), ("", None)],
)
def test_a_verdict_is_one_word(text, verdict):
    assert parse_verdict(text) is verdict
