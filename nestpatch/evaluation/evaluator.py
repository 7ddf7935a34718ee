"""Evaluation of a model on disk, in whatever runtime it is for, with or without a pack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from nestpatch.errors import DataError
from nestpatch.evaluation.dose import check_strengths
from nestpatch.evaluation.drift import drift
from nestpatch.evaluation.judges.opening import open_judges
from nestpatch.evaluation.judges.protocol import Judge, Verdict
from nestpatch.evaluation.perplexity import TextLoss, text_loss
from nestpatch.evaluation.shares import Share
from nestpatch.evaluation.suites import BENIGN, Evaluation, Scores, Suite, evaluate_suites, overlaps
from nestpatch.evaluation.tasks import Tasks, TaskScore, find_tasks, largest_fall, run_tasks
from nestpatch.events import Event, OnEvent, ignore
from nestpatch.files.atomic import write_bytes
from nestpatch.formats import nest
from nestpatch.formats.provenance import read_packs
from nestpatch.gate import PackLike, Trust, prove
from nestpatch.pack import Pack
from nestpatch.patcher.findings import APPLICABLE, State
from nestpatch.patcher.identity import examine
from nestpatch.patcher.ledger import read_ledger
from nestpatch.patcher.plan import make_plan
from nestpatch.patcher.recovery import open_model
from nestpatch.runtimes.protocol import Runtime, open_runtime, runtime_of
from nestpatch.runtimes.transformers import TransformersRuntime, locate
from nestpatch.signing.trust import Policy

NOT_MEASURED = "no benign suite: the drift from the base was not measured"
_Opened: TypeAlias = Callable[[str | Path], AbstractContextManager[Runtime]]


def evaluate(
    model: str | Path,
    suites: Sequence[Suite],
    *,
    pack: PackLike | None = None,
    policy: Policy | None = None,
    trust: Trust = "policy",
    allow_unsigned: bool = False,
    strengths: Sequence[float] = (1.0,),
    lora: str | Path | None = None,
    base: str | Path | None = None,
    texts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    max_new_tokens: int = 48,
    judges: Sequence[str | Judge] = ("keywords",),
    judge_labels: Mapping[str, Verdict] | None = None,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Evaluates a model; with a pack also the same model with the pack merged in memory.

    A .gguf file is run by llama.cpp and an ONNX model by onnxruntime, both without torch; there the pack is an adapter where
    the model takes one. A model that holds the pack already is evaluated as it is, and a note says so; with `base` both are.

    Args:
        model: A model directory, weight file or Hub id.
        suites: What to ask.
        pack: What to merge in memory. It passes the gate first, as for `apply_in_place`: what is measured is what would be
            applied.
        policy: Whose signatures the pack needs; None means the policy of this user and this machine.
        trust: "none" skips the judgement of signatures.
        allow_unsigned: Accepts a pack that too few trusted keys have signed.
        strengths: Factors of the pack's change, over 0 and at most 1.5. More than one are measured one after the other, as
            the dose curve; 0 names the model alone, which is measured in any case.
        lora: An adapter file for a .gguf or ONNX model, instead of `pack`.
        base: The unpatched model: measures how far `model` has moved from it.
        texts: Plain texts: measures the perplexity.
        tasks: Tasks of lm-eval, by name or as .yaml files; only in transformers. With `base` alone they run on `model` alone.
        task_limit: Questions of each task at most; None for all.
        device: "auto", "cpu", "cuda" or "mps".
        dtype: "auto", or the torch dtype to compute in; GGUF and ONNX files have their own.
        threads: Threads that compute; None: OMP_NUM_THREADS, or every core.
        max_new_tokens: Length of an answer.
        judges: Who judges the answers: names (docs/evaluation.md), or objects with `name` and `judge`. The first decides, the
            others are compared with it. Their models are loaded before MODEL and stay in memory.
        judge_labels: What the labels of a classifier mean, where their names do not say it.
        on_event: Receives the progress.

    Returns:
        The scores of the model, and of the patched one.

    Raises:
        SignatureError: Too few trusted keys signed the pack, or a signature is wrong.
        PackError: The pack cannot be read.
        CheckpointError: The model cannot be read or run, or is not the pack's base.
        JudgeError: A judge cannot be loaded, or fails.
        DataError: The options do not go together, a judge or a task is not known, or the runtime cannot compute on the device.
        EvaluationTaskError: A task fails.
        MissingExtraError: The packages of the runtime are not installed.
    """
    wanted = check_strengths(strengths)
    if pack is not None and lora is not None:
        raise DataError("a pack and an adapter were given: either of them makes the patched model")
    if wanted != (1.0,) and pack is None:
        raise DataError("strengths without a pack: a strength is a factor of a pack's change")
    proven = None
    if pack is not None:
        proven = prove(pack, model, policy=policy, trust=trust, allow_unsigned=allow_unsigned, on_event=on_event).pack
    _require_compatible(model, lora, base)
    found_tasks = find_tasks(tasks, model, task_limit)
    opened = partial(open_runtime, device=device, dtype=dtype, threads=threads, max_new_tokens=max_new_tokens)
    asked = open_judges(judges, labels=judge_labels, device=device)
    work = _Evaluator(suites, opened, on_event, list(overlaps(suites)), asked, texts, found_tasks)
    for note in work.notes:
        on_event(Event("note", note=note))
    if proven is not None and (reason := already_held(model, proven)):
        work.note_held(model, proven, reason, wanted)
        if base is not None:
            return work.compare(base, model)
        work.note("give the unpatched model with --base to measure both")
        proven = None
    with work.load(model) as runtime:
        before = work.scores(runtime, str(model))
        if base is not None:
            before = work.moved_from(base, runtime, before)
        if proven is not None:
            found = work.at_strengths(runtime, proven, wanted, before, f"{model} with {proven.label}")
            curve = tuple(found.items()) if len(wanted) > 1 else ()
            strength = 1.0 if curve else wanted[0]
            return work.result(before, found.get(strength), strength if strength in found else None, curve)
        if lora is None:
            return work.result(before, None)
        with runtime.with_adapter(Path(lora)) as patched:
            return work.result(before, work.patched(runtime, patched, before, f"{model} with {lora}"))


def require_adapter_runtime(model: str | Path, lora: str | Path | None) -> None:
    """Rejects an adapter file for a model whose runtime takes none, before the model is loaded.

    Args:
        model: A model directory, weight file or Hub id.
        lora: The adapter file; None is accepted.

    Raises:
        DataError: transformers runs the model.
    """
    if lora is not None and runtime_of(model) == "transformers":
        advice = "Give the pack itself instead of --lora: MODEL PACK"
        raise DataError("an adapter file goes with a .gguf or an ONNX model", advice=advice)


def _require_compatible(model: str | Path, lora: str | Path | None, base: str | Path | None) -> None:
    """Raises DataError for an adapter or a base that the model's runtime does not accept."""
    require_adapter_runtime(model, lora)
    kind = runtime_of(model)
    other = kind if base is None else runtime_of(base)
    if other not in (kind, "transformers"):
        what, where = ("a .gguf", ".gguf") if other == "llama.cpp" else ("an ONNX", "ONNX")
        raise DataError(f"the drift from {what} base can be measured for {where} models", advice="Give the base's directory.")


def already_held(model: str | Path, pack: Pack) -> str:
    """What proves, before anything is loaded, that a model holds a pack already.

    Args:
        model: A model directory, weight file or Hub id.
        pack: The pack.

    Returns:
        The proof in words; empty where the model does not hold the pack.

    Raises:
        BaseMismatchError: The pack is not for this model.
    """
    kind = runtime_of(model)
    if kind == "transformers":
        import transformers  # noqa: F401 - a missing package is reported before anything is read

        model = locate(model).path
    checkpoint, state_dir = open_model(model)
    states = {finding.state for finding in examine(pack, checkpoint)}
    if states == {State.PATCHED}:
        return "its rows are the pack's result"
    if not states & {State.BASE, State.WIDENED, State.PATCHED, State.MISSING, State.SHAPE}:
        # Rows that were rounded, or merged at another strength, prove little: then the records count.
        pack_id = nest.pack_id(pack)
        if any(entry.pack_id == pack_id for entry in read_ledger(state_dir).applied):
            return "its ledger names the pack"
        if any(claim["pack_id"] == pack_id for claim in read_packs(checkpoint.metadata())):
            return "its files name the pack"
    if kind != "onnxruntime" and not states <= set(APPLICABLE):
        make_plan(pack, checkpoint)  # raises, and says which rows differ
    return ""


@dataclass(eq=False)
class _Evaluator:
    """What the steps of one evaluation share."""

    suites: Sequence[Suite]
    opened: _Opened
    on_event: OnEvent
    notes: list[str]
    judges: Sequence[Judge]
    texts: Sequence[str]
    tasks: Tasks | None

    def result(
        self,
        model: Scores,
        patched: Scores | None,
        strength: float | None = None,
        curve: tuple[tuple[float, Scores], ...] = (),
    ) -> Evaluation:
        """What was measured, with the notes and the names of the judges."""
        judges = tuple(judge.name for judge in self.judges)
        return Evaluation(model, patched, tuple(self.notes), judges, strength, curve)

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
            self.on_event(Event("evaluate", event.done, event.total, what))

        scores = evaluate_suites(partial(runtime.generate, on_event=report), self.suites, self.judges, self.on_event)
        text = self.text(runtime, what)
        return replace(scores, text=text, tasks=self.task_scores(runtime, what))

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
        return replace(after, drift=moved, agreement=_agreement(answers, after), text=text, task_fall=fall)

    def patched(self, base: Runtime, model: Runtime, before: Scores, what: str) -> Scores:
        """The scores of a patched model, with its drift from the base."""
        return self.beside(base, before, model, self.scores(model, what))

    def at_strengths(
        self, base: Runtime, pack: Pack, strengths: Sequence[float], before: Scores, what: str
    ) -> dict[float, Scores]:
        """Strength -> scores of the base with a pack; `strengths` as from `check_strengths`."""
        found, positive = {}, [strength for strength in strengths if strength]
        for number, strength in enumerate(positive, start=1):
            which = f", {number} of {len(positive)}" if len(strengths) > 1 else ""
            note = "" if strengths == (1.0,) else f" at strength {strength:g}{which}"
            with base.with_pack(pack, strength) as patched:
                found[strength] = self.patched(base, patched, before, what + note)
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
            agreement = _agreement(answers, scores)
            return replace(scores, drift=drift(reference, model, answers), agreement=agreement, text=beside)

    def compare(self, base: str | Path, model: str | Path) -> Evaluation:
        """A base and the model that was made from it by patching."""
        with self.load(base) as reference:
            before = self.scores(reference, f"{base}, the base")
            with self.load(model) as patched:
                return self.result(before, self.patched(reference, patched, before, f"{model}, patched"))


def _agreement(answers: Mapping[str, str], model: Scores) -> Share | None:
    """How many answers to benign prompts are the base's, word for word; None without any."""
    own = model.answers(BENIGN)
    return Share(sum(own[prompt] == answer for prompt, answer in answers.items()), len(answers)) if answers else None


def write_answers(evaluation: Evaluation, path: Path) -> None:
    """Writes a JSONL file with one object for each answer.

    Its names are `of` ("model" or "patched"), `suite`, `prompt`, `answer`, `refused`, `correct`, `incoherent`, and `verdicts`:
    the name of each judge, and its verdict, or null where it was not asked.

    Those of a curve also name the strength.

    Args:
        evaluation: What was measured.
        path: The file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    lines = []
    sides: list[tuple[dict[str, Any], Scores]] = [({"of": "model"}, evaluation.model)]
    sides += [({"of": "patched", "strength": strength}, scores) for strength, scores in evaluation.curve]
    if evaluation.patched is not None and not evaluation.curve:
        sides.append(({"of": "patched"}, evaluation.patched))
    for name, scores in sides:
        for suite in scores.suites:
            for verdict in suite.verdicts:
                said = dict(zip(evaluation.judges, verdict.verdicts, strict=True))
                row = {**name, "suite": suite.suite, **dataclasses.asdict(verdict), "verdicts": said}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_bytes(path, "".join(lines).encode("utf-8"))
