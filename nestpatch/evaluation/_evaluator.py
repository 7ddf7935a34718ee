"""The work of one evaluation: which models answer, in which order, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

from nestpatch.errors import DataError, EndpointError, JudgeError
from nestpatch.evaluation.ablation import Choice, choose
from nestpatch.evaluation.answers import of_answered
from nestpatch.evaluation.detection import Detection, detect_suites, reads_below, require_detector
from nestpatch.evaluation.drift import drift
from nestpatch.evaluation.judges.keywords import KEYWORDS
from nestpatch.evaluation.judges.protocol import Judge
from nestpatch.evaluation.perplexity import TextLoss, text_loss
from nestpatch.evaluation.preconditions import already_held
from nestpatch.evaluation.result import Ablation, Evaluation
from nestpatch.evaluation.scores import Scores, evaluate_suites, gated
from nestpatch.evaluation.suites import Suite
from nestpatch.evaluation.tasks import Tasks, TaskScore, largest_fall, run_tasks
from nestpatch.events import Event, OnEvent
from nestpatch.measured import BENIGN
from nestpatch.pack import Pack
from nestpatch.runtimes.connection import is_endpoint
from nestpatch.runtimes.protocol import Generate, Runtime
from nestpatch.runtimes.transformers import TransformersRuntime

NOT_MEASURED = "no benign suite: the drift from the base was not measured"
NO_LOGITS = "an endpoint gives answers and no logits: the drift from the base was not measured"
Opened: TypeAlias = Callable[[str | Path], AbstractContextManager[Runtime]]


@dataclass(eq=False)
class Evaluator:
    """What the steps of one evaluation share."""

    suites: Sequence[Suite]
    opened: Opened
    on_event: OnEvent
    notes: list[str]
    judges: Sequence[Judge]
    texts: Sequence[str]
    tasks: Tasks | None
    gate: bool
    """Whether the gated model is summed up."""
    neurons: Choice | None
    detection: Detection | None = None
    ablation: Ablation | None = None
    answered: list[dict[str, str]] = field(default_factory=list)
    """Prompt -> answer, of each model that was asked, in turn."""

    @contextmanager
    def keeping(self, keep: Callable[[Evaluation], None] | None, strengths: Sequence[float]) -> Iterator[None]:
        """Gives what was answered to `keep` and to the error, where a server or a judge fails."""
        try:
            yield
        except (EndpointError, JudgeError) as error:
            if self.answered and self.answered[-1]:
                error.answered = dict(self.answered[-1])
            answered = [one for one in self.answered if one]
            if keep is not None and answered:
                judges = (KEYWORDS,) if isinstance(error, JudgeError) else self.judges
                keep(of_answered(self.suites, answered, judges, strengths))
            raise

    def run(
        self,
        model: str | Path,
        pack: Pack | None,
        strengths: tuple[float, ...],
        lora: str | Path | None,
        base: str | Path | None,
    ) -> Evaluation:
        """Measures what was asked for; a model that holds the pack already as it is."""
        if pack is not None and (reason := already_held(model, pack)):
            self.note_held(model, pack, reason, strengths)
            if base is not None:
                return self.compare(base, model, pack)
            if self.gate:
                advice = "Give the unpatched model with --base as well."
                raise DataError(f"{model} holds {pack.label} already: the base does not answer in it", advice=advice)
            self.note("give the unpatched model with --base to measure both")
            pack = None
        return self.measure(model, pack, strengths, lora, base)

    def result(
        self,
        model: Scores,
        patched: Scores | None,
        strength: float | None = None,
        curve: tuple[tuple[float, Scores], ...] = (),
    ) -> Evaluation:
        """What was measured, with the notes and the names of the judges."""
        judges = tuple(judge.name for judge in self.judges)
        both = gated(model, patched, self.detection) if self.gate and patched and self.detection else None
        return Evaluation(model, patched, tuple(self.notes), judges, strength, curve, self.detection, both, self.ablation)

    def detect(self, base: Runtime, model: str | Path, pack: Pack) -> None:
        """Measures the detector of a pack on the suites, where there is one and the runtime gives hidden states."""
        if pack.detector is None:
            return
        try:
            detector = require_detector(pack, model)
        except DataError as error:
            self.note(f"the detector of {pack.label} was not measured: {error}")
            return
        self.on_event(Event("detect", note=pack.label))
        self.detection = detect_suites(base, detector, self.suites)
        if not reads_below(pack):
            self.note(f"the detector of {pack.label} was measured on the base: it reads a layer that the pack changes")

    def note(self, text: str) -> None:
        """A note for the result, and at once for the listener."""
        if text not in self.notes:
            self.notes.append(text)
            self.on_event(Event("note", note=text))

    def note_held(self, model: str | Path, pack: Pack, reason: str, strengths: Sequence[float]) -> None:
        """Notes that a model holds the pack already. Raises DataError where other strengths are to be measured."""
        held = f"{model} holds {pack.label} already ({reason})"
        if strengths != (1.0,):
            raise DataError(f"{held}: no other strength can be measured", advice="Give the unpatched model.")
        self.note(f"{held}: it is evaluated as it is")

    @contextmanager
    def load(self, model: str | Path) -> Iterator[Runtime]:
        """Opens a model, and reports which."""
        self.on_event(Event("load", note=str(model)))
        with self.opened(model) as runtime:
            yield runtime

    def scores(self, runtime: Runtime, what: str) -> Scores:
        """Evaluates a model, and names it in every event."""
        self.on_event(Event("note", note=f"evaluating {what}"))

        def report(event: Event) -> None:
            if event.stage == "note":
                self.note(event.note)
            else:
                self.on_event(Event("evaluate", event.done, event.total, what) if event.stage == "generate" else event)

        scores = evaluate_suites(self.remembered(runtime, report), self.suites, self.judges, report)
        text = self.text(runtime, what)
        return replace(scores, text=text, tasks=self.task_scores(runtime, what))

    def remembered(self, runtime: Runtime, on_event: OnEvent) -> Generate:
        """How a model answers; what it answers is kept in `answered`."""
        answered: dict[str, str] = {}
        self.answered.append(answered)

        def generate(prompts: Sequence[str]) -> list[str]:
            try:
                found = runtime.generate(prompts, on_event=on_event)
            except EndpointError as error:
                answered.update(error.answered)
                raise
            answered.update(zip(prompts, found, strict=True))
            return found

        return generate

    def task_scores(self, runtime: Runtime, what: str) -> tuple[TaskScore, ...]:
        """The metrics of the tasks; none in other runtimes than transformers, which `find_tasks` has refused."""
        if self.tasks is None or not isinstance(runtime, TransformersRuntime):
            return ()
        self.on_event(Event("tasks", note=f"{', '.join(self.tasks.names)} on {what}"))
        return run_tasks(runtime, self.tasks)

    def text(self, runtime: Runtime, what: str) -> TextLoss | None:
        """How well a model predicts the texts; None without any."""
        if not self.texts:
            return None
        return text_loss(runtime, self.texts, lambda event: self.on_event(Event("text", event.done, event.total, what)))

    def beside(self, base: Runtime, before: Scores, model: Runtime, after: Scores) -> Scores:
        """The scores of a model, with what compares it with its base."""
        answers = before.answers(BENIGN)
        moved = drift(base, model, answers)
        if moved is None:
            self.note(NOT_MEASURED)
        text = after.text.beside(before.text) if after.text and before.text else None
        fall = largest_fall(before.tasks, after.tasks)
        return replace(after, drift=moved, agreement=after.agreeing(answers), text=text, task_fall=fall)

    def patched(self, base: Runtime, model: Runtime, before: Scores, what: str) -> Scores:
        """The scores of a patched model, with its drift from the base."""
        return self.beside(base, before, model, self.scores(model, what))

    def ablate(self, base: Runtime, model: Runtime, before: Scores, whole: Scores, what: str) -> None:
        """Measures a model without the neurons that were asked for, and without random ones; keeps what it finds."""
        if self.neurons is None or not isinstance(model, TransformersRuntime):
            return
        from nestpatch.runtimes.neurons import switched_off

        chosen = choose(model, self.neurons)
        self.note(f"{chosen.count:,} of {chosen.total:,} neurons are switched off: {chosen.how}")
        work = replace(self, texts=(), tasks=None)
        off, random = (
            work.patched(base, switched_off(model, neurons), before, f"{what} without {chosen.count:,} {which} neurons")
            for neurons, which in ((chosen.neurons, "chosen"), (chosen.random, "random"))
        )
        self.ablation = Ablation.of(chosen, self.neurons.wanted, whole, off, random)

    def measure(
        self,
        model: str | Path,
        pack: Pack | None,
        strengths: tuple[float, ...],
        lora: str | Path | None,
        base: str | Path | None,
    ) -> Evaluation:
        """A model, and the same with a pack or an adapter."""
        with self.load(model) as runtime:
            before = self.scores(runtime, str(model))
            if base is not None:
                before = self.moved_from(base, runtime, before)
            if is_endpoint(model):
                self.note(NO_LOGITS)
            if pack is not None:
                self.detect(runtime, model, pack)
                found = self.at_strengths(runtime, pack, strengths, before, f"{model} with {pack.label}")
                curve = tuple(found.items()) if len(strengths) > 1 else ()
                strength = 1.0 if curve else strengths[0]
                return self.result(before, found.get(strength), strength if strength in found else None, curve)
            if lora is None:
                self.ablate(runtime, runtime, before, before, str(model))
                return self.result(before, None)
            with runtime.with_adapter(Path(lora)) as patched:
                return self.result(before, self.patched(runtime, patched, before, f"{model} with {lora}"))

    def at_strengths(
        self, base: Runtime, pack: Pack, strengths: Sequence[float], before: Scores, what: str
    ) -> dict[float, Scores]:
        """Strength -> scores of the base with a pack. Of several strengths, 1 alone is measured on texts and tasks."""
        found, positive = {}, [strength for strength in strengths if strength]
        for number, strength in enumerate(positive, start=1):
            which = f", {number} of {len(positive)}" if len(strengths) > 1 else ""
            note = "" if strengths == (1.0,) else f" at strength {strength:g}{which}"
            with base.with_pack(pack, strength) as patched:
                work = self if strength == 1 or len(positive) == 1 else replace(self, texts=(), tasks=None)
                found[strength] = work.patched(base, patched, before, what + note)
                self.ablate(base, patched, before, found[strength], what)
        return found

    def moved_from(self, base: str | Path, model: Runtime, scores: Scores) -> Scores:
        """The scores of a model, with its drift from a base, which is out of memory again afterwards."""
        prompts = list(scores.answers(BENIGN))
        if not prompts:
            self.note(NOT_MEASURED)
        if not (prompts or scores.text):
            return scores
        with self.load(base) as reference:
            answers = dict(zip(prompts, reference.generate(prompts), strict=True))
            text = self.text(reference, f"{base}, the base")
            beside = scores.text.beside(text) if scores.text and text else None
            agreement = scores.agreeing(answers)
            return replace(scores, drift=drift(reference, model, answers), agreement=agreement, text=beside)

    def compare(self, base: str | Path, model: str | Path, pack: Pack) -> Evaluation:
        """A base and the model that was made from it by patching."""
        with self.load(base) as reference:
            before = self.scores(reference, f"{base}, the base")
            self.detect(reference, base, pack)
            with self.load(model) as patched:
                after = self.patched(reference, patched, before, f"{model}, patched")
                self.ablate(reference, patched, before, after, f"{model}, patched")
                return self.result(before, after)
