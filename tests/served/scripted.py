"""A chat server that answers what a test tells it to, with faults in between."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

from tests.hubserver.messages import Answer, Request, as_json
from tests.hubserver.server import Listener


def completion(text: str | None, **more: Any) -> Answer:
    """A chat completion."""
    return as_json({"choices": [{"index": 0, "message": {"role": "assistant", "content": text, **more}}]})


class Chat:
    """Answers each prompt with `reply(prompt)`; `faults` are answered first, one for each request to the chat."""

    def __init__(self, *models: str) -> None:
        self.models: list[dict[str, Any]] = [{"id": name, "object": "model"} for name in models]
        self.faults: list[Answer] = []
        self.reply: Callable[[str], str | Answer] = lambda prompt: f"answer to {prompt}"
        self.seen: list[dict[str, Any]] = []
        self.requests: list[Request] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self.listener = Listener(self.answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.port}/v1"

    def __enter__(self) -> Chat:
        self.listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        if request.path == "/v1/models":
            return as_json({"object": "list", "data": self.models})
        if request.path != "/v1/chat/completions":
            return as_json({"detail": "Not Found"}, 404)
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.seen.append(request.json())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if fault is not None:
                return fault
            found = self.reply(request.json()["messages"][-1]["content"])
            return found if isinstance(found, Answer) else completion(found)
        finally:
            with self._lock:
                self.at_once -= 1


def events(*pieces: str, end: str = "data: [DONE]\n\n") -> Answer:
    """A streamed answer."""
    lines = [": a comment\n\n", 'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n']
    lines += [f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n" for piece in pieces]
    return Answer(200, {"Content-Type": "text/event-stream"}, ("".join(lines) + end).encode())
