"""The course of an evaluation, whatever runs the model: its answers, those of the patched one, and how far both moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from nestpatch.evaluation.drift import MAX_TOKENS, Logits, drift, require_same_ids, torch_logits
from nestpatch.evaluation.suites import BENIGN, Evaluation, Scores, Suite, answers_of, evaluate_suites
from nestpatch.events import Event, OnEvent
from nestpatch.rows import FloatArray
from nestpatch.runtimes.text import TokenPair, encode_pairs
from nestpatch.runtimes.transformers import Generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Answering(Protocol):
    """What an evaluation needs of a model."""

    @property
    def generate(self) -> Generate:
        """Its answers to prompts."""
        ...


R = TypeVar("R", bound=Answering)


def assess_models(
    model: R,
    suites: Sequence[Suite],
    moved: Callable[[R, R, Mapping[str, str]], float],
    *,
    patched: Callable[[], R] | None,
    base: AbstractContextManager[R] | None,
) -> Evaluation:
    """Evaluates a model, and the patched one if there is one, which is only then made.

    `moved` measures the drift of the second model from the first one, over the first one's answers (prompt -> answer). With
    `base`, that of `model` from it is measured too.
    """
    before = evaluate_suites(model.generate, suites)
    if base is not None:
        before = Scores(before.suites, _moved_from(base, model, list(answers_of(before, BENIGN)), moved))
    if patched is None:
        return Evaluation(before)
    other = patched()
    after = evaluate_suites(other.generate, suites)
    return Evaluation(before, Scores(after.suites, moved(model, other, answers_of(before, BENIGN))))


def _moved_from(
    base: AbstractContextManager[R], model: R, prompts: list[str], moved: Callable[[R, R, Mapping[str, str]], float]
) -> float:
    """The drift from a base, which is out of memory again before a patched model comes into it."""
    with base as reference:
        return moved(reference, model, dict(zip(prompts, reference.generate(prompts), strict=True)))


@dataclass(frozen=True, eq=False)
class Runner:
    """A model of which logits are to be had."""

    generate: Generate
    logits: Logits
    pairs: Callable[[Mapping[str, str]], list[TokenPair]]
    """(prompt -> answer) to the token ids that the model reads."""

    @staticmethod
    def drift(base: Runner, model: Runner, answers: Mapping[str, str]) -> float:
        """Mean KL(base || model), in nats per token. Raises BaseMismatchError when they read different tokens."""
        pairs = base.pairs(answers)
        require_same_ids(pairs, model.pairs(answers))
        return drift(base.logits, model.logits, pairs)


class Switchable(Protocol):
    """A loaded model with an adapter that can be switched off."""

    adapted: bool

    def logits(self, ids: Sequence[int], start: int = 0) -> FloatArray:
        """float32 [ids - start, vocabulary]."""
        ...


def switched(
    model: Switchable, generate: Generate, pairs: Callable[[Mapping[str, str]], list[TokenPair]], *, on: bool = False
) -> Runner:
    """A model with its adapter, or without."""

    def answers(prompts: Sequence[str]) -> list[str]:
        model.adapted = on
        return generate(prompts)

    def logits(ids: Sequence[int], start: int) -> FloatArray:
        model.adapted = on
        return model.logits(ids, start)

    return Runner(answers, logits, pairs)


@contextmanager
def in_transformers(model: str | Path, device: str, max_new_tokens: int, on_event: OnEvent) -> Iterator[Runner]:
    """A model directory or Hub id, as the base of a file in another format."""
    from nestpatch.runtimes.transformers import load_model, locate, pick_device, pick_dtype, with_transformers

    chosen, _ = pick_device(device)
    dtype, _ = pick_dtype("auto", chosen)
    loaded, tokenizer = load_model(locate(model).path, chosen, dtype)
    generate = with_transformers(loaded, tokenizer, max_new_tokens, on_event=on_event)
    yield Runner(generate, torch_logits(loaded), pairs_with(tokenizer))


def pairs_with(tokenizer: PreTrainedTokenizerBase) -> Callable[[Mapping[str, str]], list[TokenPair]]:
    """What a tokenizer of transformers makes of prompts and answers."""
    return lambda answers: encode_pairs(tokenizer, list(answers.items()), MAX_TOKENS, MAX_TOKENS)


def as_evaluation(on_event: OnEvent) -> OnEvent:
    """Tells progress of generating as that of evaluating."""
    return lambda event: on_event(Event("evaluate", event.done, event.total))
