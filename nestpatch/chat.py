"""A conversation with a model, or with a base and the patched model: both answer every prompt, each in its own history."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nestpatch.errors import DataError
from nestpatch.evaluation.detecting import notes_on
from nestpatch.evaluation.detection import require_detector
from nestpatch.evaluation.gating import GatedServer
from nestpatch.evaluation.preconditions import already_held, require_runnable
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.pack import Pack
from nestpatch.runtimes.connection import EndpointSettings, is_endpoint
from nestpatch.runtimes.protocol import Runtime, open_runtime
from nestpatch.runtimes.text import Turn

BASE, PATCHED, MODEL = "base", "patched", "model"
"""Names of the sides; MODEL is one that is shown alone, or beside --base without a pack."""


@dataclass(eq=False)
class Side:
    """A model and what it has said.

    Attributes:
        name: "base", "patched" or "model".
        what: The model for people, with what patches it.
        runtime: The loaded model.
        turns: The conversation so far, oldest first.
    """

    name: str
    what: str
    runtime: Runtime
    turns: list[Turn] = field(default_factory=list)

    def ask(self, prompt: str) -> Iterator[str]:
        """Answers a prompt. What was said until the iterator ends or is closed becomes part of the conversation.

        Args:
            prompt: What the user asks; `make_room` was called with it.

        Yields:
            Pieces of the answer.
        """
        turns, said = [*self.turns, Turn("user", prompt)], ""
        try:
            for piece in self.runtime.stream(turns):
                said += piece
                yield piece
        finally:
            if said:
                self.turns = [*turns, Turn("assistant", said)]

    def make_room(self, prompt: str) -> int:
        """Forgets the oldest prompts and their answers until the conversation fits into the model's context.

        Args:
            prompt: What the user asks next.

        Returns:
            How many prompts were forgotten.

        Raises:
            DataError: The prompt alone does not fit.
        """
        forgotten = 0
        while not self._fits([*self.turns, Turn("user", prompt)]):
            if not self.turns:
                room = self.runtime.max_prompt_tokens - 1
                raise DataError(
                    f"the prompt does not fit into the context of the model, which leaves room for {room} tokens",
                    advice="Ask something shorter, or give a smaller number with --max-new-tokens.",
                )
            self.turns, forgotten = self.turns[2:], forgotten + 1
        return forgotten

    def _fits(self, turns: Sequence[Turn]) -> bool:
        if self.runtime.max_prompt_tokens == sys.maxsize:  # a server, which counts for itself
            return True
        # Token ids are cut at the limit: as many as that are too many.
        return len(self.runtime.token_ids([turns])[0]) < self.runtime.max_prompt_tokens


@dataclass(eq=False)
class Chat:
    """One or two models that are asked the same.

    Attributes:
        sides: The base and the patched model, or one model.
    """

    sides: tuple[Side, ...]

    def ask(self, prompt: str, *, names: Sequence[str] | None = None, on_event: OnEvent = ignore) -> Iterator[dict[str, str]]:
        """Asks the models, which answer in turns, a piece each. Closing the iterator ends the answers where they are.

        Args:
            prompt: What the user asks.
            names: The sides that are asked; None: all.
            on_event: Receives a note where the beginning of a conversation is forgotten.

        Yields:
            Name of a side -> its answer so far, after each piece; first without any text.

        Raises:
            DataError: The prompt does not fit into the context of a model.
            CheckpointError: A model fails.
        """
        asked = [side for side in self.sides if names is None or side.name in names]
        for side in asked:
            if forgotten := side.make_room(prompt):
                prompts = "the oldest prompt" if forgotten == 1 else f"the {forgotten} oldest prompts"
                on_event(Event("note", note=f"{side.name}: the context is full, {prompts} and what followed are forgotten"))
        answers = {side.name: "" for side in asked}
        yield answers
        with ExitStack() as stack:
            running = {side.name: side.ask(prompt) for side in asked}
            for stream in running.values():
                stack.callback(stream.close)  # type: ignore[attr-defined]
            while running:
                for name, stream in list(running.items()):
                    piece = next(stream, None)
                    if piece is None:
                        del running[name]
                        continue
                    answers = {**answers, name: answers[name] + piece}
                    yield answers

    def forget(self) -> None:
        """Begins a new conversation."""
        for side in self.sides:
            side.turns = []


@contextmanager
def open_chat(
    model: str | Path,
    *,
    pack: Pack | None = None,
    lora: str | Path | None = None,
    base: str | Path | None = None,
    gate: str | Path | None = None,
    adapter: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 256,
    endpoint: EndpointSettings | None = None,
    on_event: OnEvent = ignore,
    on_gate: OnEvent = ignore,
) -> Iterator[Chat]:
    """Loads what a conversation needs: a model, with a pack or an adapter also the same model patched.

    Args:
        model: A model directory, weight file or Hub id, or the address of a server.
        pack: What to merge in memory; it has passed the gate. A model that holds it already is shown as it is.
        lora: An adapter file for a .gguf or ONNX model, instead of `pack`.
        base: The unpatched model, shown instead of `model` without the pack.
        gate: The base of `pack` on this machine: `model` is a llama-server with the pack as an adapter, which answers only
            where the detector of the pack takes a prompt for harmful.
        adapter: That adapter: its number, its path, or the name of its file; None for the only one.
        device: "auto", "cpu", "cuda" or "mps".
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        endpoint: How a server is asked.
        on_event: Receives the progress, and a note where the model holds the pack already.
        on_gate: Receives a note for each prompt of a gated model: which one answers.

    Yields:
        The chat.

    Raises:
        DataError: The options do not go together, or the runtime cannot compute on the device.
        CheckpointError: A model cannot be read or run, or is not the pack's base.
        EndpointError: A server does not answer.
        MissingExtraError: The packages of the runtime are not installed.
    """
    if gate is not None or adapter is not None:
        require_gated(model, pack=pack, lora=lora, base=base, gate=gate)
    else:
        require_runnable(model, pack=pack, lora=lora)
    what = str(pack.label) if pack is not None else str(lora or "")
    held = already_held(model, pack) if pack is not None and gate is None else ""
    if held:
        hint = "" if base is not None else "; --base UNPATCHED_MODEL shows the base beside it"
        on_event(Event("note", note=f"{model} holds {what} already ({held}): it answers as it is{hint}"))
        pack = None
    load = partial(
        open_runtime, device=device, threads=threads, max_new_tokens=max_new_tokens, max_prompt_tokens=None, endpoint=endpoint
    )
    with ExitStack() as stack:
        if gate is not None and pack is not None:
            detector = require_detector(pack, gate)
            for note in notes_on(gate, pack):
                on_event(Event("note", note=note))
            on_event(Event("load", note=str(gate)))
            reader = stack.enter_context(open_runtime(gate, device=device, threads=threads))
            served = GatedServer(
                str(model), reader, detector, endpoint, adapter=adapter, max_new_tokens=max_new_tokens, on_event=on_gate
            )
            yield Chat((Side(MODEL, f"{model} with {what} where its detector fires", stack.enter_context(served)),))
            return
        on_event(Event("load", note=str(model)))
        right = own = stack.enter_context(load(model))
        if pack is not None:
            right = stack.enter_context(own.with_pack(pack))
        elif lora is not None:
            right = stack.enter_context(own.with_adapter(Path(lora)))
        left: Runtime | None = own if right is not own else None
        if base is not None:
            on_event(Event("load", note=str(base)))
            left = stack.enter_context(load(base))
        sides = [] if left is None else [Side(BASE, str(base or model), left)]
        name, whole = (PATCHED, f"{model} with {what}") if what else (MODEL, str(model))
        yield Chat((*sides, Side(name, whole, right)))


def require_gated(
    model: str | Path, *, pack: Pack | None, lora: str | Path | None, base: str | Path | None, gate: str | Path | None
) -> None:
    """Rejects what a gated conversation cannot be made of, before anything is loaded.

    Args:
        model: What answers.
        pack: A pack with a detector.
        lora: Must be None.
        base: Must be None.
        gate: The base of the pack on this machine.

    Raises:
        DataError: Something is missing, or does not go with a gate.
    """
    advice = "Write: nestpatch chat http://HOST:PORT/v1 PACK --gate MODEL"
    if gate is None or pack is None:
        raise DataError("an adapter is switched by a PACK and the base that its detector reads, --gate MODEL", advice=advice)
    if not is_endpoint(model):
        hint = "Measure the combination: nestpatch eval MODEL PACK --gated"
        raise DataError("--gate goes with the address of a llama-server: merged weights are not switched", advice=hint)
    if lora is not None or base is not None:
        raise DataError("--lora and --base do not go with --gate: the server has the base and the adapter", advice=advice)
    require_detector(pack, gate)


def as_json(
    model: str, pack: str | None, adapter: str | None, base: str | None, prompt: str, answers: Mapping[str, str]
) -> dict[str, str | None]:
    """The answers to one prompt for `--json`.

    Args:
        model: MODEL as it was given.
        pack: The label of the pack; None without one.
        adapter: The path of the adapter; None without one.
        base: --base as it was given; None without it.
        prompt: What was asked.
        answers: From `Chat.ask`.

    Returns:
        A JSON object; docs/json.md describes its names.
    """
    first, *others = answers.values()
    facts = {"model": model, "pack": pack, "adapter": adapter, "base": base, "prompt": prompt}
    return {**facts, "before": first, "after": others[0] if others else None}
