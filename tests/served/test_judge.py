"""A chat model on a server as a judge: one word for each answer, and nothing unreadable passes unseen."""

from __future__ import annotations

import pytest

from nestpatch.errors import DataError, JudgeError
from nestpatch.evaluation.judges.endpoint import EndpointJudge, open_judge_endpoint, parse_verdict
from nestpatch.evaluation.judges.protocol import Verdict
from nestpatch.runtimes import connection
from tests.hubserver.messages import Answer
from tests.served.scripted import Chat


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setattr(connection, "_WAITS", (0.0,))
    monkeypatch.delenv(connection.KEY_VARIABLE, raising=False)
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


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("REFUSED", Verdict.REFUSED), ("The answer complies.", Verdict.COMPLIED), ("refused or complied", None), ("", None)],
)
def test_a_verdict_is_one_word(text, verdict):
    assert parse_verdict(text) is verdict
