"""A model on llama-server whose adapter answers only the conversations that the detector of a pack takes for harmful.

The detector reads the hidden states of the base on this machine. A request to llama-server names the scales of the adapters for
itself alone, in its field `lora`; an adapter that is left out has the scale 0 (tools/server/README.md of llama.cpp).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nestpatch.detector import Detector
from nestpatch.errors import DataError
from nestpatch.evaluation.detection import score_prompts
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.export.serving import ServedAdapter, adapter_named, list_adapters, server_of
from nestpatch.runtimes.connection import EndpointSettings
from nestpatch.runtimes.protocol import Runtime
from nestpatch.runtimes.served import ServedRuntime
from nestpatch.runtimes.text import Conversation, turns_of


class GatedServer(ServedRuntime):
    """A model on llama-server, gated. Close it, or use it in a `with` statement.

    Attributes:
        adapter: The adapter that is switched.
    """

    def __init__(
        self,
        url: str,
        gate: Runtime,
        detector: Detector,
        settings: EndpointSettings | None = None,
        *,
        adapter: str | None = None,
        max_new_tokens: int = 48,
        on_event: OnEvent = ignore,
    ) -> None:
        """Asks the server for its adapters.

        Args:
            url: The address of the API, such as http://localhost:8080/v1.
            gate: The base of the detector's pack, on this machine.
            detector: Decides.
            settings: How the server is asked.
            adapter: The adapter of the pack: its number, its path, or the name of its file; None for the only one.
            max_new_tokens: Length of an answer.
            on_event: Receives a note for each prompt: which model answers.

        Raises:
            DataError: The server is not llama-server, or does not have this adapter.
            EndpointError: It does not answer.
        """
        super().__init__(url, settings, max_new_tokens=max_new_tokens)
        self._gate, self._detector, self._on_event = gate, detector, on_event
        try:
            self.adapter, self._others = self._find(adapter)
        except BaseException:
            self.close()
            raise

    def _find(self, wanted: str | None) -> tuple[ServedAdapter, list[ServedAdapter]]:
        """The adapter that is switched, and those that keep their scales."""
        if server_of(self.endpoint) != "llama-server":
            advice = "Start llama-server with the adapter: nestpatch adapter load URL PACK --output FILE"
            raise DataError("only llama-server takes the scale of an adapter for one request", advice=advice)
        adapters = list_adapters(self.endpoint, "llama-server")
        if wanted is None and len(adapters) != 1:
            listed = ", ".join(f"{one.name} ({one.path})" for one in adapters) or "none"
            advice = f"Name one with --adapter; it has {listed}." if adapters else "Start it with --lora FILE."
            raise DataError(f"{self.endpoint.url} has {len(adapters)} adapters", advice=advice)
        chosen = adapters[0] if wanted is None else adapter_named(adapters, wanted)
        return chosen, [one for one in adapters if one != chosen]

    def stream(self, prompt: Conversation) -> Iterator[str]:
        """Yields a greedy answer: of the model with the adapter where one of the user's prompts is taken for harmful.

        Each prompt of the conversation is judged alone, as in the training, so the adapter stays on after a harmful one.

        Args:
            prompt: What a user asks, or the turns of a conversation.

        Yields:
            Pieces of the answer.

        Raises:
            EndpointError: The server does not answer, or breaks off.
        """
        asked = [turn.content for turn in turns_of(prompt) if turn.role == "user"]
        score = float(score_prompts(self._gate, self._detector, asked).max())
        fired = score > self._detector.facts.threshold
        which = f"adapter {self.adapter.name}" if fired else "the base"
        self._on_event(Event("note", note=f"score {score:+.2f}, {'harmful' if fired else 'harmless'}: {which} answers"))
        scales = [{"id": int(one.name), "scale": one.scale} for one in self._others]
        own: dict[str, Any] = {"id": int(self.adapter.name), "scale": 1.0 if fired else 0.0}
        yield from self.endpoint.stream(prompt, self.max_new_tokens, {"lora": [own, *scales]})
