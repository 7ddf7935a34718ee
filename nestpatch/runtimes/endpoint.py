"""A client for servers that speak the OpenAI chat API: vLLM, llama-server, Ollama, TGI and others. Every request is greedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from nestpatch.errors import DataError, EndpointAnswerError
from nestpatch.runtimes.connection import Connection, EndpointSettings
from nestpatch.runtimes.text import Conversation, messages_of

_PLAIN = {"repeat_penalty": 1, "repetition_penalty": 1, "cache_prompt": False}
"""Fields outside of OpenAI's API that make answers the model's own: llama-cpp-python punishes repetition by default, vLLM by
the model's generation_config.json, and llama-server goes on from what it cached before an adapter's scale was changed. Servers
ignore fields that they do not know, or refuse the request: then it is sent without them."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Reply:
    """One answer of a chat model.

    Attributes:
        text: The answer.
        reasoned: Whether the model wrote a chain of thought that is not part of it.
    """

    text: str
    reasoned: bool = False


class Endpoint:
    """A connection to one server. Use it in a `with` statement; several threads may ask at once.

    Attributes:
        url: The address of the API, such as http://localhost:8000/v1.
        server: The connections to it.
        settings: How it is asked.
        notes: What a reader of the results must know.
    """

    def __init__(self, url: str, settings: EndpointSettings | None = None) -> None:
        """Checks the address and reads the API key; nothing is sent yet.

        Args:
            url: The address; without a path /v1 is added.
            settings: How it is asked.

        Raises:
            DataError: The address or the key cannot be used.
        """
        self.server = Connection(url, settings or EndpointSettings())
        self.url, self.settings, self.notes = self.server.url, self.server.settings, self.server.notes
        self._model: str | None = None
        self._extras: dict[str, Any] = dict(_PLAIN)

    def __enter__(self) -> Endpoint:
        """Returns the endpoint itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        self.server.close()

    def models(self) -> list[dict[str, Any]]:
        """Asks for the models that the server lists.

        Returns:
            Its entries; each has the member "id".

        Raises:
            EndpointError: The server does not list its models.
        """
        entries = self.server.json("GET", f"{self.url}/models", waits=None)
        data = entries.get("data") if isinstance(entries, dict) else None
        if not isinstance(data, list) or not all(isinstance(one, dict) and isinstance(one.get("id"), str) for one in data):
            raise self.server.strange(f"{self.url}/models", entries)
        return data

    def model(self) -> str:
        """The name of the model that is asked; the server is asked for it once.

        Returns:
            The name of the settings, or that of the only model that the server lists.

        Raises:
            DataError: The server lists several models, or none.
            EndpointError: The server does not list its models, and the settings name none.
        """
        if self._model is None:
            self._model = self._choose(self.settings.model)
        return self._model

    def _choose(self, wanted: str | None) -> str:
        try:
            names = [str(entry["id"]) for entry in self.models()]
        except EndpointAnswerError:  # some servers list nothing
            if wanted is None:
                raise
            return wanted
        shown = self.server.quoted(", ".join(names[:10]), 1000) + (", ..." if len(names) > 10 else "")
        if wanted is None:
            if len(names) != 1:
                advice = "Name one of them with --model." if names else "Name the model with --model."
                raise DataError(f"{self.url} lists {len(names)} models{f': {shown}' if names else ''}", advice=advice)
            return names[0]
        if wanted not in names:
            # Ollama takes short names, and llama-server answers to any name.
            self.notes.append(f"{self.url} does not list the model {wanted}; it lists {shown or 'none'}")
        return wanted

    def chat(self, prompt: Conversation, max_tokens: int) -> Reply:
        """Asks for one greedy answer.

        Args:
            prompt: What the user asks.
            max_tokens: Length of the answer.

        Returns:
            The answer.

        Raises:
            EndpointError: The server does not answer.
        """
        address = f"{self.url}/chat/completions"
        body = self._request(prompt, max_tokens)
        try:
            answer = self.server.json("POST", address, body | self._extras)
        except EndpointAnswerError:
            answer = self.server.json("POST", address, body)
            self._without_extras()
        try:
            message = answer["choices"][0]["message"]
            text, thought = message.get("content"), message.get("reasoning_content") or message.get("reasoning")
        except (LookupError, TypeError, AttributeError):
            raise self.server.strange(address, answer) from None
        if not isinstance(text, str) and text is not None:
            raise self.server.strange(address, answer)
        return Reply(text or "", bool(thought))

    def chat_all(
        self, prompts: Sequence[Conversation], max_tokens: int, on_answer: Callable[[int, Reply], None] = lambda *_: None
    ) -> list[Reply]:
        """Asks for many answers, `settings.concurrency` at a time.

        Args:
            prompts: What the user asks.
            max_tokens: Length of an answer.
            on_answer: Receives each answer with the place of its prompt, as soon as it is there.

        Returns:
            The answers, in the order of the prompts.

        Raises:
            EndpointError: The server failed to answer one of them; those in flight were waited for.
        """
        self.model()
        found: dict[int, Reply] = {}
        for place, reply in in_parallel(lambda prompt: self.chat(prompt, max_tokens), prompts, self.settings.concurrency):
            found[place] = reply
            on_answer(place, reply)
        return [found[place] for place in range(len(prompts))]

    def stream(self, prompt: Conversation, max_tokens: int, fields: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Asks for one greedy answer, and yields it as it is written. Retried until the first piece comes.

        Args:
            prompt: What the user asks.
            max_tokens: Length of the answer.
            fields: Members of the request that one kind of server knows, and that it must not ignore.

        Yields:
            Pieces of the answer.

        Raises:
            EndpointError: The server does not answer, or breaks off.
        """
        address = f"{self.url}/chat/completions"
        for line in self._lines(address, self._request(prompt, max_tokens) | {"stream": True, **(fields or {})}):
            if line.strip() == "data: [DONE]":
                return
            if line.startswith("data:"):
                yield from self._piece(line[5:], address)

    def _lines(self, address: str, body: dict[str, Any]) -> Iterator[str]:
        """The lines of a streamed answer."""
        lines = self.server.lines(address, body | self._extras)
        try:
            first = next(lines, "")
        except EndpointAnswerError:
            lines = self.server.lines(address, body)
            first = next(lines, "")
            self._without_extras()
        yield first
        yield from lines

    def _without_extras(self) -> None:
        """Notes that the server took a request only after the fields of `_PLAIN` were left out."""
        self._extras = {}
        note = (
            f"{self.url} refuses {', '.join(_PLAIN)}: if it punishes repetition by default, its answers are not the model's own"
        )
        if note not in self.notes:
            self.notes.append(note)

    def _piece(self, data: str, address: str) -> Iterator[str]:
        """The text of one server-sent event."""
        try:
            event = json.loads(data)
            text = (event["choices"] or [{"delta": {}}])[0]["delta"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise self.server.strange(address, data) from None
        if isinstance(text, str) and text:
            yield text

    def _request(self, prompt: Conversation, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.model(),
            "messages": messages_of(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": 0,
        }


def in_parallel(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[tuple[int, R]]:
    """Does work on many items, some at a time.

    After a failure no further item is begun; those in flight are waited for and yielded, then the failure is raised. The
    threads are daemons: Ctrl-C does not wait for a slow server.

    Args:
        work: What is done.
        items: What it is done on.
        workers: Items at a time.

    Yields:
        (place of the item, result), as they come.

    Raises:
        Exception: The first failure of the work.
    """
    todo, lock, stop = iter(enumerate(items)), Lock(), Event()
    results: SimpleQueue[tuple[int, R | None, BaseException | None]] = SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with lock:
                place, item = next(todo, (-1, None))
            if place < 0 or item is None:
                break
            try:
                results.put((place, work(item), None))
            except BaseException as error:  # noqa: BLE001 - raised again below
                stop.set()
                results.put((place, None, error))
        results.put((-1, None, None))

    threads = [Thread(target=run, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    running, failure = len(threads), None
    try:
        while running:
            place, result, error = results.get()
            running -= place < 0
            if error is not None:
                failure = failure or error
            elif place >= 0:
                yield place, result  # type: ignore[misc]
    finally:
        stop.set()
    if failure is not None:
        raise failure
