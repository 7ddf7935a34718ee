"""The client for OpenAI-compatible servers: order, retries, and errors with names."""

from __future__ import annotations

import json
import time
from email.utils import formatdate

import pytest

from nestpatch.errors import (
    DataError,
    EndpointAccessError,
    EndpointAnswerError,
    EndpointError,
    EndpointUnavailableError,
)
from nestpatch.hub.retry import retry_after
from nestpatch.runtimes import connection
from nestpatch.runtimes.connection import EndpointSettings, checked_url
from nestpatch.runtimes.endpoint import in_parallel
from nestpatch.runtimes.served import ServedRuntime
from tests.calls import answer, run
from tests.hubserver.messages import Answer, as_json
from tests.schemas import require_schema
from tests.served.scripted import Chat, completion, events


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits, and no key of whoever runs the tests."""
    monkeypatch.setattr(connection, "_WAITS", (0.0, 0.01, 0.01))
    monkeypatch.delenv(connection.KEY_VARIABLE, raising=False)


@pytest.fixture
def chat():
    with Chat("tiny") as server:
        yield server


@pytest.fixture
def suites(tmp_path):
    """Two prompt files, as options of the command."""
    for kind in ("harmful", "benign"):
        lines = [json.dumps({"prompt": f"{kind} {number}"}) for number in range(4)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    return [f"--suite={tmp_path / kind}.jsonl" for kind in ("harmful", "benign")]


def test_answers_come_in_the_order_of_the_prompts(chat):
    def reply(prompt: str) -> str:
        time.sleep(0.02 if prompt.endswith("0") else 0.0)
        return f" {prompt}!\n"

    chat.reply, prompts, seen = reply, [f"prompt {number}" for number in range(24)], []
    with ServedRuntime(chat.url, EndpointSettings(concurrency=6), max_new_tokens=7) as served:
        assert served.generate(prompts, seen.append) == [f"{prompt}!" for prompt in prompts]
    assert 1 < chat.most_at_once <= 6
    assert [event.done for event in seen if event.stage == "generate"] == list(range(1, 25))
    asked = chat.seen[0]
    assert (asked["model"], asked["temperature"], asked["seed"], asked["max_tokens"]) == ("tiny", 0, 0, 7)


def test_one_request_at_a_time_is_one(chat):
    with ServedRuntime(chat.url, EndpointSettings(concurrency=1)) as served:
        served.generate([str(number) for number in range(6)])
    assert chat.most_at_once == 1


@pytest.mark.parametrize(
    "fault", [Answer(429), Answer(500), Answer(503, {"Retry-After": "0"}), Answer(cut=-1), Answer(200, body=b"{" * 99, cut=9)]
)
def test_a_failure_that_passes_is_tried_again(chat, fault):
    chat.faults = [fault, fault]
    with ServedRuntime(chat.url, EndpointSettings(concurrency=1)) as served:
        assert served.generate(["a", "b"]) == ["answer to a", "answer to b"]
    assert len(chat.seen) == 4


def test_the_server_decides_how_long_to_wait(chat):
    chat.faults = [Answer(429, {"Retry-After": "0.3"})]
    began = time.monotonic()
    with ServedRuntime(chat.url) as served:
        served.generate(["a"])
    assert time.monotonic() - began >= 0.3
    assert retry_after({"Retry-After": "7"}) == 7
    assert 50 < retry_after({"Retry-After": formatdate(time.time() + 60)}) <= 60
    assert retry_after({"Retry-After": "soon"}) == retry_after({}) == retry_after({"Retry-After": formatdate(0)}) == 0
    assert retry_after({"Retry-After": f"Mon, 01 Jan {'9' * 20} 00:00:00 GMT"}) == 0


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (as_json({"error": {"message": "overloaded"}}, 503), EndpointUnavailableError, "the server answered 503: overloaded"),
        (as_json({"error": {"message": "bad key"}}, 401), EndpointAccessError, "answered 401: bad key"),
        (as_json({"detail": "Not Found"}, 404), EndpointAnswerError, "answered 404: Not Found"),
        (as_json({"message": "too long"}, 400), EndpointAnswerError, "answered 400: too long"),
        (Answer(307, {"Location": "http://127.0.0.1:1/"}), EndpointAnswerError, "answered 307"),
        (Answer(200, body=b"<html>log in</html>"), EndpointAnswerError, "like an OpenAI-compatible server: '<html>"),
        (Answer(200, body=b"[" * 100_000), EndpointAnswerError, "does not answer like"),
        (as_json({"choices": []}), EndpointAnswerError, "does not answer like"),
        (as_json({"choices": [{"message": {"content": 5}}]}), EndpointAnswerError, "does not answer like"),
        (as_json([1]), EndpointAnswerError, "does not answer like"),
    ],
)  # fmt: skip
def test_what_is_no_answer_has_a_name(chat, fault, kind, text):
    chat.faults = [fault] * 20
    with ServedRuntime(chat.url) as served, pytest.raises(kind, match=text):
        served.generate(["a"])


def test_a_server_that_takes_too_long_has_a_name(chat):
    chat.reply = lambda prompt: Answer(200, body=b" " * 100, pace=0.2)
    slow = pytest.raises(EndpointUnavailableError, match=r"longer than the allowed 0\.4 s")
    with ServedRuntime(chat.url, EndpointSettings(timeout=0.4)) as served, slow:
        served.generate(["a"])


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e12"])
def test_a_time_limit_is_finite(chat, suites, seconds):
    assert run("eval", chat.url, *suites, "--timeout", seconds).exit_code == 2
    with pytest.raises(DataError, match="no time limit"):
        EndpointSettings(timeout=float(seconds))


def test_an_answer_without_end_is_not_read_to_its_end(chat, monkeypatch):
    monkeypatch.setattr(connection, "_LIMIT", 1000)
    chat.faults = [Answer(200, body=b" " * 5000)] * 9
    with ServedRuntime(chat.url) as served, pytest.raises(EndpointAnswerError, match="more than 0 MiB"):
        served.generate(["a"])


def test_the_first_failure_ends_the_work_and_what_was_done_counts():
    def work(item: int) -> int:
        if item == 5:
            raise EndpointError("five")
        time.sleep(0.01)
        return item

    for workers in (1, 4):
        found = []
        results = in_parallel(work, range(1, 1000), workers)
        with pytest.raises(EndpointError, match="five"):
            found.extend(result for _, result in results)
        assert {1, 2, 3, 4} <= set(found) <= set(range(1, 20))


def test_a_server_that_refuses_unknown_fields_is_asked_without_them(chat):
    allowed, notes = {"model", "messages", "max_tokens", "temperature", "seed", "stream"}, []
    whole = chat.answer

    def strict(request):
        if request.method == "POST" and set(request.json()) - allowed:
            return as_json({"error": {"message": "Unrecognized request argument supplied: repeat_penalty"}}, 400)
        return whole(request)

    chat.listener.answer = strict
    chat.listener.stop()
    chat.listener.start()
    with ServedRuntime(chat.url, EndpointSettings(concurrency=2)) as served:
        assert served.generate(["a", "b", "c"], lambda event: notes.append(event.note)) == [f"answer to {p}" for p in "abc"]
        assert sum("refuses repeat_penalty" in note for note in notes) == 1
    chat.reply = lambda prompt: events("one")
    with ServedRuntime(chat.url) as served:
        assert list(served.stream("x")) == ["one"]


# Models and addresses


def test_the_only_model_is_taken_and_several_have_to_be_named():
    with Chat("a", "b") as server:
        with pytest.raises(DataError, match=r"lists 2 models: a, b"):
            ServedRuntime(server.url)
        with ServedRuntime(server.url, EndpointSettings(model="b")) as served:
            served.generate(["x"])
            assert served.endpoint.notes == []
        assert server.seen[-1]["model"] == "b"
        notes = []
        with ServedRuntime(server.url, EndpointSettings(model="c")) as served:
            served.generate(["x"], lambda event: notes.append(event.note))
        assert f"{server.url} does not list the model c; it lists a, b" in notes
    with Chat() as server, pytest.raises(DataError, match="lists 0 models"):
        ServedRuntime(server.url)


def test_addresses_are_read_once_and_strictly():
    assert checked_url("http://host:8000") == checked_url("http://host:8000/") == "http://host:8000/v1"
    assert checked_url("https://host/api/v3/") == "https://host/api/v3"
    for right in ("http://[::1]:8000/v1", "http://127.0.0.1/v1", "http://my_host:1/v1", "http://m\u00fcller.de/v1"):
        assert checked_url(right) == right
    for wrong in (
        "http://",
        "http://host:port/v1",
        "http://a b/v1",
        "ftp://host",
        "http://user:secret@host/v1",
        "http://h/v1?k=1",
        "http://\u00fc..de/v1",
        "http://a..b/v1",
        f"http://{'a' * 64}.de/v1",
    ):
        with pytest.raises(DataError) as caught:
            checked_url(wrong)
        assert "secret" not in str(caught.value)


def test_nobody_at_the_address_has_a_name():
    with Chat() as server:
        url = server.url
    from nestpatch.hub import retry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retry, "WAITS", (0.0,))
        with pytest.raises(EndpointUnavailableError, match=url):
            ServedRuntime(url)


def test_the_key_is_sent_and_shown_nowhere(chat, monkeypatch, suites):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    shown = run("eval", chat.url, *suites, "--api-key-env", "MY_KEY", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert {request.token for request in chat.requests} == {"sk-secret"}
    assert "secret" not in shown.output
    chat.faults = [as_json({"error": "no"}, 401)] * 50
    assert "secret" not in run("eval", chat.url, *suites, "--api-key-env", "MY_KEY").output
    with pytest.raises(DataError, match="MY_OTHER holds no API key"):
        ServedRuntime(chat.url, EndpointSettings(key_variable="MY_OTHER"))
    monkeypatch.setenv("MY_KEY", "sk-\u00e9")
    with pytest.raises(DataError, match="characters that no API key has"):
        ServedRuntime(chat.url, EndpointSettings(key_variable="MY_KEY"))


@pytest.mark.parametrize(
    "fault",
    [
        as_json({"error": {"message": "Incorrect API key provided: sk-secret/1. Find it"}}, 401),
        as_json({"message": "x" * 195 + "sk-secret/1"}, 400),
        Answer(500, body=b"bad key sk-secret/1"),
        Answer(200, body=b'["sk-secret\\/1", 1]'),
        as_json({"choices": [{"message": {"content": ["sk-secret/1"]}}]}),
    ],
)
def test_a_key_that_the_server_repeats_is_not_shown(chat, monkeypatch, fault):
    monkeypatch.setenv(connection.KEY_VARIABLE, "sk-secret/1")
    chat.faults = [fault] * 20
    with ServedRuntime(chat.url) as served, pytest.raises(EndpointError) as caught:
        served.generate(["a"])
    assert "sk-" not in f"{caught.value}{caught.value.__cause__}"
    assert "***" in str(caught.value)


# Streams


def test_a_stream_gives_the_pieces(chat):
    chat.reply = lambda prompt: events("one ", "two", " three")
    with ServedRuntime(chat.url) as served:
        assert list(served.stream("x")) == ["one ", "two", " three"]
        assert chat.seen[-1]["stream"] is True
        chat.faults = [Answer(503)]
        assert "".join(served.stream("x")) == "one two three"
        chat.reply = lambda prompt: events("one", end='data: {"error": {"message": "out of memory"}}\n\n')
        with pytest.raises(EndpointAnswerError, match="out of memory"):
            list(served.stream("x"))
        chat.reply = lambda prompt: Answer(200, body=events("one").body, cut=60)
        with pytest.raises(EndpointUnavailableError, match="broke off"):
            list(served.stream("x"))


# The command


def test_eval_measures_an_endpoint_and_notes_what_it_cannot_give(chat, suites):
    chat.reply = lambda prompt: "I cannot help with that." if prompt.startswith("harmful") else "Of course."
    found = answer("eval", chat.url, *suites)
    require_schema(found, "eval")
    assert (found["model"], found["before"]["attack_success"]["count"], found["after"]) == (chat.url, 0, None)
    assert found["before"]["kl_to_base"] is None
    assert found["notes"] == [
        f"{chat.url} answers as tiny",
        "an endpoint gives answers and no logits: the drift from the base was not measured",
    ]


def test_what_was_answered_before_the_server_died_is_kept(chat, suites, tmp_path):
    def reply(prompt: str) -> str | Answer:
        return Answer(cut=-1) if prompt == "benign 2" else "Fine."

    chat.reply = reply
    found = answer("eval", chat.url, *suites, "--concurrency=1", "--answers", tmp_path / "answers.jsonl", code=1)
    assert found["error"]["type"] == "EndpointUnavailableError"
    assert f"The 6 answers until then are in {tmp_path / 'answers.jsonl'}." in found["error"]["advice"]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [*(f"harmful {n}" for n in range(4)), "benign 0", "benign 1"]
    assert {row["answer"] for row in rows} == {"Fine."}


def test_answers_that_are_only_reasoning_are_noted(chat, suites):
    chat.reply = lambda prompt: completion(None, reasoning_content="Let me think")
    assert any(
        "4 answers are empty because the model was still reasoning" in n for n in answer("eval", chat.url, *suites)["notes"]
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--base", "http://127.0.0.1:1/v1"], "the base is an endpoint"),
        (["--device", "cpu"], "the server decides where and how it computes"),
        (["pack.nest"], "a pack cannot be merged into the model of an endpoint"),
        (["--lora", "pack.nest"], "a pack cannot be merged into the model of an endpoint"),
        (["--base", "folder"], "the drift of an endpoint cannot be measured"),
    ],
)
def test_what_goes_with_files_alone_is_refused(chat, suites, tmp_path, monkeypatch, words, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack.nest").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    found = answer("eval", chat.url, *words, *suites, code=2)
    assert reason in found["error"]["message"]
    assert found["error"]["type"] == "DataError"
    assert chat.requests == []
    assert "only with the address of a server" in run("eval", tmp_path / "folder", "--model", "x", *suites).stderr
