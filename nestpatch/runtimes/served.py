"""A model behind an OpenAI-compatible server, as `nestpatch.runtimes.protocol.Runtime`: it gives answers and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

from nestpatch.errors import DataError, EndpointError
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.pack import Pack
from nestpatch.rows import FloatArray
from nestpatch.runtimes.connection import EndpointSettings
from nestpatch.runtimes.endpoint import Endpoint, Reply
from nestpatch.runtimes.text import Conversation, TokenPair


class ServedRuntime:
    """A model on a server. Close it, or use it in a `with` statement.

    Attributes:
        endpoint: The server.
        max_new_tokens: Length of an answer.
        answered: Prompt -> answer, of everything that was asked.
    """

    def __init__(self, url: str, settings: EndpointSettings | None = None, *, max_new_tokens: int = 48) -> None:
        """Asks the server for its models.

        Args:
            url: The address of the API, such as http://localhost:8000/v1.
            settings: How it is asked.
            max_new_tokens: Length of an answer.

        Raises:
            DataError: The address cannot be used, or the server lists several models and the settings name none.
            EndpointError: The server does not answer.
        """
        self.endpoint = Endpoint(url, settings)
        self.max_new_tokens = max_new_tokens
        self.answered: dict[str, str] = {}
        self._reported: list[str] = []
        try:
            self.endpoint.model()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServedRuntime:
        """Returns the runtime itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self.endpoint.server.close()

    def generate(self, prompts: Sequence[str], on_event: OnEvent = ignore) -> list[str]:
        """Generates greedy answers, several at a time.

        Args:
            prompts: What a user asks. The server decides what it does with a prompt that is too long.
            on_event: Receives the progress, and notes about the server.

        Returns:
            The answers, in the same order.

        Raises:
            EndpointError: The server stopped answering; the error's `answered` holds what it answered before.
        """
        done = 0

        def keep(place: int, reply: Reply) -> None:
            nonlocal done
            done += 1
            self.answered[prompts[place]] = reply.text.strip()
            on_event(Event("generate", done, len(prompts)))

        self._report(on_event)
        try:
            replies = self.endpoint.chat_all(prompts, self.max_new_tokens, keep)
        except EndpointError as error:
            error.answered = dict(self.answered)
            raise
        self._report(on_event)
        if cut := sum(reply.reasoned and not reply.text.strip() for reply in replies):
            note = (
                f"{cut} answers are empty because the model was still reasoning: raise --max-new-tokens, or turn reasoning off"
            )
            on_event(Event("note", note=note))
        return [reply.text.strip() for reply in replies]

    def _report(self, on_event: OnEvent) -> None:
        """Reports each note about the server once."""
        for note in (f"{self.endpoint.url} answers as {self.endpoint.model()}", *self.endpoint.notes):
            if note not in self._reported:
                self._reported.append(note)
                on_event(Event("note", note=note))

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Yields a greedy answer as it is written.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Yields:
            Pieces of the answer.

        Raises:
            EndpointError: The server does not answer, or breaks off.
        """
        yield from self.endpoint.stream(prompt, self.max_new_tokens)

    @property
    def context(self) -> int | None:
        """None: servers do not say it."""
        return None

    @property
    def max_prompt_tokens(self) -> int:
        """No limit: the server decides what it does with a prompt that is too long."""
        return sys.maxsize

    def text_ids(self, text: str) -> list[int]:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an endpoint takes and gives texts."""
        self._only_answers("token ids")

    def token_ids(self, prompts: Sequence[Conversation]) -> list[list[int]]:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an endpoint takes and gives texts."""
        self._only_answers("token ids")

    def token_pairs(self, answers: Mapping[str, str]) -> list[TokenPair]:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an endpoint takes and gives texts."""
        self._only_answers("token ids")

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an endpoint gives no logits."""
        self._only_answers("logits")

    def prompt_states(self, prompts: Sequence[Conversation], layer: int, pooling: str) -> FloatArray:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an endpoint gives no hidden states."""
        self._only_answers("hidden states")

    def with_pack(self, pack: Pack, strength: float = 1.0) -> AbstractContextManager[ServedRuntime]:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: a pack is loaded into the server by `nestpatch adapter load`."""
        self._only_answers("weights")

    def with_adapter(self, adapter: Path) -> AbstractContextManager[ServedRuntime]:  # noqa: ARG002 - the protocol's signature
        """Always raises DataError: an adapter is loaded into the server by `nestpatch adapter load`."""
        self._only_answers("weights")

    def _only_answers(self, what: str) -> NoReturn:
        advice = "Give the model's files for that. A pack is loaded into a server with `nestpatch adapter load`."
        raise DataError(f"{self.endpoint.url} gives answers, and no {what}", advice=advice)
